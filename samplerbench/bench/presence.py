"""Monitoring of the processes of a distributed run."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from samplerbench.results.claims import is_running, start_time, this_machine
from samplerbench.text import note

REPORT_AFTER = "SAMPLERBENCH_REPORT_AFTER"
"""Environment variable: seconds of waiting after which missing processes are reported. Default: 60."""


@dataclass(frozen=True)
class Member:
    """A process of the run.

    Attributes:
        host: Host name, for messages.
        machine: Hash that identifies the machine.
        pid: Process id.
        started: Start time of the process. It distinguishes the process from a later one with the same id.
    """

    host: str
    machine: str
    pid: int
    started: str

    @classmethod
    def me(cls) -> Member:
        """Return the member for this process."""
        return cls(socket.gethostname(), this_machine(), os.getpid(), start_time(os.getpid()))

    def has_ended(self) -> bool:
        """Return whether the process has ended. False if it runs on another machine."""
        return self.machine == this_machine() and not is_running(self.pid, self.started)


class Presence:
    """Reports the processes that a run waits for.

    The main process serves a key-value store. Every process writes two counters to it: the number of exchanges that it
    has entered, and a heartbeat that a daemon thread increments. While the main process waits in an exchange, its
    thread reads the counters. After `after` seconds it reports the processes that have not entered the exchange, or, if
    all have, those without a heartbeat. The time until the next report doubles each time. No process is stopped,
    because a process may only be slow.

    Args:
        rank: Rank of this process.
        members: All processes, by rank.
        store: A `torch.distributed.Store`.
        after: Waiting time before the first report, in seconds.
        say: Function that prints a line.
    """

    def __init__(
        self, rank: int, members: Sequence[Member], store: Any, after: float, say: Callable[[str], None]
    ) -> None:
        self.rank, self.members, self.store, self.after, self.say = rank, list(members), store, after, say
        self.entered = 0
        self._since: float | None = None
        self._due = after
        self._reported = False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._signs: dict[int, tuple[str, float]] = {}
        self._pulse = 0

    @classmethod
    def join(
        cls, rank: int, size: int, tell: Callable[[Any], Any], gather: Callable[[Any], list[Any]]
    ) -> Presence | None:
        """Start monitoring on all processes.

        Args:
            rank: Rank of this process.
            size: Number of processes.
            tell: Broadcasts a value of the main process.
            gather: Gathers the values of all processes.

        Returns:
            The monitor, or None if a process cannot connect to the store of the main process.
        """
        members = gather(Member.me())
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        store, timeout = None, timedelta(seconds=20)
        if rank == 0:
            with suppress(RuntimeError, ValueError):
                store = torch.distributed.TCPStore(host, 0, None, True, timeout, wait_for_workers=False)
        port = tell(None if store is None else store.port)
        if port is None:
            return None
        if rank > 0:
            with suppress(RuntimeError, ValueError):
                store = torch.distributed.TCPStore(host, port, None, False, timeout, wait_for_workers=False)
        if not all(gather(store is not None)):
            return None
        presence = cls(rank, members, store, float(os.environ.get(REPORT_AFTER, "60")), note)
        presence._thread = threading.Thread(target=presence._watch, name="samplerbench-presence", daemon=True)
        presence._thread.start()
        return presence

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context manager for the time in which this process is in an exchange."""
        self.entered += 1
        with suppress(RuntimeError):
            self.store.set(f"entered/{self.rank}", str(self.entered))
        self._due, self._since = self.after, time.monotonic()
        try:
            yield
        finally:
            self._since = None
        if self._reported:
            self._reported = False
            self.say("all processes have answered; the run continues.")

    def ended(self) -> list[int]:
        """Return the ranks of processes that have ended.

        A process can only see those on its own machine. It therefore writes what it finds to the store, for the
        processes on other machines. The connections of a process close shortly before it ends, so this method retries
        for half a second.
        """
        for _ in range(10):
            if gone := [rank for rank, member in enumerate(self.members) if member.has_ended()]:
                with suppress(RuntimeError):
                    self.store.set("ended", ",".join(map(str, gone)))
                return gone
            with suppress(RuntimeError):
                if written := self._read("ended"):
                    return [int(rank) for rank in written.split(",")]
            time.sleep(0.05)
        return []

    def is_first_of_node(self, key: str) -> bool:
        """Return whether this process is the first one of its node that calls this method with this key.

        Args:
            key: Name of what is done once per node.

        Returns:
            Whether this process is the first. True if the store of the main process is not reachable.
        """
        node = os.environ.get("GROUP_RANK", self.members[self.rank].host)  # GROUP_RANK is the node's rank in torchrun
        try:
            return bool(self.store.add(f"{key}/{node}", 1) == 1)
        except RuntimeError:
            return True

    def name(self, rank: int) -> str:
        """Return a process with its process id and host, for messages: `process 3 (pid 71 on node-b)`.

        Args:
            rank: Rank of the process.
        """
        member = self.members[rank]
        return f"process {rank} (pid {member.pid} on {member.host})"

    def close(self) -> None:
        """Stop monitoring. After this call, processes may end.

        The thread is awaited, because a process must not exit while it is inside a call of the store.
        """
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def pulse(self) -> None:
        """Increment the heartbeat of this process and read those of the others."""
        self._pulse += 1
        self.store.set(f"pulse/{self.rank}", str(self._pulse))
        for rank in range(len(self.members)):
            sign = self._read(f"pulse/{rank}")
            if sign != self._signs.get(rank, (None, 0.0))[0]:
                self._signs[rank] = (sign, time.monotonic())

    def report(self) -> None:
        """Report the processes that this one waits for, if a report is due."""
        since = self._since
        if since is None or (waited := time.monotonic() - since) < self._due:
            return
        late = [rank for rank in range(len(self.members)) if int(self._read(f"entered/{rank}") or 0) < self.entered]
        if not late:  # a process may be stopped within the exchange
            late = [rank for rank in range(len(self.members)) if self._is_silent(rank)]
        if not late or self._since != since:
            return
        self._due, self._reported = 2 * waited, True
        self.say(
            f"waiting for {waited:.0f} s for "
            + "; ".join(self._describe(rank) for rank in late)
            + ". If it does not continue, stop the run with Ctrl-C or end that process. Finished cells are kept. Run "
            "the same command again to resume."
        )

    def _describe(self, rank: int) -> str:
        member = self.members[rank]
        state = "no sign of life: stopped or frozen" if self._is_silent(rank) else "still alive"
        return f"process {rank} (pid {member.pid} on {member.host}, {state})"

    def _is_silent(self, rank: int) -> bool:
        """Return whether a process has sent no heartbeat recently."""
        sign = self._signs.get(rank)
        return sign is None or time.monotonic() - sign[1] >= self.after / 2

    def _read(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _watch(self) -> None:
        unreachable: float | None = None
        while not self._end.wait(min(5.0, self.after / 6)):
            try:
                self.pulse()
                unreachable = None
                if self.rank == 0:
                    self.report()
            except RuntimeError:
                # The store of the main process is not reachable. Only rank 1 reports this, once.
                if self._end.is_set() or self.members[0].has_ended():
                    return
                unreachable = unreachable or time.monotonic()
                if self.rank == 1 and time.monotonic() - unreachable >= self.after:
                    self.say(f"{self._describe(0)} does not answer.")
                    return
