"""The processes of a run: a single one, or several that were started by `accelerate launch` or torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch

from samplerbench.bench.launch import start_the_others
from samplerbench.bench.presence import Presence
from samplerbench.errors import LostProcess, SamplerbenchError, Stopped, UserError, argument, message_of
from samplerbench.launcher import check_gpu, check_sharding, is_set, local_rank

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""Timeout of an exchange. It is long because a process may be slow. A closed connection ends the wait earlier."""


@dataclass(frozen=True)
class Team:
    """The processes of a run and their communication.

    Attributes:
        rank: Rank of this process, from 0.
        size: Number of processes.
        local_rank: Rank of this process among those on its node, from 0.
        group: Process group for exchanges. It uses gloo, because the objects are on the CPU.
        presence: Monitor of the processes, or None.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = field(default=0, compare=False)
    group: Any = field(default=None, compare=False, repr=False)
    presence: Presence | None = field(default=None, compare=False, repr=False)

    @property
    def main(self) -> bool:
        """Whether this is the main process, which prints and writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Gather the values of all processes on every process.

        Args:
            value: The value of this process.

        Returns:
            The values, in the order of the ranks.

        Raises:
            LostProcess: If another process has ended.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._exchange(lambda: torch.distributed.all_gather_object(values, value, group=self.group))
        return values

    def tell(self, value: Any) -> Any:
        """Broadcast the value of the main process.

        Args:
            value: The value. Only that of the main process is used.

        Returns:
            The value of the main process.

        Raises:
            LostProcess: If another process has ended.
        """
        if self.size == 1:
            return value
        values = [value]
        self._exchange(lambda: torch.distributed.broadcast_object_list(values, src=0, group=self.group))
        return values[0]

    def agree(self, error: SamplerbenchError | Stopped | None) -> None:
        """Raise the error of one process on all processes, so that no process waits for one that failed.

        Args:
            error: The error of this process, or None.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        reported = None if error is None else (type(error), message_of(error).after(f"process {self.rank}: "))
        for found in self.gather(reported):
            if found is not None:
                kind, text = found
                raise kind(text) from error

    def lost(self) -> list[int]:
        """Return the ranks of the processes that have ended, as far as this is known."""
        return [] if self.presence is None else self.presence.ended()

    def announces_loss(self) -> bool:
        """Return whether this process should print that a process was lost.

        This is the first process of each node that asks. It need not be the main process, because the launcher may end
        that before it notices the loss. If the main process was lost, all others print.
        """
        return self.main if self.presence is None else self.presence.is_first_of_node("announces_loss")

    def close(self) -> None:
        """Wait for all processes, then close the connections.

        Raises:
            LostProcess: If another process has ended.
        """
        if self.size > 1:
            if self.presence is not None:
                self.presence.close()
            self._exchange(lambda: torch.distributed.barrier(group=self.group))
            torch.distributed.destroy_process_group()

    def _exchange(self, operation: Callable[[], T]) -> T:
        """Perform a collective operation, in which every process waits for the others."""
        try:
            with self.presence.waiting() if self.presence is not None else nullcontext():
                return operation()
        except RuntimeError as error:
            if not _is_lost_connection(error):
                raise
            lost = [] if self.presence is None else [self.presence.name(rank) for rank in self.lost()]
            who = " and ".join(lost) or "another process"
            raise LostProcess(
                f"{who} of this run {'have' if len(lost) > 1 else 'has'} ended unexpectedly. Nothing finished is lost: "
                "run the same command again to continue."
            ) from error

    def share(self, first: int, last: int) -> range:
        """Return the share of this process in the samples first … last-1.

        Args:
            first: Index of the first sample.
            last: Index after the last sample.
        """
        count = last - first
        return range(first + self.rank * count // self.size, first + (self.rank + 1) * count // self.size)


def _is_lost_connection(error: RuntimeError) -> bool:
    """Return whether an error of torch.distributed means that another process has ended."""
    text = str(error).lower()
    words = ("connection", "gloo", "socket", "peer", "broken pipe", "timed out")
    return isinstance(error, torch.distributed.DistError) or any(word in text for word in words)


def join_team(device: str) -> tuple[Team, str]:
    """Join the processes of the run.

    Args:
        device: Name of the device, or "auto".

    Returns:
        The team, and the name of the device of this process.

    Raises:
        LaunchError: If the launcher is configured for something that is not supported.
        UserError: If a device is specified for several processes.
    """
    check_sharding()
    start_the_others()
    size = max(int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    if size == 1:
        return Team(), "cpu" if device == "auto" and is_set(os.environ, "ACCELERATE_USE_CPU") else device
    if device != "cpu":
        check_gpu(torch.cuda.is_available())
    from accelerate import PartialState

    use_cpu = device == "cpu" or is_set(os.environ, "ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    state = PartialState(cpu=use_cpu)
    if not use_cpu and device not in ("auto", "cuda"):
        raise UserError(
            f"{argument('device', device)}: with several processes, each process uses its own GPU; use "
            f"{argument('device', 'auto')}."
        )
    rank, size = state.process_index, state.num_processes
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    team = Team(rank, size, local_rank(os.environ), group)
    return replace(team, presence=Presence.join(rank, size, team.tell, team.gather)), (
        "cpu" if use_cpu else str(state.device)
    )
