"""The user's cache for measured numbers."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samplerbench.portable import replace_file
from samplerbench.untrusted import parse_json, read_text


def cache_dir() -> Path:
    """The cache folder: $SAMPLERBENCH_CACHE, else samplerbench in $XDG_CACHE_HOME or ~/.cache.

    If the home folder is unknown, a temporary folder that is removed at the end of the process.
    """
    if given := os.environ.get("SAMPLERBENCH_CACHE"):
        return _resolved(given) or _temporary()
    root = _resolved(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return _temporary() if root is None else root / "samplerbench"


def _resolved(text: str) -> Path | None:
    """The path with `~` expanded; None if the home folder is unknown or not absolute."""
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        return None
    return None if text.startswith("~") and not path.is_absolute() else path


@functools.cache
def _temporary() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="samplerbench-cache-", ignore_cleanup_errors=True)
    _KEPT.append(folder)  # keep it until the end of the process
    return Path(folder.name)


_KEPT: list[Any] = []


@contextlib.contextmanager
def cached_json(name: str, identity: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Context manager: a dictionary of numbers, loaded from the cache and saved at the end.

    A file that cannot be read, or that contains other values than finite non-negative numbers, is ignored. A cache that
    cannot be written is not an error.

    Args:
        name: start of the file name.
        identity: plain data that identifies the measurement; its hash is part of the file name.
    """
    identity = json.loads(json.dumps(identity))
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    file = cache_dir() / f"{name}-{key}.json"
    try:
        known = _numbers(parse_json(read_text(file)), identity)
    except (OSError, ValueError):
        known = {}
    before = len(known)
    yield known
    if len(known) != before:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump({"identity": identity, "values": known}, stream, indent=1)
            replace_file(temporary, file)


def _numbers(written: Any, identity: dict[str, Any]) -> dict[str, float]:
    """The values of a cache file. Raises ValueError for another identity or invalid values."""
    values = written.get("values") if isinstance(written, dict) else None
    if not isinstance(values, dict) or written.get("identity") != identity:
        raise ValueError("another identity")
    for value in values.values():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError("not a number")
    return values
