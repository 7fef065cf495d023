"""Files that are whole or not there, and that are files: no link, pipe, socket, device or folder in their place."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from samplerbench.errors import RunError, SamplerbenchError, UserError, argument

_FULL = ("ENOSPC", "EDQUOT", "EFBIG")
_DEVICE = ("EIO", "ESTALE", "ETIMEDOUT", "ENXIO", "ENODEV", "EREMOTEIO", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH")


def _numbers(names: tuple[str, ...]) -> set[int]:
    return {getattr(errno, name) for name in names if hasattr(errno, name)}


def write_error(file: Path, error: OSError) -> SamplerbenchError:
    """The error to raise for a file that cannot be written.

    A full disk, an exceeded quota and a device that fails are failures of the run (`RunError`, exit code 1). A folder
    that was never writable is bad input (`UserError`, exit code 2).
    """
    text = f"cannot write {file}: {error.strerror or error}; "
    if error.errno in _numbers(_FULL):
        return RunError(f"{text}free some space and run the same command again, or choose another {argument('out')}.")
    if error.errno in _numbers(_DEVICE):
        return RunError(f"{text}check the disk or the network and run the same command again.")
    return UserError(f"{text}choose another {argument('out')}.")


LARGEST_TEXT = 64 * 2**20
"""Bytes beyond which a result or a log is not read."""


def is_regular(file: Path) -> bool:
    """Whether a name is a regular file itself: no symbolic link, pipe, socket, device or folder."""
    try:
        return stat.S_ISREG(file.lstat().st_mode)
    except (OSError, ValueError):  # a name with a NUL is a ValueError
        return False


def open_regular(file: Path) -> BinaryIO:
    """Open a regular file to be read. A symbolic link is not followed, and a pipe does not block.

    Raises:
        FileNotFoundError: there is nothing of this name.
        OSError: it is no regular file, or it cannot be read.
    """
    return os.fdopen(_descriptor(file, os.O_RDONLY), "rb")


def read_regular(file: Path, most: int | None = None) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises OSError as `open_regular`, and for a larger one."""
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if most is not None and size > most:
            raise OSError(f"it is larger than {most // 2**20} MiB")
        return stream.read()


def append_line(file: Path, line: str) -> None:
    """Add a line to a text file, which is made if it is not there. Raises OSError where it is no regular file."""
    with os.fdopen(_descriptor(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as stream:
        stream.write(f"{line}\n".encode("utf-8", errors="replace"))


def _descriptor(file: Path, flags: int) -> int:
    """A file descriptor of a regular file. O_NONBLOCK keeps the opening of a pipe from waiting for its other end."""
    with suppress(FileNotFoundError):
        # What the flags do where there are such flags is asked for beforehand where there are none (Windows).
        if not stat.S_ISREG(file.lstat().st_mode):
            raise OSError("it is no regular file")
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    descriptor = os.open(file, flags, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def set_aside(file: Path) -> Path | None:
    """Rename what cannot be used to NAME.damaged, or NAME.2.damaged and so on: nothing set aside before is replaced.

    Returns:
        The new name; None where it cannot be renamed.
    """
    number = 1
    while os.path.lexists(target := file.with_name(f"{file.name}{'' if number == 1 else f'.{number}'}.damaged")):
        number += 1
    try:
        os.rename(file, target)
    except OSError:
        return None
    return target


def refuse_links(folder: Path, root: Path) -> None:
    """Check that no folder from below `root` down to `folder` is a symbolic link.

    Raises:
        UserError: one is, so what is written there would land elsewhere.
    """
    for part in (folder, *folder.parents):
        if part == root:
            return
        if part.is_symlink():
            raise UserError(f"{part} is a symbolic link, which is not followed; name another {argument('out')}.")


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """The name of a temporary file beside, which is flushed to the disk and renamed to `file` at the end.

    A symbolic link at `file` is replaced, not followed. Where the block raises, nothing is left.

    Raises:
        UserError: the folder cannot be written to.
        RunError: the disk is full or fails. What was there before remains.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
        os.close(handle)
        try:
            yield Path(temporary)
            with open(temporary, "r+b") as stream:
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise write_error(file, error) from None


def write_atomically(file: Path, data: bytes) -> None:
    """Write to a temporary file beside, flush it to the disk, and rename: the file is whole or not there.

    Raises:
        UserError: the folder cannot be written to.
        RunError: the disk is full or fails.
    """
    with atomic_file(file) as temporary:
        temporary.write_bytes(data)
