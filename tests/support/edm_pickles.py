"""Pickles in the format of EDM's published networks, without EDM's code. The weights are a formula of their names."""

from __future__ import annotations

import io
import math
import pickle
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from samplerbench.models.edm import EDMPreconditioned
from samplerbench.models.edm_convert import edm_name
from samplerbench.models.edm_unet import read_settings

SONG = {"model_type": "SongUNet", "img_resolution": 16, "model_channels": 16, "num_blocks": 1}
FOURIER = {"embedding_type": "fourier", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
LEVELS = {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5}
NETWORKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddpm++": ("EDMPrecond", LEVELS, SONG | {"label_dim": 4, "channel_mult": [1, 2], "attn_resolutions": [8]}),
    "ncsn++": (
        "EDMPrecond",
        LEVELS,
        SONG | FOURIER | {"encoder_type": "residual", "channel_mult": [2, 2, 2], "attn_resolutions": [16]},
    ),
    "skip": (
        "VEPrecond",
        {"sigma_min": 0.02, "sigma_max": 100},
        SONG
        | FOURIER
        | {"label_dim": 4, "label_dropout": 0.1, "encoder_type": "skip", "decoder_type": "skip"}
        | {"channel_mult": [1, 2], "attn_resolutions": [16]},
    ),
    "ddpm++ vp": (
        "VPPrecond",
        {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5, "sigma_min": 0.001, "sigma_max": 152.0},
        SONG | {"channel_mult": [1, 2], "attn_resolutions": [8]},
    ),
    "adm": (
        "EDMPrecond",
        LEVELS,
        SONG
        | {"model_type": "DhariwalUNet", "label_dim": 4, "model_channels": 64, "channel_mult": [1, 2]}
        | {"attn_resolutions": [16]},
    ),
}
"""Small networks: EDM's preconditioner, its attributes, and the settings of the U-Net."""


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weights with EDM's name: 0.2 sin(1.7 i + 0.37 k), scaled for the layer, where k depends on the name."""
    count = math.prod(shape)
    key = sum((i + 1) * ord(letter) for i, letter in enumerate(name)) % 1009
    waves = torch.sin(torch.arange(count, dtype=torch.float64) * 1.7 + key * 0.37)
    if name.endswith("freqs"):
        waves = waves * 4
    elif len(shape) == 1:
        waves = 0.2 * waves + (1 if "norm" in name and name.endswith("weight") else 0)
    else:
        waves = waves * (2 / (count // shape[0])) ** 0.5
    return waves.reshape(shape).float()


class EasyDict(dict[str, Any]):
    """The dictionary of EDM's settings."""


EasyDict.__module__ = "dnnlib.util"


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("a function of the file was called")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
SOURCE = "raise AssertionError('code of the file was run')"


class Persistent(nn.Module):
    """A module that is pickled with the source code of its class, as by EDM's persistence.

    Args:
        class_name: name of the class.
        attributes: its attributes.
        settings: arguments with which it was created.
    """

    def __init__(self, class_name: str, attributes: Mapping[str, Any] = {}, settings: Mapping[str, Any] = {}) -> None:
        super().__init__()
        self.class_name = class_name
        self.__dict__.update(attributes)
        self._init_args, self._init_kwargs = (), EasyDict(settings)

    def __reduce__(self) -> Any:
        state = {key: item for key, item in self.__dict__.items() if key != "class_name"}
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self.class_name, "state": state}
        return _reconstruct_persistent_obj, (meta,), None


def tensors_of(kind: str, **changes: Any) -> dict[str, Tensor]:
    """The tensors of a network, by EDM's names, with those that the conversion leaves out."""
    _, _, given = NETWORKS[kind]
    settings = read_settings(given | {"in_channels": 3, "out_channels": 3} | changes, "test")
    with torch.device("meta"):
        network = EDMPreconditioned(unet=settings.to_json())
    named = {edm_name(key, settings): tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    made = {name: value(name, shape) for name, shape in named.items()}
    made["map_augment.weight"] = torch.ones(made["map_layer0.weight"].shape[1], 9)
    taps = torch.tensor(settings.resample_filter)
    made["enc.8x8_down.conv0.resample_filter"] = (torch.outer(taps, taps) / taps.sum() ** 2)[None, None]
    return made


def network_of(
    kind: str, tensors: Mapping[str, Tensor] | None = None, outer: Mapping[str, Any] = {}, **changes: Any
) -> Persistent:
    """A network as EDM's code makes it.

    Args:
        kind: name in `NETWORKS`.
        tensors: its tensors, by EDM's names.
        outer: other attributes of the preconditioner.
        changes: other settings of the U-Net.
    """
    name, attributes, given = NETWORKS[kind]
    given = {key: item for key, item in given.items() if key != "model_type"}
    settings = given | {"in_channels": 3, "out_channels": 3, "dropout": np.sqrt(0.0169), "augment_dim": 9} | changes
    inner = Persistent(NETWORKS[kind][2]["model_type"], {}, settings)
    for path, tensor in (tensors_of(kind) if tensors is None else tensors).items():
        *parents, leaf = path.split(".")
        module: Any = inner
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.ModuleDict() if parent in ("enc", "dec") else Persistent("Layer"))
            module = module._modules[parent]
        if leaf in ("freqs", "resample_filter"):
            module.register_buffer(leaf, tensor)
        else:
            module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    label_dim = settings.get("label_dim", 0)
    made = Persistent(name, {"img_resolution": 16, "label_dim": label_dim, **attributes, **outer}, settings)
    made.add_module("model", inner)
    return made.eval()


def dump(content: Any, protocol: int = 4) -> bytes:
    """The pickle of an object, where the modules of EDM's code exist in name only."""
    modules = {
        name: types.ModuleType(name) for name in ("dnnlib", "dnnlib.util", "torch_utils", "torch_utils.persistence")
    }
    setattr(modules["dnnlib.util"], "EasyDict", EasyDict)  # noqa: B010
    setattr(modules["torch_utils.persistence"], "_reconstruct_persistent_obj", _reconstruct_persistent_obj)  # noqa: B010
    file = io.BytesIO()
    with mock.patch.dict(sys.modules, modules):
        pickle.Pickler(file, protocol).dump(content)
    return file.getvalue()


def published(folder: Path, kind: str, **how: Any) -> Path:
    """Write a file like EDM's: the network under "ema", beside the loss and the settings of the data."""
    loss = Persistent("EDMLoss", {"P_mean": -1.2, "P_std": np.float32(1.2)})
    content = {"ema": network_of(kind, **how), "loss_fn": loss, "dataset_kwargs": {"path": "cifar10.zip"}}
    file = folder / f"{kind.replace(' ', '-')}.pkl"
    file.write_bytes(dump(content))
    return file
