"""A digest in the metadata of a safetensors file: it tells a file that is not as it was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

FORMAT = "1"
"""Of the seal. Both this number and the digest are in the metadata, so no single damaged byte makes a file unsealed."""


class DamagedError(ValueError):
    """A file of tensors that is not as it was written. The message is a clause: "its digest is wrong"."""


def content_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """sha256 over the metadata in canonical JSON, then, by growing name, each tensor's name, dtype, shape and bytes.

    Args:
        tensors: any shapes and dtypes, on any device.
        metadata: everything but the seal.
    """
    import torch

    found = hashlib.sha256(_canonical(dict(metadata)))
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(_canonical([name, str(tensor.dtype), list(tensor.shape)]))
        if tensor.numel():
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def sealed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with the seal of these tensors and this metadata."""
    return {**metadata, "seal format": FORMAT, "digest": content_digest(tensors, metadata)}


def open_seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[dict[str, str], bool]:
    """The metadata without the seal, and whether there was one.

    Raises:
        DamagedError: there is a seal, and it does not fit the content.
    """
    rest = dict(metadata)
    form, digest = rest.pop("seal format", None), rest.pop("digest", None)
    if form is None and digest is None:
        return rest, False
    if form != FORMAT or digest != content_digest(tensors, rest):
        raise DamagedError("its digest does not fit its content")
    return rest, True


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
