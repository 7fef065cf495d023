"""Which processes of a run are alive, and which of them the others wait for."""

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
"""Environment variable: seconds of waiting after which a missing process is named. Default: 60."""


@dataclass(frozen=True)
class Member:
    """A process of the run: its host as shown, a hash of the machine, its id and start time there."""

    host: str
    machine: str
    pid: int
    started: str

    @classmethod
    def me(cls) -> Member:
        """This process."""
        return cls(socket.gethostname(), this_machine(), os.getpid(), start_time(os.getpid()))

    def has_ended(self) -> bool:
        """Whether it is known to have ended; false where it runs on another machine."""
        return self.machine == this_machine() and not is_running(self.pid, self.started)


class Presence:
    """Names the processes that a run waits for.

    Every process counts the exchanges that it enters, and a daemon thread of it counts its signs of life, both in a
    key-value store that the main process serves. While the main process waits in an exchange, its thread reads them,
    and after `after` seconds says which processes have not entered it. It says so again after twice that time, and so
    on. Nothing is stopped: a slow process is no lost one.

    Args:
        rank: number of this process.
        members: all processes, by rank.
        store: a `torch.distributed.Store`.
        after: seconds.
        say: takes a line.
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
        self._signs: dict[int, tuple[str, float]] = {}
        self._pulse = 0

    @classmethod
    def join(
        cls, rank: int, size: int, tell: Callable[[Any], Any], gather: Callable[[Any], list[Any]]
    ) -> Presence | None:
        """The presence of this process among the others; None where they cannot reach the main process's store."""
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
        threading.Thread(target=presence._watch, name="samplerbench-presence", daemon=True).start()
        return presence

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While this process is in an exchange."""
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
        """The ranks of processes that are known to have ended. A process's connections close just before it ends."""
        for _ in range(10):
            if gone := [rank for rank, member in enumerate(self.members) if member.has_ended()]:
                return gone
            time.sleep(0.05)
        return []

    def close(self) -> None:
        """Stop watching: from here on processes may leave."""
        self._end.set()

    def pulse(self) -> None:
        """Give a sign of life, and look for those of the others."""
        self._pulse += 1
        self.store.set(f"pulse/{self.rank}", str(self._pulse))
        for rank in range(len(self.members)):
            sign = self._read(f"pulse/{rank}")
            if sign != self._signs.get(rank, (None, 0.0))[0]:
                self._signs[rank] = (sign, time.monotonic())

    def report(self) -> None:
        """Name the processes that this one waits for, where it is due."""
        since = self._since
        if since is None or (waited := time.monotonic() - since) < self._due:
            return
        late = [rank for rank in range(len(self.members)) if int(self._read(f"entered/{rank}") or 0) < self.entered]
        if not late or self._since != since:
            return
        self._due, self._reported = 2 * waited, True
        self.say(
            f"waiting for {waited:.0f} s for "
            + "; ".join(self._describe(rank) for rank in late)
            + ". If it does not continue, end the run with Ctrl-C or by ending that process; finished cells are kept, "
            "and the same command continues."
        )

    def _describe(self, rank: int) -> str:
        member = self.members[rank]
        sign = self._signs.get(rank)
        silent = None if sign is None else time.monotonic() - sign[1]
        state = (
            "still alive" if silent is not None and silent < self.after / 2 else "no sign of life: stopped or frozen"
        )
        return f"process {rank} (pid {member.pid} on {member.host}, {state})"

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
                # Only the main process's store can fail; one of the others says so, once.
                if self._end.is_set() or self.members[0].has_ended():
                    return
                unreachable = unreachable or time.monotonic()
                if self.rank == 1 and time.monotonic() - unreachable >= self.after:
                    self.say(f"{self._describe(0)} does not answer.")
                    return
