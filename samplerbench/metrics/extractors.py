"""Feature extractors by name: torch-fidelity's, the included feature networks, and image encoders of transformers."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samplerbench.errors import UserError, argument
from samplerbench.metrics.encoders import CHUNK, DEFAULTS, Space, known_size, load_encoder, parse_space
from samplerbench.metrics.prompt_encoder import ClipPrompts, load_prompt_encoder
from samplerbench.options import did_you_mean
from samplerbench.untrusted import is_dir, read_json, reason, shorten, user_path

DIGITS = "digits-cnn"


@dataclass
class Extractor:
    """A feature extractor: maps uint8 images to feature vectors.

    Attributes:
        module: the network, in evaluation mode.
        name: name in torch-fidelity's registry.
        layer: name of the layer for FID, as torch-fidelity names it.
        sha256: hash of the weights.
        device: device of the network.
        chunk: the number of images per forward pass.
        layers: for each metric's layer, its index in the output of the module.
        rule: how images are resized and normalised, for the protocol; empty where the name says it.
        prompts: encodes prompts into the same space; None for an extractor of images alone.
    """

    module: nn.Module
    name: str
    layer: str
    sha256: str
    device: torch.device
    chunk: int = 256
    layers: dict[str, int] = field(default_factory=lambda: {"fid": 0})
    rule: str = ""
    prompts: ClipPrompts | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, d) of images (B, C, H, W) uint8, C = 1 or 3. Grey images become three equal channels."""
        return self.all(images)["fid"]

    @torch.no_grad()
    def all(self, images: Tensor) -> dict[str, Tensor]:
        """The features (B, d) of each layer, by the name of its metric, from one forward pass."""
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        parts = [self.module(part.to(self.device).contiguous()) for part in images.split(self.chunk)]
        outputs = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        return {name: outputs[i] for name, i in self.layers.items()}

    @property
    def identity(self) -> dict[str, str]:
        """The fields recorded in the protocol: name, layer, hash of the weights, and the rule, where there is one."""
        identity = {"name": self.name, "layer": self.layer, "weights": self.sha256}
        return identity | ({"preprocessing": self.rule} if self.rule else {})


def load_extractor(
    name: str, device: torch.device, weights: str | None = None, metrics: Iterable[str] = ("fid",)
) -> Extractor:
    """Load a feature extractor.

    Args:
        name: a registered name, or a folder written by `samplerbench train features`. The extractor of such a folder
            is called DATA-cnn, after its data. `clip:SOURCE`, `cmmd:SOURCE` and `dinov2:SOURCE` are encoders of
            transformers (`samplerbench.metrics.encoders`).
        device: device of the network.
        weights: the weights file, for a machine without network access: safetensors, or a state dict that
            `torch.load(weights_only=True)` reads. For digits-cnn and mnist-cnn, a folder written by `samplerbench train
            features`.
            No code in the file is run.
        metrics: the layers to extract, by torch-fidelity's names (fid, kid, isc, prc). fid is always extracted.

    Raises:
        UserError: an unknown name, or weights that are missing or do not match.
    """
    if (space := parse_space(name)) is not None:
        return _load_encoder(space, device, weights, metrics)
    name, weights, cls = _find(name, weights)
    layer = cls.get_default_feature_layer_for_metric("fid")
    try:
        wanted = {m: cls.get_default_feature_layer_for_metric(m) for m in dict.fromkeys(("fid", *metrics))}
    except KeyError as error:
        raise UserError(f"the features {name} have no layer for the metric {error}.") from None
    order = list(dict.fromkeys(wanted.values()))
    try:
        # CLIP's own download is a TorchScript archive, whose hash torch-fidelity checks.
        guard = contextlib.nullcontext() if name.startswith("clip-") else _tensors_only()
        with contextlib.redirect_stdout(io.StringIO()), guard, _plain_weights(cls, name, weights) as path:
            module = cls(name, order, feature_extractor_weights_path=path, verbose=False)
    except UserError:
        raise
    except NotImplementedError:
        raise UserError(
            f"{name} does not accept a weights file; its weights are loaded from torch hub's cache, "
            f"{torch.hub.get_dir()}."
        ) from None
    except Exception as error:  # torch-fidelity lets through whatever its downloads and torch.load raise
        if weights is None:
            raise UserError(
                f"the weights of {name} are not in the cache and cannot be downloaded ({type(error).__name__}); put "
                f"{_weights_file(cls)} into {Path(torch.hub.get_dir()) / 'checkpoints'}, or name the file with "
                f"{argument('features_weights')}."
            ) from error
        raise UserError(f"the weights {weights} do not fit the features {name}: {_misfit(error)}") from error
    module.requires_grad_(False).eval().to(device)
    positions = {m: order.index(found) for m, found in wanted.items()}
    return Extractor(module, name, str(layer), _hash_module(module), device, layers=positions)


