"""Checkpoints of unfinished cells."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from samplerbench.results.tensors import load_tensors, save_tensors
from samplerbench.sampling.cost import Cost, Seconds
from samplerbench.tensor_seal import DamagedError

PARTIAL = ".partial.safetensors"
"""Suffix of checkpoint files."""

FORMAT = "2"
"""Version of the checkpoint format. Checkpoints of other versions are not read, and their cells restart."""


@dataclass
class Progress:
    """The progress of a cell.

    Attributes:
        block: index of the current seed block.
        done: number of images of this block in the accumulators.
        results: for each finished block, one dictionary per metric.
        cost: evaluated rows so far, over all processes.
        seconds: time so far, of the main process.
        resumed: how many times the cell was resumed.
        conditions: conditions of the timing (`samplerbench.results.timings`); {} at the start.
        mixed: whether parts were timed under different conditions, so that there is no valid timing.
    """

    block: int = 0
    done: int = 0
    results: list[list[dict[str, Any]]] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    seconds: Seconds = field(default_factory=Seconds)
    resumed: int = 0
    conditions: dict[str, Any] = field(default_factory=dict)
    mixed: bool = False


@dataclass(frozen=True)
class Extent:
    """The sizes that a checkpoint of a cell must match.

    Attributes:
        metrics: number of metrics.
        n: images per block.
        blocks: number of seed blocks.
        image_shape: (C, H, W) of the images.
        keep: maximum number of images of the sample grid.
    """

    metrics: int
    n: int
    blocks: int
    image_shape: tuple[int, ...]
    keep: int


@dataclass(frozen=True)
class Partial:
    """A checkpoint.

    Attributes:
        progress: progress of the cell.
        states: state of the accumulator of each metric.
        shown: (k, C, H, W) uint8, images of the sample grid.
    """

    progress: Progress
    states: list[dict[str, Tensor]]
    shown: Tensor


def save_partial(file: Path, key: str, progress: Progress, states: list[dict[str, Tensor]], shown: Tensor) -> None:
    """Write a checkpoint atomically, as safetensors with a digest.

    Args:
        file: file to write.
        key: protocol hash of the cell.
        progress: progress of the cell.
        states: state of the accumulator of each metric.
        shown: (k, C, H, W) uint8, images of the sample grid.

    Raises:
        UserError: the folder cannot be written to.
    """
    tensors = {f"{i}.{name}": t for i, state in enumerate(states) for name, t in state.items()}
    metadata = {"format": FORMAT, "key": key, "progress": json.dumps(asdict(progress))}
    save_tensors(file, {**tensors, "shown": shown}, metadata)


def load_partial(file: Path, key: str, extent: Extent) -> Partial | None:
    """Load a checkpoint; None if the file does not exist.

    Args:
        file: file written by `save_partial`.
        key: protocol hash of the cell.
        extent: sizes that the checkpoint must match.

    Raises:
        DamagedError: the file was changed, belongs to another cell, or does not match the extent.
    """
    try:
        found = load_tensors(file)
    except FileNotFoundError:
        return None
    metadata, tensors = found.metadata, dict(found.tensors)
    if not found.sealed or metadata.get("format") != FORMAT:
        raise DamagedError("it has no digest, or is of another format")
    if metadata.get("key") != key:
        raise DamagedError("it is of another cell")
    progress = _progress(metadata.get("progress", ""), extent)
    shown = tensors.pop("shown", None)
    if shown is None or str(shown.dtype) != "torch.uint8" or tuple(shown.shape[1:]) != extent.image_shape:
        raise DamagedError("its images are of another shape")
    if len(shown) > extent.keep:
        raise DamagedError(f"it has {len(shown)} images, more than the {extent.keep} of a grid")
    states: list[dict[str, Tensor]] = [{} for _ in range(extent.metrics)]
    for name, tensor in tensors.items():
        number, _, inner = name.partition(".")
        if not (number.isascii() and number.isdigit() and len(number) < 9 and int(number) < extent.metrics and inner):
            raise DamagedError(f"there is no metric for its tensor {name[:40]!r}")
        states[int(number)][inner] = tensor
    return Partial(progress, states, shown)


def _progress(text: str, extent: Extent) -> Progress:
    """Parse the progress, and check every field. Raises DamagedError."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise DamagedError("its progress cannot be read") from None
    if not isinstance(found, dict) or found.keys() != {f.name for f in fields(Progress)}:
        raise DamagedError("its progress has other fields")
    for name, most in (("block", extent.blocks - 1), ("done", extent.n - 1), ("resumed", 10**9)):
        if type(found[name]) is not int or not 0 <= found[name] <= most:
            raise DamagedError(f"its {name} is out of range")
    if type(found["mixed"]) is not bool or not isinstance(found["conditions"], dict):
        raise DamagedError("its conditions are no conditions")
    results = found["results"]
    if not isinstance(results, list) or len(results) != found["block"]:
        raise DamagedError(f"it does not have the results of {found['block']} finished blocks")
    for block in results:
        if not isinstance(block, list) or len(block) != extent.metrics or not all(map(_is_result, block)):
            raise DamagedError("a result in it is invalid")
    cost = _numbers(found["cost"], Cost)
    if not all(type(value) is int for value in cost.values()):
        raise DamagedError("its cost is not a number of rows")
    found |= {"cost": Cost(**cost), "seconds": Seconds(**_numbers(found["seconds"], Seconds))}
    return Progress(**found)


def _is_result(found: Any) -> bool:
    """Whether a value is `{}`, or a dictionary with a number as "value"."""
    return isinstance(found, dict) and (not found or type(found.get("value")) in (int, float))


def _numbers(found: Any, kind: type[Cost] | type[Seconds]) -> Mapping[str, Any]:
    """Check the fields of a Cost or Seconds: finite non-negative numbers. Raises DamagedError."""
    if not isinstance(found, dict) or found.keys() != {f.name for f in fields(kind)}:
        raise DamagedError(f"its {kind.__name__.lower()} has other fields")
    for value in found.values():
        if type(value) not in (int, float) or not 0 <= value < 10**18 or not math.isfinite(value):
            raise DamagedError(f"its {kind.__name__.lower()} is out of range")
    return found
