"""The result store: one JSON file per cell, named by the hash of its protocol."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from samplerbench.results.claims import Claims
from samplerbench.results.files import write_atomically
from samplerbench.results.seal import digest


class Store:
    """A folder of results.

    Attributes:
        folder: where the results lie.
        claims: which run works on which cell.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.claims = Claims(folder / ".locks")

    def prepare(self) -> None:
        """Make the folder, and see that it can be written to, before anything long begins."""
        probe = self.folder / f".probe-{os.getpid()}"
        write_atomically(probe, b"")
        probe.unlink(missing_ok=True)

    def path(self, key: str, suffix: str = ".json") -> Path:
        """The file of a protocol hash."""
        return self.folder / f"{key[:20]}{suffix}"

    def get(self, key: str) -> dict[str, Any] | None:
        """The result with this protocol hash, or None where there is none that is whole and unedited.

        A file that is damaged or was edited is set aside as NAME.json.damaged, so that its cell is run again.
        """
        file = self.path(key)
        try:
            record = json.loads(file.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            record = None
        if isinstance(record, dict) and sound(record) and record["protocol"] == key:
            return record
        with suppress(OSError):
            os.replace(file, file.with_name(file.name + ".damaged"))
        return None

    def records(self) -> Iterator[tuple[Path, dict[str, Any] | None]]:
        """Every result file of the folder, by name, with its record; None for one that is damaged or was edited."""
        for file in sorted(self.folder.glob("*.json")):
            try:
                record = json.loads(file.read_text("utf-8"))
            except (OSError, ValueError):
                record = None
            whole = isinstance(record, dict) and sound(record) and file.stem == record["protocol"][:20]
            yield file, record if whole else None

    def put(self, record: dict[str, Any]) -> Path:
        """Write a result, sealed with the hash of its content."""
        sealed = {**record, "seal": digest(record)}
        file = self.path(record["protocol"])
        write_atomically(file, (json.dumps(sealed, indent=2, ensure_ascii=False) + "\n").encode())
        return file


def sound(record: dict[str, Any]) -> bool:
    """Whether a record is as it was written: its seal fits its content, its key fits its protocol."""
    content = {k: v for k, v in record.items() if k != "seal"}
    try:
        return record["seal"] == digest(content) and record["protocol"] == digest(record["protocol_fields"])
    except (KeyError, TypeError, ValueError):
        return False
