"""Atomic writes, and reads that accept only regular files: no links, pipes, sockets, devices or folders."""

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
from samplerbench.portable import remove_file, replace_file, retry

_FULL = ("ENOSPC", "EDQUOT", "EFBIG")
_BLOCKED = ("EEXIST", "ENOTDIR", "EISDIR")
_DEVICE = ("EIO", "ESTALE", "ETIMEDOUT", "ENXIO", "ENODEV", "EREMOTEIO", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH")


def error_numbers(*names: str) -> set[int]:
    """The numbers of errors, of those that exist on this system."""
    return {getattr(errno, name) for name in names if hasattr(errno, name)}


def write_error(file: Path, error: OSError) -> SamplerbenchError:
    """The error to raise for a file that cannot be written.

    A full disk, an exceeded quota and a device that fails are failures of the run (`RunError`, exit code 1). A folder
    that was never writable is bad input (`UserError`, exit code 2).
    """
    text = f"cannot write {file}: {_blocked(file, error) or error.strerror or error}; "
    if error.errno in error_numbers(*_FULL):
        return RunError(f"{text}free some space and run the same command again, or choose another {argument('out')}.")
    if error.errno in error_numbers(*_DEVICE):
        return RunError(f"{text}check the disk or the network and run the same command again.")
    return UserError(f"{text}choose another path.")


def _blocked(file: Path, error: OSError) -> str:
    """Why the path cannot be a file: it is a folder, or a folder of it is a file. "" for another error."""
    if error.errno not in error_numbers(*_BLOCKED):
        return ""
    try:
        if file.is_dir():
            return "it is a folder"
        parent = next((part for part in file.parents if part.is_file()), None)
    except OSError:
        return ""
    return "" if parent is None else f"{parent} is a file, not a folder"


LARGEST_TEXT = 64 * 2**20
"""Maximum size of a result or a log, in bytes."""


def is_regular(file: Path) -> bool:
    """Whether a path is a regular file, and not a symbolic link."""
    try:
        return stat.S_ISREG(file.lstat().st_mode)
    except (OSError, ValueError):  # ValueError for a name with a null character
        return False


def open_regular(file: Path) -> BinaryIO:
    """Open a regular file for reading. Symbolic links are not followed, and pipes do not block.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: not a regular file, or it cannot be read.
    """
    return os.fdopen(_descriptor(file, os.O_RDONLY), "rb")


def read_regular(file: Path, most: int | None = None) -> bytes:
    """Read a regular file of at most `most` bytes. Raises OSError as `open_regular`, and for larger files."""
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if most is not None and size > most:
            raise OSError(f"it is larger than {most // 2**20} MiB")
        return stream.read()


def append_line(file: Path, line: str) -> None:
    """Append a line to a text file, and create it if needed. Raises OSError if it is not a regular file."""
    with os.fdopen(_descriptor(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as stream:
        stream.write(f"{line}\n".encode("utf-8", errors="replace"))


def _descriptor(file: Path, flags: int) -> int:
    """Open a regular file. O_NONBLOCK prevents blocking on a pipe."""
    with suppress(FileNotFoundError):
        # Checked in advance for systems without the flags below (Windows).
        if not stat.S_ISREG(file.lstat().st_mode):
            raise OSError("it is not a regular file")
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    descriptor = os.open(file, flags, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is not a regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def set_aside(file: Path) -> Path | None:
    """Rename a file to NAME.damaged, or to NAME.2.damaged and so on if that exists.

    Returns:
        The new name; None if it cannot be renamed.
    """
    number = 1
    while os.path.lexists(target := file.with_name(f"{file.name}{'' if number == 1 else f'.{number}'}.damaged")):
        number += 1
    try:
        retry(lambda: os.rename(file, target))
    except OSError:
        return None
    return target


def refuse_links(folder: Path, root: Path) -> None:
    """Check that no folder from below `root` down to `folder` is a symbolic link.

    Raises:
        UserError: one of them is a symbolic link.
    """
    for part in (folder, *folder.parents):
        if part == root:
            return
        if part.is_symlink():
            raise UserError(f"{part} is a symbolic link, which is not followed; name another {argument('out')}.")


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Context manager: yields a temporary file, which is flushed to disk and renamed to `file` at the end.

    A symbolic link at `file` is replaced, not followed. After an exception, the temporary file is removed.

    Raises:
        UserError: the folder cannot be written to.
        RunError: the disk is full or fails. An existing file is kept.
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
            replace_file(temporary, file)
        except BaseException:
            remove_file(temporary)
            raise
    except OSError as error:
        raise write_error(file, error) from None


def write_atomically(file: Path, data: bytes) -> None:
    """Write a file atomically: write a temporary file, flush it to disk, and rename it.

    Raises:
        UserError: the folder cannot be written to.
        RunError: the disk is full or fails.
    """
    with atomic_file(file) as temporary:
        temporary.write_bytes(data)
