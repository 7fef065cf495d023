"""The processes of a run: one alone, or several that `accelerate launch` has started."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch

from samplerbench.bench.launch import start_the_others
from samplerbench.bench.presence import Presence
from samplerbench.errors import LostProcess, SamplerbenchError, Stopped, UserError, argument, message_of

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long a process waits in an exchange. A slow process is no lost one: what ends a wait is a closed connection."""


@dataclass(frozen=True)
class Team:
    """Which process this is, and how it speaks with the others.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        group: their process group for exchanges (gloo: objects stay on the CPU).
        presence: which of them are alive and how far they are; None where that is not known.
    """

    rank: int = 0
    size: int = 1
    group: Any = field(default=None, compare=False, repr=False)
    presence: Presence | None = field(default=None, compare=False, repr=False)

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks, on every process. Raises LostProcess."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._exchange(lambda: torch.distributed.all_gather_object(values, value, group=self.group))
        return values

    def tell(self, value: Any) -> Any:
        """The main process's value, on every process. Raises LostProcess."""
        if self.size == 1:
            return value
        values = [value]
        self._exchange(lambda: torch.distributed.broadcast_object_list(values, src=0, group=self.group))
        return values[0]

    def agree(self, error: SamplerbenchError | Stopped | None) -> None:
        """Raise on every process what one of them met: so that one failing ends the cell for all, and none waits."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        told = None if error is None else (type(error), message_of(error).after(f"process {self.rank}: "))
        for found in self.gather(told):
            if found is not None:
                kind, text = found
                raise kind(text) from error

    def lost(self) -> list[int]:
        """The ranks of the processes that are known to have ended."""
        return [] if self.presence is None else self.presence.ended()

    def close(self) -> None:
        """Part in good order: nobody leaves while another still speaks. Raises LostProcess."""
        if self.size > 1:
            if self.presence is not None:
                self.presence.close()
            self._exchange(lambda: torch.distributed.barrier(group=self.group))
            torch.distributed.destroy_process_group()

    def _exchange(self, operation: Callable[[], T]) -> T:
        """A collective operation, in which every process waits for the others."""
        try:
            with self.presence.waiting() if self.presence is not None else nullcontext():
                return operation()
        except RuntimeError as error:
            if not _is_lost_connection(error):
                raise
            lost = self.lost()
            who = f"process {' and '.join(map(str, lost))}" if lost else "another process"
            raise LostProcess(
                f"{who} of this run has ended unexpectedly. Nothing finished is lost: run the same command again to "
                "continue."
            ) from error

    def share(self, first: int, last: int) -> range:
        """This process's part of the samples first … last-1."""
        count = last - first
        return range(first + self.rank * count // self.size, first + (self.rank + 1) * count // self.size)


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether torch.distributed raised an error because another process is not there."""
    text = str(error).lower()
    words = ("connection", "gloo", "socket", "peer", "broken pipe", "timed out")
    return isinstance(error, torch.distributed.DistError) or any(word in text for word in words)


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
        raise UserError(
            f"{argument('device', device)}: with several processes each takes its own GPU; use "
            f"{argument('device', 'auto')}."
        )
    rank, size = state.process_index, state.num_processes
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    team = Team(rank, size, group)
    return Team(rank, size, group, Presence.join(rank, size, team.tell, team.gather)), (
        "cpu" if use_cpu else str(state.device)
    )
