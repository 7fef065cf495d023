"""LoRA: low-rank updates of a network, W + scale · (α/r) B A (Hu et al. 2022), merged into its weights."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samplerbench.errors import UserError, argument
from samplerbench.models.files import hash_files
from samplerbench.models.flow_text import Wrapped
from samplerbench.models.model import Model
from samplerbench.untrusted import is_file, reason, shorten, user_path

MAX_SCALE = 100.0
ADAPTER = "samplerbench"
"""Name of the adapter in peft, while it is merged."""

_SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")
"""Settings of a LoRA that are read from the metadata of its file. The others are not needed to merge it."""


@dataclass(frozen=True)
class LoRA:
    """A LoRA file and its scale.

    Attributes:
        file: safetensors file, in the format of diffusers, peft or Kohya's scripts.
        scale: factor of the update.
        sha256: hash of the file.
    """

    file: Path
    scale: float
    sha256: str


def read_lora(text: str) -> LoRA:
    """Read `FILE` or `FILE:scale`. The default scale is 1.

    Args:
        text: path of a safetensors file, optionally with a colon and the scale.

    Raises:
        UserError: if the file does not exist or is not a safetensors file, or the scale is out of range.
    """
    name, scale = text, 1.0
    head, colon, tail = text.rpartition(":")
    if colon and re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?|[-+]?(nan|inf)", tail):
        try:
            name, scale = head, float(tail)
        except ValueError:
            raise UserError(f"{argument('lora', text)}: the scale {tail} is not a number; write FILE:0.8.") from None
    if not math.isfinite(scale) or abs(scale) > MAX_SCALE:
        raise UserError(f"{argument('lora', text)}: the scale must be a number from -{MAX_SCALE:g} to {MAX_SCALE:g}.")
    file = user_path(name)
    if file.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise UserError(f"{argument('lora', text)}: pickle files are not supported; convert the file to safetensors.")
    if not is_file(file):
        raise UserError(f"{argument('lora', text)}: the file does not exist; write FILE.safetensors or FILE:scale.")
    if file.suffix.lower() != ".safetensors":
        raise UserError(f"{argument('lora', text)}: the file must be a safetensors file.")
    return LoRA(file, scale, hash_files([file]))


def check_no_lora(source: str, loras: Sequence[str]) -> None:
    """Raise UserError if a LoRA is given for a model that supports none."""
    if loras:
        raise UserError(
            f"{argument('lora', loras[0])} requires a text-to-image pipeline of diffusers, but {source} is not one."
        )


def merge_loras(model: Model, pipeline: str, loras: Sequence[str]) -> None:
    """Merge LoRAs into the weights of a model, and add them to its identity.

    They are read by diffusers (`lora_state_dict` of the pipeline class, `load_lora_adapter` of the network) and merged
    by peft in the precision of the weights, as `fuse_lora` of a pipeline does.

    Args:
        model: the loaded model.
        pipeline: class name of its pipeline.
        loras: `FILE` or `FILE:scale` of each LoRA.

    Raises:
        UserError: if peft is missing, the network supports no LoRA, a file is damaged, or a tensor of it does not
            belong to the network.
    """
    if not loras:
        return
    read = [read_lora(text) for text in loras]
    import diffusers

    cls: Any = getattr(diffusers, pipeline, None)
    network: Any = model.network.transformer if isinstance(model.network, Wrapped) else model.network
    if not hasattr(cls, "lora_state_dict") or not hasattr(network, "load_lora_adapter"):
        raise UserError(
            f"{argument('lora', loras[0])}: diffusers supports no LoRA for a {pipeline} with a "
            f"{type(network).__name__}."
        )
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UserError(
            f"{argument('lora')} requires the package peft; install it with `pip install 'samplerbench[lora]'`."
        ) from None
    for text, lora in zip(loras, read, strict=True):
        _merge(network, cls, lora, f"{argument('lora', text)}")
    network.requires_grad_(False).eval()
    sizes = [f"{lora.sha256}:{lora.scale!r}" for lora in read]
    model.identity["lora"] = sizes
    # Estimates and other cached values belong to the weights.
    model.identity["weights"] = hashlib.sha256(" ".join([str(model.identity["weights"]), *sizes]).encode()).hexdigest()


def _merge(network: Any, cls: Any, lora: LoRA, given: str) -> None:
    """Merge one LoRA. `given` is the prefix of error messages."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    prefix = str(getattr(cls, "unet_name", None) or getattr(cls, "transformer_name", "transformer"))
    more = {"unet_config": network.config} if prefix == "unet" else {}
    _check_keys(lora, given)
    try:
        state, *rest = cls.lora_state_dict(
            str(lora.file.parent),
            weight_name=lora.file.name,
            use_safetensors=True,
            local_files_only=True,
            return_alphas=True,
            return_lora_metadata=True,
            **more,
        )
    except Exception as error:  # diffusers raises many exception types for an invalid file
        raise UserError(f"{given}: the file cannot be read as a LoRA: {reason(error)}") from None
    alphas, metadata = rest if len(rest) == 2 else (None, rest[0] if rest else None)
    others = sorted({key.split(".")[0] for key in state} - {prefix})
    if "text_encoder" in others or "text_encoder_2" in others:
        raise UserError(
            f"{given}: it also changes the text encoder, which is not supported; use a LoRA of the {prefix} only."
        )
    if others or not state:
        what = f"a tensor {shorten(others[0])}" if others else "no tensors"
        raise UserError(f"{given}: it has {what}; the tensors of a LoRA for this network begin with {prefix}.")
    state = convert_unet_state_dict_to_peft(state)
    expected = {key.removeprefix(f"{prefix}.") for key in state}
    if any(re.search(r"lora_magnitude_vector|\.bias$", key) for key in expected):
        raise UserError(f"{given}: DoRA and biases are not supported; only LoRA layers A and B are.")
    layers = dict(network.named_modules())
    unknown = sorted(key for key in expected if key.split(".lora_")[0] not in layers or ".lora_" not in key)
    if unknown:
        raise UserError(
            f"{given}: {len(unknown)} of its {len(expected)} tensors do not belong to the {prefix}, a "
            f"{type(network).__name__}; the first is {shorten(unknown[0])}."
        )
    try:
        network.load_lora_adapter(
            state,
            prefix=prefix,
            network_alphas=alphas or None,
            adapter_name=ADAPTER,
            metadata=None if alphas else _settings(metadata, prefix, expected, given),
        )
        loaded = {key.replace(f".{ADAPTER}.", ".") for key in network.state_dict() if f".{ADAPTER}." in key}
        if missing := sorted(expected ^ loaded):
            raise ValueError(f"{len(missing)} tensors do not match the network, the first is {missing[0]}")
        network.fuse_lora(lora_scale=lora.scale, safe_fusing=True)
        network.unload_lora()
    except Exception as error:  # peft and diffusers raise many exception types
        raise UserError(f"{given}: it cannot be merged into the {type(network).__name__}: {reason(error)}") from None


