"""The user's cache: figures that cost something to find and never change."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """$SAMPLERBENCH_CACHE, else samplerbench in the platform's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    if given := os.environ.get("SAMPLERBENCH_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "samplerbench"


@contextlib.contextmanager
def cached_json(name: str, identity: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A dictionary kept under a name and an identity: what is added inside is there the next time.

    A cache that cannot be read is empty, and one that cannot be written is not an error: it only costs time.
    """
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    file = cache_dir() / f"{name}-{key}.json"
    try:
        known = json.loads(file.read_text("utf-8"))["values"]
    except (OSError, ValueError, KeyError, TypeError):
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
