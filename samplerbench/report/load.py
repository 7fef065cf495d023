"""What a report is made from: the results of a folder, and what is wrong with the folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from samplerbench.errors import UserError
from samplerbench.results.files import LARGEST_TEXT, is_regular, read_regular
from samplerbench.results.names import with_current_names
from samplerbench.results.record import Record

LOG_LINE = re.compile(r"^\S+  (?P<title>.*? steps): (?P<rest>.*)$")


@dataclass(frozen=True)
class Loaded:
    """The whole records of a folder, their sample sheets by protocol hash, and one line per thing that is amiss."""

    folder: Path
    records: list[Record]
    pictures: dict[str, Path]
    problems: list[str]


def load(folder: Path) -> Loaded:
    """Read every result of a folder; what is damaged, set aside, unfinished or failed becomes a line of `problems`.

    Raises:
        UserError: there is no such folder, or it holds no whole result.
    """
    from samplerbench.results.store import Store

    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; `samplerbench run … --out {folder}` makes one.")
    records, pictures, problems = [], {}, []
    for entry in Store(folder).entries():
        file, record = entry.file, entry.record
        if record is None:
            problems.append(f"{entry.problem}, left out: {file.name}")
            continue
        if not record["metrics"]:
            problems.append(f"without a metric, left out: {file.name}")
            continue
        records.append(with_current_names(record))
        if is_regular(file.with_suffix(".png")):
            pictures[record["protocol"]] = file.with_suffix(".png")
    problems += [f"set aside as damaged: {file.name}" for file in sorted(folder.glob("*.damaged"))]
    for file in sorted(folder.glob("*.partial.safetensors")):
        problems.append(f"unfinished: {file.name.partition('.')[0]}; the command that began it goes on with it")
    problems += [f"failed: {line}" for line in _failed(folder / "run.log")]
    if not records:
        amiss = f" ({'; '.join(problems)})" if problems else ""
        raise UserError(f"{folder} holds no whole result{amiss}; `samplerbench run … --out {folder}` makes some.")
    return Loaded(folder, records, pictures, problems)


def _failed(log: Path) -> list[str]:
    """The cells whose last line in the log says that they failed."""
    try:
        lines = read_regular(log, LARGEST_TEXT).decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    last: dict[str, str] = {}
    for line in lines:
        if found := LOG_LINE.match(line):
            last[found["title"]] = found["rest"]
    return [f"{title}: {rest[8:]}" for title, rest in last.items() if rest.startswith("failed: ")]
