"""The result store: one JSON file per cell, named by its protocol hash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samplerbench.errors import RunError, UserError, argument
from samplerbench.portable import remove_file
from samplerbench.results.claims import Claims
from samplerbench.results.files import LARGEST_TEXT, read_regular, refuse_links, set_aside, write_atomically
from samplerbench.results.latency import LATENCY_FILE
from samplerbench.results.names import with_current_names
from samplerbench.results.record import Record, schema_errors
from samplerbench.results.seal import digest
from samplerbench.text import note

TUNED_FILE = "tuned.json"
"""Name of the file with the result of `samplerbench tune` in a folder of results."""
RECOMMENDED_FILE = "recommended.json"
"""Name of the file with that of `samplerbench recommend`."""
_OTHER_FILES = (LATENCY_FILE, TUNED_FILE, RECOMMENDED_FILE)
"""Files *.json of a folder of results that are no results."""


@dataclass(frozen=True)
class Entry:
    """A result file.

    Attributes:
        file: the path.
        record: the record as it was written; None if it is not valid.
        problem: why it is not valid, as a clause: "damaged or edited".
    """

    file: Path
    record: Record | None
    problem: str = ""


class Store:
    """A folder of results.

    Only valid records are read: complete, with a valid seal, the right file name, and the fields of the schema. A run
    renames invalid files that it needs; other readers report them without changes. Symbolic links in the folder are not
    followed.

    Args:
        folder: folder of the results.

    Attributes:
        folder: folder of the results.
        claims: leases that assign cells to runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.claims = Claims(folder / ".locks")

    def prepare(self) -> None:
        """Create the folder, and check that it is writable. Raises UserError."""
        for part in (self.folder, *self.folder.parents):
            if part.exists() and not part.is_dir():
                what = "it" if part == self.folder else part
                raise UserError(
                    f"cannot write {self.folder}: {what} is a file, not a folder; choose another {argument('out')}."
                )
        refuse_links(self.folder / ".locks", self.folder)
        probe = self.folder / f".probe-{os.getpid()}"
        write_atomically(probe, b"")
        remove_file(probe)

    def path(self, key: str, suffix: str = ".json") -> Path:
        """The file for a protocol hash."""
        return self.folder / f"{key[:20]}{suffix}"

    def get(self, key: str) -> Record | None:
        """The result with this protocol hash, or None if there is no valid one.

        An invalid file is renamed to NAME.json.damaged, with a message on stderr, so that its cell is run again.
        """
        file = self.path(key)
        if not os.path.lexists(file):
            return None
        found = read(file)
        if found.record is not None and found.record["protocol"] == key:
            return found.record
        self.set_aside(file, found.problem or "of another cell")
        return None

    def set_aside(self, file: Path, problem: str) -> None:
        """Rename an invalid file to NAME.damaged, and print a message on stderr."""
        target = set_aside(file)
        where = "it cannot be renamed" if target is None else f"it is kept as {target.name}"
        note(f"warning: {file.name} is not used: {problem}; {where}, and its cell starts from the beginning.")

    def entries(self) -> Iterator[Entry]:
        """All result files *.json of the folder, sorted by name, valid or not. No file is changed."""
        for file in sorted(self.folder.glob("*.json")):
            if file.name not in _OTHER_FILES:
                yield read(file)

    def records(self) -> Iterator[tuple[Path, Record | None]]:
        """Pairs of a file and its record, in which metrics have their current names; None for invalid files."""
        for entry in self.entries():
            yield entry.file, entry.record and with_current_names(entry.record)

    def put(self, record: dict[str, Any]) -> Path:
        """Write a result, with a seal.

        Raises:
            RunError: the record does not match the schema. Nothing is written.
        """
        record = {k: v for k, v in record.items() if k != "seal"}
        sealed = {**record, "seal": digest(record)}
        if errors := schema_errors(sealed):
            raise RunError(f"the result cannot be recorded: {errors[0]}.")
        file = self.path(record["protocol"])
        write_atomically(file, (json.dumps(sealed, indent=2, ensure_ascii=False) + "\n").encode())
        return file


def read(file: Path) -> Entry:
    """Read and check a result file: a regular file with JSON, a valid seal, the right name, and the schema."""
    try:
        text = read_regular(file, LARGEST_TEXT)
    except OSError as error:
        return Entry(file, None, f"cannot be read ({error.strerror or error})")
    try:
        record = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return Entry(file, None, "damaged or edited")
    if not isinstance(record, dict) or not sound(record):
        return Entry(file, None, "damaged or edited")
    if errors := schema_errors(record):
        return Entry(file, None, f"not a result of this version ({errors[0]})")
    if file.stem != record["protocol"][:20]:
        return Entry(file, None, "renamed: its name does not match its protocol")
    return Entry(file, record)


def sound(record: Record) -> bool:
    """Whether the seal matches the content of a record, and the protocol hash its protocol."""
    content = {k: v for k, v in record.items() if k != "seal"}
    try:
        return record["seal"] == digest(content) and record["protocol"] == digest(record["protocol_fields"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return False