def _load_encoder(space: Space, device: torch.device, weights: str | None, metrics: Iterable[str]) -> Extractor:
    """Load an encoder of transformers. Raises UserError."""
    _check_no_weights(space, weights)
    if "isc" in (metrics := list(metrics)):
        raise UserError(
            f"the features {space.label} have no classifier, which inception-score and label-accuracy need."
        )
    loaded = load_encoder(space, device)
    prompts = None
    if loaded.model is not None:
        prompts = load_prompt_encoder(loaded.model, loaded.tokenizer, space.processor or space.source, space.label)
    layers = dict.fromkeys(("fid", *metrics), 0)
    return Extractor(
        loaded.module,
        space.label,
        loaded.layer,
        loaded.sha256,
        device,
        CHUNK,
        layers,
        rule=loaded.rule,
        prompts=prompts,
    )


def _check_no_weights(space: Space, weights: str | None) -> None:
    if weights is not None:
        raise UserError(
            f"{argument('features_weights', weights)} does not apply to {space.kind}:{space.source}; name the folder "
            f"of the weights as {space.kind}:FOLDER."
        )


def _misfit(error: Exception) -> str:
    """torch's message about a state dict that does not match, with the number of tensors in place of their names."""
    text = reason(error)
    for mark, what in (("Missing key(s) in state_dict: ", "missing"), ("Unexpected key(s) in state_dict: ", "unknown")):
        _, found, rest = text.partition(mark)
        names = re.match(r'"[^"]*"(?:, "[^"]*")*', rest)
        if found and names:
            keys = names[0].split(", ")
            several = "one tensor is" if len(keys) == 1 else f"{len(keys)} tensors are"
            return f"{several} {what}, the first {shorten(keys[0])}."
    return shorten(text, 300)


def known_dimension(name: str, weights: str | None = None) -> int | None:
    """The number of features d of an extractor, without loading its weights; None if it is unknown without them.

    Args:
        name: as for `load_extractor`.
        weights: as for `load_extractor`.

    Raises:
        UserError: an unknown name, or weights that do not exist.
    """
    if (space := parse_space(name)) is not None:
        _check_no_weights(space, weights)
        return known_size(space)
    name, weights, cls = _find(name, weights)
    if _is_feature_network(cls):
        folder = cls.folder(weights)
        found = read_json(Path(folder) / "config.json", f"no feature network in {folder}").get("features")
        return found if isinstance(found, int) else None
    layer = str(cls.get_default_feature_layer_for_metric("fid"))
    return int(layer) if layer.isdecimal() else None  # torch-fidelity calls Inception's layers by their size


def _find(name: str, weights: str | None) -> tuple[str, str | None, Any]:
    """The name, weights and class of an extractor. Raises UserError as `load_extractor` does."""
    registry = _registry()
    if name not in registry and is_dir(name):
        folder = user_path(name)
        name, weights = trained_name(folder), str(folder)
        cls = registry[DIGITS]  # the network of that folder, whatever the class's own
    elif name not in registry:
        known = ", ".join([*sorted(registry), *(f"{kind}:SOURCE" for kind in DEFAULTS)])
        raise UserError(
            f'no feature extractor "{name}".{did_you_mean(name, registry)} Known: {known}; '
            "or a folder written by `samplerbench train features`."
        )
    else:
        cls = registry[name]
    if weights is not None and not weights.strip():
        raise UserError(f"{argument('features_weights')} is empty; name a weights file, or leave it out.")
    if weights is not None and not user_path(weights).exists():
        raise UserError(f"the weights {weights} of the features {name} do not exist.")
    return name, weights, cls


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Context manager: `torch.load` reads only tensors, even if it is called with weights_only=False.

    torch-fidelity calls it that way.
    """
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _plain_weights(cls: type, name: str, weights: str | None) -> Iterator[str | None]:
    """The path of a weights file that the extractor class can load: a copy that contains only tensors.

    Raises:
        UserError: the file is neither safetensors nor a state dict.
    """
    path = None if weights is None else user_path(weights)
    if path is None or path.is_dir() or _is_feature_network(cls):
        yield None if path is None else str(path)
        return
    if name.startswith("clip-"):
        raise UserError(
            f"{name} takes a TorchScript archive as its weights, which is a program, and no code of a weights file is "
            f"run; leave {argument('features_weights')} out, with the weights in torch hub's cache, "
            f"{torch.hub.get_dir()}."
        )
    state = _read_state(path, weights or "")
    with tempfile.TemporaryDirectory(prefix="samplerbench-") as folder:
        copy = Path(folder) / "weights.pth"
        torch.save(state, copy)
        yield str(copy)


def _read_state(path: Path, shown: str) -> dict[str, Tensor]:
    """The tensors of a weights file, by name. Raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise UserError(f"the weights {shown} cannot be read ({reason(error)}).") from None
    except Exception:  # torch's own message advises to unpickle the file after all
        raise UserError(
            f"the weights {shown} contain more than tensors: use safetensors, or a state dict saved with torch.save. "
            "Other pickles are not loaded."
        ) from None
    if isinstance(state, dict) and state and all(isinstance(v, Tensor) for v in state.values()):
        return {str(key): value for key, value in state.items()}
    raise UserError(f"the weights {shown} are not a state dict.")


