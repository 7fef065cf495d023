"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from samplerbench.errors import RunError, SamplerbenchError, UserError

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
        return RunError(f"{text}free some space and run the same command again, or choose another --out.")
    if error.errno in _numbers(_DEVICE):
        return RunError(f"{text}check the disk or the network and run the same command again.")
    return UserError(f"{text}choose another --out.")


def write_atomically(file: Path, data: bytes) -> None:
    """Write to a temporary file beside, flush it to the disk, and rename: the file is whole or not there.

    Raises:
        UserError: the folder cannot be written to.
        RunError: the disk is full or fails. What was there before remains.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise write_error(file, error) from None
