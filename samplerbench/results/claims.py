"""Leases: assign cells to runs with one lease file per cell, renewed by its owner.

A lease file is created atomically with a hard link, which fails if the file exists. It therefore needs no operating
system locks, and works on network file systems. The owner renews the time stamp of the file. If a lease is not renewed
for `Timing.stale` seconds, or its process has ended on this machine, the next run that needs the cell takes it over.

A process that was suspended for longer loses its lease (`Lease.check`) and leaves the cell to the new owner. Between
this check and the write of a result, both processes may write. This is safe, because a result is a function of its
protocol, so both write the same numbers, and each write is atomic.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shlex
import socket
import stat
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from samplerbench import portable
from samplerbench.errors import RunError, SamplerbenchError, UserError
from samplerbench.portable import remove_file, retry
from samplerbench.results.files import error_numbers, write_error
from samplerbench.text import printable

MAX_LEASE_BYTES = 64 * 1024
NO_LINKS = error_numbers("EPERM", "EACCES", "ENOSYS", "EINVAL", "EMLINK", "EOPNOTSUPP", "ENOTSUP")
"""Errors of `os.link` on a file system without hard links."""


class ClaimLost(RunError):  # noqa: N818 - not a failure of the cell
    """Another run took the cell over, because this run did not renew its lease in time."""


class Claimed(Exception):  # noqa: N818 - not an error
    """Another run works on the cell."""


@dataclass(frozen=True)
class Timing:
    """Time limits of a lease.

    Attributes:
        beat: seconds between two renewals.
        stale: seconds without a renewal, by the clock of the file system, after which a lease expires.
        observe: seconds without a renewal that this process must observe itself before it takes over an expired lease.
            After a machine wakes up, or a clock is set, a running owner renews its lease within this time.
        poll: maximum seconds between two attempts.
        notice: seconds between two messages while waiting.
    """

    beat: float = 10.0
    stale: float = 60.0
    observe: float = 15.0
    poll: float = 1.0
    notice: float = 60.0


DEFAULT = Timing()


@dataclass(frozen=True)
class Owner:
    """The owner of a lease.

    Attributes:
        token: random unique identifier of the lease.
        host: name of the machine.
        machine: hash that identifies the machine, its boot and the process namespace.
        pid: process id.
        started: start time of the process, to detect a reused process id; "" if unknown.
        command: the command line.
        since: time of the claim, ISO 8601, UTC.
    """

    token: str
    host: str
    machine: str
    pid: int
    started: str
    command: str
    since: str

    @classmethod
    def me(cls) -> Owner:
        """This process, with a new token."""
        name = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
        words = ["samplerbench" if name in ("__main__.py", "samplerbench.exe") else name, *sys.argv[1:]]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        pid = os.getpid()
        return cls(
            uuid.uuid4().hex, socket.gethostname(), this_machine(), pid, start_time(pid), shlex.join(words)[:2000], now
        )

    @classmethod
    def read(cls, data: bytes) -> Owner | None:
        """Parse the content of a lease file; None if it is invalid."""
        try:
            content = json.loads(data)
            owner = cls(**content)
        except (ValueError, TypeError, RecursionError):
            return None
        texts = [getattr(owner, f.name) for f in fields(cls) if f.name != "pid"]
        if not all(isinstance(text, str) for text in texts) or type(owner.pid) is not int:
            return None
        plain = owner.token.isascii() and owner.token.isalnum() and len(owner.token) <= 64
        return owner if plain and 0 < owner.pid < 2**31 else None

    def __str__(self) -> str:
        host, command, since = (printable(text) for text in (self.host[:64], self.command[:200], self.since[:32]))
        return f"process {self.pid} on {host}, since {since.replace('T', ' ').replace('+00:00', ' UTC')}: {command}"

    def is_alive(self) -> bool | None:
        """Whether the process is running; None if it belongs to another machine."""
        if self.machine != this_machine():
            return None
        return is_running(self.pid, self.started)


@functools.cache
def this_machine() -> str:
    """A hash of the host, its boot and the process namespace, within which a process id is unique."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip())
    except (OSError, ValueError):
        parts.append(str(uuid.getnode()))
    with contextlib.suppress(OSError, NotImplementedError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def start_time(pid: int) -> str:
    """The start time of a process, independent of the system clock if possible; "" if unknown."""
    return _status(pid)[1]


def is_running(pid: int, started: str) -> bool:
    """Whether the process with this id and start time is running. A zombie process is not."""
    import psutil

    if not psutil.pid_exists(pid):
        return False
    state, now = _status(pid)
    return state not in ("Z", "X") and not (started and now and started != now)


def _status(pid: int) -> tuple[str, str]:
    """The state and start time of a process; "" if unknown."""
    import psutil

    # Linux: clock ticks since boot. psutil's time since 1970 changes when the system clock is set.
    with contextlib.suppress(OSError, IndexError):
        content = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
        words = content.rpartition(")")[2].split()
        return words[0], f"ticks {words[19]}"
    with contextlib.suppress(psutil.Error, OSError):
        process = psutil.Process(pid)
        state = "Z" if process.status() == psutil.STATUS_ZOMBIE else "R"
        return state, f"{process.create_time():.1f}"
    return "", ""


@dataclass(frozen=True)
class _Seen:
    """A lease file that was read: its owner (None if the content is invalid) and its time stamp in ns."""

    owner: Owner | None
    mtime: int

    @property
    def identity(self) -> str:
        return self.owner.token if self.owner is not None else f"unreadable{self.mtime}"


class Claims:
    """The leases in a folder.

        lease = Claims(folder).take(key)
        if lease is None:  # another run holds it
            print(Claims(folder).holder(key))

    Args:
        folder: folder of the lease files; created when needed.
        timing: time limits.
    """

    def __init__(self, folder: Path, timing: Timing = DEFAULT) -> None:
        self.folder, self.timing = folder, timing
        self._observed: dict[str, tuple[tuple[str, int], float]] = {}

    def take(self, key: str) -> Lease | None:
        """Claim a cell; None if another process holds it. Does not wait.

        Raises:
            SamplerbenchError: the folder cannot be written to.
        """
        file = self._file(key)
        try:
            self._make_folder()
            seen = self._read(file)
            if seen is None:
                return self._create(file)
            reason = self._gone(file, seen)
            return None if reason is None else self._take_over(file, seen, reason)
        except OSError as error:
            raise write_error(self.folder, error) from None

    def holder(self, key: str) -> Owner | None:
        """The owner of a cell; None if it is free, or if the lease cannot be read."""
        try:
            seen = self._read(self._file(key))
        except (OSError, SamplerbenchError):
            return None
        return None if seen is None else seen.owner

    def _file(self, key: str) -> Path:
        return self.folder / f"{key[:20]}.lease"

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.folder.is_symlink():
            raise UserError(f"{self.folder} is a symbolic link; remove it.")

    def _read(self, file: Path) -> _Seen | None:
        """Read a lease file; None if it does not exist. Opening it makes NFS fetch the current time stamp."""
        flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
        try:
            handle = retry(lambda: os.open(file, flags))
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.EACCES and file.is_file() and not file.is_symlink():
                return _Seen(None, file.stat().st_mtime_ns)  # a file of another user that cannot be read
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EMLINK, errno.EACCES):
                raise UserError(f"{file} is not a regular file; remove it.") from None
            raise
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{file} is not a regular file; remove it.")
            return _Seen(Owner.read(os.read(handle, MAX_LEASE_BYTES)), status.st_mtime_ns)
        finally:
            os.close(handle)

    def _gone(self, file: Path, seen: _Seen) -> str | None:
        """Why a lease has expired; None if it is valid."""
        if seen.owner is not None and seen.owner.is_alive() is False:
            return "has ended"
        fingerprint = (seen.identity, seen.mtime)
        before, first = self._observed.get(file.name, (None, 0.0))
        if before != fingerprint:
            first = time.monotonic()
            self._observed[file.name] = (fingerprint, first)
        age, unchanged = (self._clock() - seen.mtime) / 1e9, time.monotonic() - first
        # The second condition handles time stamps in the future, after the file system's clock was set back.
        if (age > self.timing.stale and unchanged >= self.timing.observe) or unchanged > self.timing.stale:
            return f"has given no sign of life for {max(age, unchanged):.0f} s"
        return None

    def _clock(self) -> int:
        """The current time in ns, by the clock of the file system. The clocks of hosts may differ."""
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=".clock-")
        try:
            os.write(handle, b"0")
            return os.fstat(handle).st_mtime_ns
        finally:
            os.close(handle)
            remove_file(name)

    def _create(self, file: Path, before: Owner | None = None, reason: str | None = None) -> Lease | None:
        """Create the lease file; None if it exists."""
        owner = Owner.me()
        data = json.dumps(asdict(owner)).encode()
        temporary = file.with_name(f".{file.stem}.{owner.token}.tmp")
        try:
            _write_new(temporary, data)
            # The link appears with its complete content, and only if the file did not exist.
            try:
                os.link(temporary, file)
            except OSError as error:
                if error.errno in NO_LINKS:
                    _write_new(file, data)
                else:
                    seen = self._read(
                        file
                    )  # NFS may report a failure although it created the link, if a reply was lost
                    if seen is None or seen.identity != owner.token:
                        raise
        except FileExistsError:
            return None
        finally:
            remove_file(temporary)
        return Lease(self, file, owner, before, reason)

    def _take_over(self, file: Path, seen: _Seen, reason: str) -> Lease | None:
        """Replace an expired lease by a new one; None if another process was faster.

        Only one process at a time replaces a lease: it creates a marker named after the token of the lease, checks that
        the lease has not changed, removes it, and creates its own.
        """
        marker = file.with_name(f"{file.stem}.{seen.identity}.takeover")
        try:
            _write_new(marker, b"")
        except FileExistsError:
            # A process that was killed below leaves its marker.
            with contextlib.suppress(FileNotFoundError):
                if (self._clock() - marker.stat().st_mtime_ns) / 1e9 > self.timing.stale:
                    remove_file(marker)
            return None
        try:
            if self._read(file) != seen or not self._remove(file, seen.identity):
                return None
            return self._create(file, seen.owner, reason)
        finally:
            remove_file(marker)

    def _remove(self, file: Path, identity: str) -> bool:
        """Remove a lease if it has this identity. It is renamed before the check, so that no other lease is removed."""
        aside = file.with_name(f".{file.stem}.{uuid.uuid4().hex}.gone")
        try:
            os.rename(file, aside)
        except FileNotFoundError:
            return False
        except PermissionError:
            if not portable.WINDOWS:
                raise
            return False  # Windows cannot rename a file that another process is reading
        seen = self._read(aside)
        meant = seen is not None and seen.identity == identity
        if not meant:
            with contextlib.suppress(FileExistsError):
                try:
                    os.link(aside, file)
                except OSError as error:
                    if error.errno not in NO_LINKS:
                        raise
                    _write_new(file, aside.read_bytes())
        remove_file(aside)
        return meant