def trained_name(folder: Path) -> str:
    """`mnist-cnn` for a feature network trained on mnist, by the card in its folder.

    Raises:
        UserError: the folder was not written by `samplerbench train features`.
    """
    card = read_json(
        folder / "samplerbench.json", f"no feature network in {folder} (`samplerbench train features` makes one)"
    )
    what, data = card.get("what"), card.get("data")
    data = data.get("name") if isinstance(data, dict) else None
    if not isinstance(what, str) or not isinstance(data, str):
        raise UserError(f"no feature network in {folder}; `samplerbench train features` makes one.")
    if what != "features":
        raise UserError(f"{folder} contains a {what}, not a feature network; use a folder of `train features`.")
    return f"{data}-cnn"


def _weights_file(cls: type) -> str:
    import sys

    urls = [v for k, v in vars(sys.modules[cls.__module__]).items() if k.startswith("URL") and isinstance(v, str)]
    return f"{urls[0].rsplit('/', 1)[-1]} (from {urls[0]})" if urls else "its weights file"


def _hash_module(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@functools.cache
def _registry() -> dict[str, Any]:
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

    from samplerbench.assets import FEATURES

    class NetworkExtractor(FeatureExtractorBase):
        """A feature network with torch-fidelity's interface: maps uint8 RGB images to a tuple of features."""

        included: str

        @classmethod
        def folder(cls, weights: str | None) -> Path:
            """The folder of the network: `weights`, or else the network that is included."""
            from samplerbench.assets import asset

            return asset(cls.included) if weights is None else user_path(weights)

        def __init__(
            self,
            name: str,
            features_list: list[str],
            feature_extractor_weights_path: str | None = None,
            **_: Any,
        ) -> None:
            super().__init__(name, features_list)
            from samplerbench.metrics.feature_network import FeatureNetwork
            from samplerbench.models.files import check_no_code, check_weights

            folder = self.folder(feature_extractor_weights_path)
            if not (folder / "config.json").exists():
                raise UserError(f"no feature network in {folder}; `samplerbench train features` makes one.")
            check_no_code(read_json(folder / "config.json", f"no feature network in {folder}"), str(folder))
            check_weights(folder, folder.glob("*.safetensors"), None, f"no feature network in {folder}")
            self.network = FeatureNetwork.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, local_files_only=True
            )

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            features, logits = self.network(images.float() / 127.5 - 1)
            outputs = {"features": features, "logits": logits}
            return tuple(outputs[name] for name in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("features", "logits")

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return True

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            return torch.zeros(1, 3, 28, 28, dtype=torch.uint8)

    for name, folder in FEATURES.items():
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            register_feature_extractor(name, type("NetworkExtractor", (NetworkExtractor,), {"included": folder}))
    return FEATURE_EXTRACTORS_REGISTRY


def _is_feature_network(cls: Any) -> bool:
    """Whether an extractor is a network of `samplerbench train features`."""
    return hasattr(cls, "included")


def extractor_names() -> list[str]:
    """The registered names."""
    return sorted(_registry())


__all__ = ["DIGITS", "Extractor", "extractor_names", "load_extractor"]
