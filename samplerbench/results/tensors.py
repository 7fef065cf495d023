"""Safetensors files whose metadata contain a digest of the content."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from samplerbench.errors import RunError
from samplerbench.results.files import atomic_file, read_regular
from samplerbench.tensor_seal import DamagedError, open_seal, sealed


@dataclass(frozen=True)
class TensorFile:
    """The content of a file.

    Attributes:
        tensors: the tensors by name.
        metadata: the metadata, without the digest.
        sealed: whether the file has a digest. If so, it was verified.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sealed: bool


def save_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors with a digest, atomically.

    Raises:
        UserError: the folder cannot be written to.
        RunError: tensors that share memory.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    own = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with atomic_file(file) as temporary:
        try:
            save_file(own, temporary, sealed(own, metadata))
        except SafetensorError as error:  # a full disk, among others
            raise OSError(str(error)) from None
        except RuntimeError as error:  # tensors that share memory
            raise RunError(f"the tensors cannot be saved: {str(error).strip().splitlines()[0]}") from None


def load_tensors(file: Path) -> TensorFile:
    """Read a file of tensors, and verify its digest if it has one.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedError: not a regular file, not safetensors, or another content than the digest's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = read_regular(file)
        tensors = load(data)
        metadata = _metadata(data)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedError(f"it cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise DamagedError(f"it is not a complete safetensors file: {str(error) or type(error).__name__}") from None
    return TensorFile(tensors, *open_seal(tensors, metadata))


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata in the JSON header. The first eight bytes of the file are the length of the header."""
    (length,) = struct.unpack("<Q", data[:8])
    found = json.loads(data[8 : 8 + length].decode("utf-8")).get("__metadata__") or {}
    if not all(isinstance(value, str) for value in found.values()):
        raise ValueError("its metadata are no text")
    return dict(found)
