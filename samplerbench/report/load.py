"""Load the results of a folder for a report, and list the problems of the folder."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from samplerbench.errors import UserError
from samplerbench.results.files import LARGEST_TEXT, is_regular, read_regular
from samplerbench.results.latency import Latency, read_latencies
from samplerbench.results.names import with_current_names
from samplerbench.results.record import Record
from samplerbench.untrusted import no_folder

LOG_LINE = re.compile(r"^\S+  (?P<title>.*? steps): (?P<rest>.*)$")


@dataclass(frozen=True)
class Loaded:
    """The results of a folder.

    Attributes:
        folder: the folder.
        records: the valid records.
        pictures: protocol hash → PNG of samples.
        problems: one line for each damaged, unfinished or failed cell.
        latencies: latencies that `samplerbench latency` measured.
    """

    folder: Path
    records: list[Record]
    pictures: dict[str, Path]
    problems: list[str]
    latencies: list[Latency] = field(default_factory=list)


def load(folder: Path) -> Loaded:
    """Read all results of a folder. Damaged, unfinished and failed cells are listed in `problems`.

    Raises:
        UserError: no such folder, or no valid result in it.
    """
    from samplerbench.results.store import Store

    if not folder.is_dir():
        raise UserError(f"{no_folder(folder)}; `samplerbench run … --out FOLDER` writes one with results.")
    records, pictures, problems = [], {}, []
    for entry in Store(folder).entries():
        file, record = entry.file, entry.record
        if record is None:
            problems.append(f"{entry.problem}, left out: {file.name}")
            continue
        if not record["metrics"] and "inapplicable" not in record:
            problems.append(f"without a metric, left out: {file.name}")
            continue
        records.append(with_current_names(record))
        if is_regular(file.with_suffix(".png")):
            pictures[record["protocol"]] = file.with_suffix(".png")
    problems += [f"set aside as damaged: {file.name}" for file in sorted(folder.glob("*.damaged"))]
    for file in sorted(folder.glob("*.partial.safetensors")):
        problems.append(f"unfinished: {file.name.partition('.')[0]}; run the same command to resume it")
    problems += [f"failed: {line}" for line in _failed(folder / "run.log")]
    if not records:
        amiss = f" ({'; '.join(problems)})" if problems else ""
        raise UserError(f"{folder} has no valid results{amiss}; `samplerbench run … --out {folder}` writes some.")
    latencies: list[Latency] = []
    try:
        latencies = read_latencies(folder)
    except UserError as error:
        problems.append(f"left out: {str(error).rstrip('.')}")
    return Loaded(folder, records, pictures, problems, latencies)


def _failed(log: Path) -> list[str]:
    """The cells that failed, according to their last line in the log."""
    try:
        lines = read_regular(log, LARGEST_TEXT).decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    last: dict[str, str] = {}
    for line in lines:
        if found := LOG_LINE.match(line):
            last[found["title"]] = found["rest"]
    return [f"{title}: {rest[8:]}" for title, rest in last.items() if rest.startswith("failed: ")]
