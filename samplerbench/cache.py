"""The user's cache: figures that cost something to find and never change."""

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

from samplerbench.untrusted import parse_json, read_text


def cache_dir() -> Path:
    """$SAMPLERBENCH_CACHE, else samplerbench in the platform's cache folder ($XDG_CACHE_HOME or ~/.cache).

    Where no home folder is known, a temporary folder of this process: then nothing is kept.
    """
    if given := os.environ.get("SAMPLERBENCH_CACHE"):
        return _resolved(given) or _temporary()
    root = _resolved(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return _temporary() if root is None else root / "samplerbench"


def _resolved(text: str) -> Path | None:
    """The path with `~` replaced; None where it cannot be, or is not absolute because the home folder is not."""
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        return None
    return None if text.startswith("~") and not path.is_absolute() else path


@functools.cache
def _temporary() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="samplerbench-cache-", ignore_cleanup_errors=True)
    _KEPT.append(folder)  # it is removed with the process, not here
    return Path(folder.name)


_KEPT: list[Any] = []


@contextlib.contextmanager
def cached_json(name: str, identity: dict[str, Any]) -> Iterator[dict[str, float]]:
    """A dictionary of numbers kept under a name and an identity: what is added inside is there the next time.

    A cache that cannot be read, or has anything but finite numbers from 0 on, is empty. One that cannot be written is
    not an error: it only costs time.
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
            os.replace(temporary, file)


def _numbers(written: Any, identity: dict[str, Any]) -> dict[str, float]:
    """The values of a cache file. Raises ValueError where it is none of this identity, or was not written here."""
    values = written.get("values") if isinstance(written, dict) else None
    if not isinstance(values, dict) or written.get("identity") != identity:
        raise ValueError("no cache file of this")
    for value in values.values():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError("no number")
    return values
