"""Tensors in a plain pickle, read as data: `pickle.dump` of an object with tensors, as EDM's networks are published.

Each storage is a byte string in the format of `torch.save` before version 1.6: five pickles and the raw values.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplerbench.models.inert_pickle import Budget, Function, Instance, Name, PickleError, read_pickle

MAGIC = 0x1950A86A20F9469CFC6C
"""The first value of a file of `torch.save` before version 1.6."""
DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
"""Types of storages."""
MAX_DIMENSIONS = 8
SCALARS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I", "b1": "?"}
"""The format of `struct` for each type of a NumPy scalar."""


@dataclass(frozen=True)
class _Place:
    """A storage that a nested pickle refers to: its key, type and number of values."""

    key: str
    dtype: torch.dtype
    count: int


def _refuse(*_: Any) -> Any:
    raise PickleError("it calls a class of storages")


def inert(name: str) -> Function:
    """Return the function that replaces a class: it keeps the arguments, and creates an `Instance`.

    Args:
        name: name of the class.
    """
    return lambda *arguments: Instance(name, arguments)


def tensor_functions(budget: Budget) -> Mapping[str, Function]:
    """Return the functions for `read_pickle` that make tensors, NumPy scalars and dictionaries.

    Args:
        budget: number of opcodes that may be read in all storages.
    """
    return {
        "collections.OrderedDict": _dictionary,
        "torch._utils._rebuild_tensor_v2": rebuild_tensor,
        "torch._utils._rebuild_parameter": _parameter,
        "torch.storage._load_from_bytes": lambda data: read_storage(data, budget),
        "torch.Size": lambda *sizes: tuple(sizes[0]) if sizes else (),
        "torch.device": inert("torch.device"),
        "numpy.dtype": inert("numpy.dtype"),
        "numpy.ndarray": inert("numpy.ndarray"),
        **{
            f"numpy.{core}.multiarray.{name}": function
            for core in ("core", "_core")
            for name, function in (("scalar", _scalar), ("_reconstruct", lambda *_: Instance("numpy.ndarray")))
        },
    }


def _dictionary(*arguments: Any) -> dict[Any, Any]:
    if arguments:
        raise PickleError("it creates a dictionary with arguments")
    return {}


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise PickleError("it has a parameter that is not a tensor")
    return data


def _scalar(dtype: Any, data: Any) -> float | int | bool:
    """The value of a NumPy scalar, of its type and its little-endian bytes."""
    code = dtype.arguments[0] if isinstance(dtype, Instance) and dtype.arguments else None
    if code not in SCALARS or not isinstance(data, bytes):
        raise PickleError("it has a NumPy scalar of a type that is not supported")
    value: float | int | bool = struct.unpack(f"<{SCALARS[code]}", data)[0]
    return value


def read_storage(data: Any, budget: Budget) -> Tensor:
    """Read a storage in the format of `torch.save` before version 1.6.

    Args:
        data: the bytes.
        budget: number of opcodes that may be read.

    Returns:
        The values, (count,), which share the memory of `data`.

    Raises:
        PickleError: if the bytes are damaged, or contain anything but one storage.
    """
    if not isinstance(data, bytes):
        raise PickleError("a storage is not a byte string")
    stream = io.BytesIO(data)
    names = dict.fromkeys(DTYPES, _refuse)
    head = [read_pickle(stream, {}, budget) for _ in range(3)]
    place = read_pickle(stream, names, budget, _place)
    keys = read_pickle(stream, {}, budget)
    if head[:2] != [MAGIC, 1001] or not isinstance(head[2], dict) or head[2].get("little_endian") is not True:
        raise PickleError("a storage is not in the format of torch.save")
    if not isinstance(place, _Place) or keys != [place.key]:
        raise PickleError("a storage contains something else")
    start = stream.tell() + 8
    size = place.count * place.dtype.itemsize
    if len(data) - start != size or struct.unpack("<q", data[start - 8 : start])[0] != place.count:
        raise PickleError("a storage is truncated or damaged")
    if not place.count:
        return torch.empty(0, dtype=place.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the memory is read-only, and nothing writes to it
        return torch.frombuffer(data, dtype=place.dtype, count=place.count, offset=start)


def _place(reference: Any) -> _Place:
    if not isinstance(reference, tuple) or len(reference) != 6:
        raise PickleError("a storage is not in the format of torch.save")
    word, kind, key, _, count, view = reference
    if word != "storage" or not isinstance(kind, Name) or not isinstance(key, str) or view is not None:
        raise PickleError("a storage is not in the format of torch.save")
    if type(count) is not int or count < 0:
        raise PickleError("a storage has no valid size")
    return _Place(key, DTYPES[kind.text], count)


def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """Make the tensor of a storage, a view of it.

    Args:
        storage: values, (count,).
        offset: index of the first value.
        size: shape of the tensor.
        stride: distance of neighbouring values in each dimension, those of a contiguous tensor.

    Raises:
        PickleError: if the tensor is not contiguous, or not inside the storage.
    """
    if not isinstance(storage, Tensor) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise PickleError("a tensor is damaged")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in numbers):
        raise PickleError("a tensor has no valid shape")
    count = 1
    for length, step in zip(size[::-1], stride[::-1], strict=True):
        if length > 1 and step != count:
            raise PickleError("a tensor is not contiguous")
        count *= length
    if storage.ndim != 1 or offset + count > len(storage):
        raise PickleError("a tensor is larger than its storage")
    return storage[offset : offset + count].reshape(size)
