"""The result store: one JSON file per cell, named by the hash of its protocol."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samplerbench.errors import RunError, UserError
from samplerbench.results.claims import Claims
from samplerbench.results.files import LARGEST_TEXT, read_regular, refuse_links, set_aside, write_atomically
from samplerbench.results.names import with_current_names
from samplerbench.results.record import Record, schema_errors
from samplerbench.results.seal import digest
from samplerbench.text import note


@dataclass(frozen=True)
class Entry:
    """A result file: its record, or what keeps it from being used, as a clause: "damaged or edited"."""

    file: Path
    record: Record | None
    problem: str = ""


class Store:
    """A folder of results.

    Whoever reads one gets valid records only: whole, as they were sealed, under their own name, and of the schema.
    Only a run, which writes into the folder anyway, sets aside what it cannot use; other readers name it and rename
    nothing. Symbolic links within the folder are not followed.

    Attributes:
        folder: where the results lie.
        claims: which run works on which cell.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.claims = Claims(folder / ".locks")

    def prepare(self) -> None:
        """Make the folder, and see that it can be written to, before anything long begins. Raises UserError."""
        for part in (self.folder, *self.folder.parents):
            if part.exists() and not part.is_dir():
                what = "it" if part == self.folder else part
                raise UserError(f"cannot write {self.folder}: {what} is a file, not a folder; choose another --out.")
        refuse_links(self.folder / ".locks", self.folder)
        probe = self.folder / f".probe-{os.getpid()}"
        write_atomically(probe, b"")
        probe.unlink(missing_ok=True)

    def path(self, key: str, suffix: str = ".json") -> Path:
        """The file of a protocol hash."""
        return self.folder / f"{key[:20]}{suffix}"

    def get(self, key: str) -> Record | None:
        """The result with this protocol hash, or None where there is none that is valid.

        A file that is not valid is set aside as NAME.json.damaged with a line on stderr, so that its cell is run again.
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
        """Rename a file that cannot be used to NAME.damaged, and say so in one line on stderr."""
        target = set_aside(file)
        where = "it cannot be renamed" if target is None else f"it is kept as {target.name}"
        note(f"warning: {file.name} is not used: {problem}; {where}, and its cell starts from the beginning.")

    def entries(self) -> Iterator[Entry]:
        """Every result file of the folder, by name: *.json, whatever it is. Nothing is changed."""
        for file in sorted(self.folder.glob("*.json")):
            yield read(file)

    def records(self) -> Iterator[tuple[Path, Record | None]]:
        """The same as pairs of the file and its record; None for one that is not valid."""
        for entry in self.entries():
            yield entry.file, entry.record and with_current_names(entry.record)

    def put(self, record: dict[str, Any]) -> Path:
        """Write a result, sealed with the hash of its content.

        Raises:
            RunError: it does not fit the schema, so no reader would take it: nothing is written.
        """
        record = {k: v for k, v in record.items() if k != "seal"}
        sealed = {**record, "seal": digest(record)}
        if errors := schema_errors(sealed):
            raise RunError(f"the result cannot be recorded: {errors[0]}.")
        file = self.path(record["protocol"])
        write_atomically(file, (json.dumps(sealed, indent=2, ensure_ascii=False) + "\n").encode())
        return file


def read(file: Path) -> Entry:
    """A result file, checked: a regular file of JSON, sealed, named by its protocol's hash, and of the schema."""
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
        return Entry(file, None, "renamed: its name is not that of its protocol")
    return Entry(file, record)


def sound(record: Record) -> bool:
    """Whether a record is as it was written: its seal fits its content, its key fits its protocol."""
    content = {k: v for k, v in record.items() if k != "seal"}
    try:
        return record["seal"] == digest(content) and record["protocol"] == digest(record["protocol_fields"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return False
