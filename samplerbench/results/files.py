"""Files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from samplerbench.errors import UserError


def write_atomically(file: Path, data: bytes) -> None:
    """Write to a temporary file beside, flush it to the disk, and rename: the file is whole or not there.

    Raises:
        UserError: the folder cannot be written to.
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
        raise UserError(f"cannot write {file}: {error.strerror or error}; choose another --out.") from None
