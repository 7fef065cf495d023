"""Single files: the weights of a network, and possibly of an autoencoder and text encoders, in one safetensors file."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from samplerbench.errors import UserError
from samplerbench.untrusted import reason

PREFIXES = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
}
"""Prefixes of the tensors of a part in a single file. Those of the network have many forms."""
T5_PREFIX = "text_encoders.t5xxl."
"""Prefix of the tensors of a T5 encoder in a single file, whichever part of the pipeline it is."""


def contains(file: Path, part: str, network: str, kind: str | None = None) -> bool:
    """Whether a single file contains a part.

    Args:
        file: the safetensors file.
        part: name of the part, such as "vae" or "text_encoder_2".
        network: name of the network, which every file contains.
        kind: name of the class of the part, such as "T5EncoderModel".

    Raises:
        UserError: if the file is damaged.
    """
    prefixes = (T5_PREFIX,) if kind is not None and kind.startswith("T5") else PREFIXES.get(part, ())
    return part == network or any(name.startswith(prefixes) for name in _names(*_version(file)) if prefixes)


def load_from_file(source: str, file: Path, part: str, cls: Any, config: Path, dtype: torch.dtype) -> Any:
    """Load a part of a single file with `from_single_file` of diffusers, which converts the names of the tensors.

    Args:
        source: path of the file, for error messages.
        file: the safetensors file.
        part: name of the part.
        cls: class of the module.
        config: folder with the configuration of the part.
        dtype: dtype of the weights.

    Returns:
        The module on the CPU. Every parameter is from the file.

    Raises:
        UserError: if diffusers cannot load the class from a single file, or tensors are missing or do not match the
            configuration.
    """
    from safetensors.torch import load_file

    complaint = f"{source} cannot be loaded as a {cls.__name__} with the configuration {config}"
    try:
        if hasattr(cls, "from_single_file"):
            module = cls.from_single_file(str(file), config=str(config), local_files_only=True, torch_dtype=dtype)
        elif cls.__name__.startswith(("CLIPTextModel", "T5")):
            from diffusers.loaders import single_file_utils as converters

            convert = (
                converters.create_diffusers_t5_model_from_checkpoint
                if cls.__name__.startswith("T5")
                else converters.create_diffusers_clip_model_from_ldm
            )
            module = convert(cls, load_file(file), config=str(config), torch_dtype=dtype, local_files_only=True)
        else:
            raise UserError(f"{complaint}: diffusers does not support this class in a single file.")
    except UserError:
        raise
    except Exception as error:  # the libraries raise many exception types for an unknown or damaged file
        raise UserError(f"{complaint}: {reason(error)}") from None
    missing = sorted(name for name, parameter in module.named_parameters() if parameter.is_meta)
    if missing:
        raise UserError(f"{complaint}: {len(missing)} tensors are missing from the file, the first is {missing[0]}.")
    return module


def _version(file: Path) -> tuple[str, int, int]:
    info = file.stat()
    return str(file), info.st_size, info.st_mtime_ns


@lru_cache(maxsize=4)
def _names(file: str, size: int, modified: int) -> tuple[str, ...]:
    from safetensors import safe_open

    try:
        with safe_open(file, "pt") as handle:
            return tuple(handle.keys())
    except Exception as error:  # safetensors raises an exception of its own type
        raise UserError(f"{file} is damaged or not a safetensors file: {reason(error)}") from None


def file_hash(file: Path) -> str:
    """The SHA-256 hash of the contents of a file, computed once for all parts as long as the file does not change."""
    return _hash(*_version(file))


@lru_cache(maxsize=4)
def _hash(file: str, size: int, modified: int) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
