"""What a cell that is not finished yet keeps on disk, so that a killed run loses little."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from samplerbench.results.files import write_atomically
from samplerbench.sampling.cost import Cost, Seconds

PARTIAL = ".partial.safetensors"
"""What follows the key in a checkpoint's name."""


@dataclass
class Progress:
    """How far a cell is.

    Attributes:
        block: the seed block at work.
        done: how many of its images are in the accumulators.
        results: of the finished blocks, one dictionary for each metric.
        cost: rows counted so far, over all processes.
        seconds: time so far, of the main process.
        resumed: how often the cell was resumed.
    """

    block: int = 0
    done: int = 0
    results: list[list[dict[str, Any]]] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    seconds: Seconds = field(default_factory=Seconds)
    resumed: int = 0


def save_partial(file: Path, progress: Progress, states: list[dict[str, Tensor]], shown: Tensor) -> None:
    """Write progress, the accumulators' states and the images of the grid, atomically, as safetensors."""
    from safetensors.torch import save

    tensors = {f"{i}.{name}": t.contiguous() for i, state in enumerate(states) for name, t in state.items()}
    data = save({**tensors, "shown": shown.contiguous()}, {"progress": json.dumps(asdict(progress))})
    write_atomically(file, data)


def load_partial(file: Path, metrics: int) -> tuple[Progress, list[dict[str, Tensor]], Tensor] | None:
    """What `save_partial` wrote; None where there is nothing, or it is damaged (then the cell starts anew)."""
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        return None
    try:
        with safe_open(str(file), "pt") as handle:
            known = json.loads(handle.metadata()["progress"])
            known |= {"cost": Cost(**known["cost"]), "seconds": Seconds(**known["seconds"])}
            progress = Progress(**known)
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
        shown = tensors.pop("shown")
        states: list[dict[str, Tensor]] = [{} for _ in range(metrics)]
        for key, tensor in tensors.items():
            i, _, name = key.partition(".")
            states[int(i)][name] = tensor
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError):
        return None
    return progress, states, shown