class Lease:
    """A cell that this process holds. A daemon thread renews the lease until it is released or lost.

    Attributes:
        owner: this process.
        before: owner of the lease that it replaced; None if the cell was free.
        reason: why the previous lease expired.
    """

    def __init__(self, claims: Claims, file: Path, owner: Owner, before: Owner | None, reason: str | None) -> None:
        self.claims, self.file, self.owner, self.before, self.reason = claims, file, owner, before, reason
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="samplerbench-lease", daemon=True)
        self._thread.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def is_held(self) -> bool:
        """Whether the lease file is this process's. True where the file cannot be read: then a write fails too."""
        try:
            seen = self.claims._read(self.file)
        except (OSError, SamplerbenchError):
            return True
        return seen is not None and seen.identity == self.owner.token

    def check(self) -> None:
        """Raise ClaimLost where another run has taken the cell over; to be called before anything is written."""
        if not self.is_held():
            holder = self.claims.holder(self.file.stem)
            raise ClaimLost(
                f"this run did not renew its claim for {self.claims.timing.stale:.0f} s (it was suspended, or the "
                "folder could not be reached), and another run took the cell over" + (f": {holder}" if holder else "")
            )

    def release(self) -> None:
        """Give the cell back. A lease that another run has taken over stays."""
        self._end.set()
        for _ in range(20):
            with contextlib.suppress(OSError, SamplerbenchError):
                if not self.is_held() or self.claims._remove(self.file, self.owner.token):
                    return
            time.sleep(0.05)

    def _renew(self) -> None:
        while not self._end.wait(self.claims.timing.beat):
            if not self.is_held():
                return
            with contextlib.suppress(OSError):
                os.utime(self.file)


