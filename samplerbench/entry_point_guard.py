"""What is seen to before torch and pydantic are imported: that a damaged distribution on the path does not stop them.

torch, triton and pydantic look into the entry points of all distributions, and raise where one of them has an
`entry_points.txt` that cannot be read. Where there is such a one, it counts in this process as one without entry
points. `samplerbench list` and `samplerbench plugins` name it.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, EntryPoints, entry_points
from typing import Any

_read: Any = vars(Distribution)["entry_points"]


class BeforeImport:
    """A finder that finds nothing: before the first import of torch or pydantic it looks at the entry points."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Called for every import; None leaves it to the finders that follow."""
        if name in ("torch", "pydantic"):
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
            check_entry_points()


def check_entry_points() -> None:
    """Let distributions whose entry points cannot be read have none, where there is such a distribution."""
    try:
        entry_points(group="torch.backends")
    except Exception:  # UnicodeDecodeError, OSError, or ValueError of a line that is no entry point
        setattr(Distribution, "entry_points", property(_readable))  # noqa: B010 - mypy knows it as read-only


def _readable(distribution: Distribution) -> EntryPoints:
    try:
        return read(distribution)
    except Exception:
        return EntryPoints(())


def read(distribution: Distribution) -> EntryPoints:
    """The entry points of a distribution, as importlib.metadata reads them. Raises whatever that raises."""
    found: EntryPoints = _read.__get__(distribution, type(distribution))
    return found


def watch() -> None:
    """Put the finder first, once, where torch has not been imported yet."""
    if "torch" not in sys.modules and not any(isinstance(finder, BeforeImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, BeforeImport())
