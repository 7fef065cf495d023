"""The processes of a run: one alone, or several that `accelerate launch` has started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from samplerbench.bench.launch import start_the_others
from samplerbench.errors import SamplerbenchError, Stopped, UserError


@dataclass(frozen=True)
class Team:
    """Which process this is, and how it speaks with the others."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks, on every process."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def tell(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def agree(self, error: SamplerbenchError | Stopped | None) -> None:
        """Raise on every process what one of them met: so that one failing ends the cell for all, and none waits."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        told = None if error is None else (type(error), f"process {self.rank}: {error}")
        for found in self.gather(told):
            if found is not None:
                kind, text = found
                raise kind(text) from error

    def close(self) -> None:
        """Part in good order: nobody leaves while another still speaks."""
        if self.size > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    def share(self, first: int, last: int) -> range:
        """This process's part of the samples first … last-1."""
        count = last - first
        return range(first + self.rank * count // self.size, first + (self.rank + 1) * count // self.size)


def join_team(device: str) -> tuple[Team, str]:
    """The team this process belongs to, and the device it uses.

    Raises:
        UserError: several processes that were given one and the same GPU by name.
    """
    start_the_others()
    size = max(int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    if size == 1:
        return Team(), "cpu" if device == "auto" and os.environ.get("ACCELERATE_USE_CPU") == "True" else device
    from accelerate import PartialState

    use_cpu = device == "cpu" or os.environ.get("ACCELERATE_USE_CPU") == "True" or not torch.cuda.is_available()
    state = PartialState(cpu=use_cpu)
    if not use_cpu and device not in ("auto", "cuda"):
        raise UserError(f"--device {device}: with several processes each takes its own GPU; use --device auto.")
    return Team(state.process_index, state.num_processes), "cpu" if use_cpu else str(state.device)