class Waiting:
    """What is said while a run waits for another: who holds the cell, once and then every minute.

    Args:
        say: takes a line.
        title: of the cell.
        timing: how often.
    """

    def __init__(self, say: Callable[[str], None], title: str, timing: Timing = DEFAULT) -> None:
        self.say, self.title, self.timing = say, title, timing
        self._holder: Owner | None = None
        self._begun: float | None = None
        self._said = self._delay = 0.0

    def pause(self, holder: Owner | None) -> float:
        """Say what is due; the seconds until the next attempt."""
        now = time.monotonic()
        who = str(holder) if holder is not None else "a process whose claim cannot be read"
        token = None if holder is None else holder.token
        if self._begun is None or token != (None if self._holder is None else self._holder.token):
            self._begun = self._said = now
            self._holder = holder
            self.say(f"{self.title}: waiting for another run that works on this cell ({who}). Ctrl-C stops waiting.")
        elif now - self._said >= self.timing.notice:
            self._said = now
            self.say(f"{self.title}: still waiting after {(now - self._begun) / 60:.0f} min ({who}).")
        self._delay = min(self.timing.poll, 2 * self._delay or 0.05)
        return self._delay


def _write_new(file: Path, data: bytes) -> None:
    """Write a file that must not exist. Raises FileExistsError."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
    except BaseException:
        remove_file(file)
        raise