def _check_keys(lora: LoRA, given: str) -> None:
    """Check the names of the tensors in the file, before diffusers converts them."""
    from safetensors import safe_open

    try:
        with safe_open(str(lora.file), "pt") as handle:
            names = list(handle.keys())
    except Exception as error:  # safetensors raises an exception of its own type
        raise UserError(f"{given}: the file is damaged or not a safetensors file: {reason(error)}") from None
    if any("dora_scale" in name or "lokr_" in name or "hada_" in name for name in names):
        raise UserError(f"{given}: DoRA, LoKr and LoHa are not supported; only LoRA is.")
    if not any("lora" in name for name in names):
        raise UserError(f"{given}: the file contains no LoRA; the name of none of its tensors contains lora.")


def _settings(metadata: Any, prefix: str, expected: set[str], given: str) -> dict[str, Any] | None:
    """The rank and α of each layer from the metadata of the file. None if the file has none: then α is the rank."""
    if not isinstance(metadata, Mapping) or not metadata:
        return None
    found = {key.removeprefix(f"{prefix}."): value for key, value in metadata.items()}
    settings = {key: found[key] for key in _SETTINGS if found.get(key) is not None}
    numbers = [settings.get("r", 8), settings.get("lora_alpha", 8)]
    flags = [settings.get(key, False) for key in ("use_rslora", "use_dora", "lora_bias")]
    patterns = [settings.get(key, {}) for key in ("rank_pattern", "alpha_pattern")]
    sound = all(isinstance(flag, bool) for flag in flags) and all(isinstance(p, dict) for p in patterns)
    if sound:
        numbers += [value for pattern in patterns for value in pattern.values()]
        # peft uses the keys as regular expressions.
        sound = all(re.fullmatch(r"\^?[\w.]{1,300}", key) for pattern in patterns for key in pattern)
    if not sound or not all(type(n) in (int, float) and 0 < n < 1e6 for n in numbers):
        raise UserError(f"{given}: the metadata of the file (lora_adapter_metadata) is invalid.")
    if flags[1] or flags[2]:
        raise UserError(f"{given}: DoRA and biases are not supported; only LoRA layers A and B are.")
    settings["target_modules"] = sorted({key.split(".lora_")[0] for key in expected})
    return {f"{prefix}.{key}": value for key, value in settings.items()}
