"""What is seen to before torch is imported: that a damaged distribution on the path does not keep it from importing.

At its import torch looks for device backends in the entry points of all distributions, and raises where one of them has
an `entry_points.txt` that cannot be read. Here that is found out first, and torch told not to look. `samplerbench list`
and `samplerbench plugins` name such a distribution.
"""

from __future__ import annotations

import os
import sys
from typing import Any

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""The environment variable by which torch looks for device backends, or does not ("0")."""


class BeforeTorch:
    """A finder that finds nothing: before the first import of torch it looks whether entry points can be read."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Called for every import; None leaves it to the finders that follow."""
        if name != "torch":
            return
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        if AUTOLOAD not in os.environ:
            check_entry_points()


def check_entry_points() -> None:
    """Set TORCH_DEVICE_BACKEND_AUTOLOAD=0, for this process and its children, where entry points cannot be read."""
    from importlib.metadata import entry_points

    try:
        entry_points(group="torch.backends")
    except Exception:  # UnicodeDecodeError, OSError, or ValueError of a line that is no entry point
        os.environ[AUTOLOAD] = "0"


def watch() -> None:
    """Put the finder first, once, where torch has not been imported yet."""
    if "torch" not in sys.modules and not any(isinstance(finder, BeforeTorch) for finder in sys.meta_path):
        sys.meta_path.insert(0, BeforeTorch())
