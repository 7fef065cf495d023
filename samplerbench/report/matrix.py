"""The table of a metric: rows are samplers, columns are steps or budgets. Marks the best values and ties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from samplerbench.report.table import (
    IMAGES_NOTE,
    NO_VALUE,
    deviation_of,
    format_value,
    measured_in,
    no_value_notes,
)
from samplerbench.results.groups import Group
from samplerbench.results.names import own_head
from samplerbench.results.record import Record

Axis = Literal["steps", "nfe"]


@dataclass(frozen=True)
class Entry:
    """A cell of a table: the result, its value, and whether it is the best of its column or tied with it."""

    record: Record
    value: float
    sd: float | None
    best: bool = False
    tied: bool = False

    @property
    def text(self) -> str:
        """The cell as text: `4.71 ± 0.41`, with equal numbers of decimals."""
        if self.sd is None:
            return format_value(self.value)
        number = format_value(self.value)
        if "e" in number:
            return f"{number} ± {format_value(self.sd)}"
        return f"{number} ± {self.sd:.{len(number.partition('.')[2])}f}"


@dataclass(frozen=True)
class Matrix:
    """The table of a metric. columns: steps or evaluations; None for samplers that choose their own steps."""

    metric: str
    better: str
    measured_in: str
    axis: Axis
    columns: list[int | None]
    rows: list[tuple[str, list[Entry | None]]]
    no_value: tuple[str, ...] = ()
    """Names of rows without a value, because the metric has none for the sampler."""
    reasons: tuple[str, ...] = ()
    """Notes on these rows."""

    @property
    def arrow(self) -> str:
        """The arrow for the direction of better values."""
        return "↓" if self.better == "lower" else "↑"

    @property
    def heads(self) -> list[str]:
        """Column headings."""
        own = [row[-1].record for _, row in self.rows if self.columns[-1:] == [None] and row[-1] is not None]
        return [own_head(own) if c is None else str(c) for c in self.columns]

    @property
    def notes(self) -> list[str]:
        """The legend of the marks that occur in the table."""
        entries = [e for _, row in self.rows for e in row if e is not None]
        notes = []
        if any("sd" in e.record["metrics"][self.metric] for e in entries):
            notes.append("mean ± standard deviation over blocks")
        elif any(e.sd is not None for e in entries):
            notes.append(IMAGES_NOTE)
        if any(e.tied for e in entries):
            notes.append("≈ not significantly different from the best of its column (95%)")
        if self.axis == "nfe" and any(_below(e.record) for e in entries):
            notes.append("a column is a budget: each sampler takes the most steps that fit")
        return [*notes, *self.reasons]

    def blank(self, row: str) -> str:
        """The text of a cell of a row without an entry."""
        return NO_VALUE if row in self.no_value else ""


def _below(record: Record) -> bool:
    return record.get("budget") is not None and record["nfe"] != record["budget"]


def default_axis(group: Group) -> Axis:
    """The default axis: evaluations if the samplers differ in evaluations per step or have budgets, else steps."""
    # Where only data was measured, nothing was sampled and nfe is 0.
    uneven = any(r["steps"] is not None and r["nfe"] not in (0, r["steps"]) for r in group.records)
    return "nfe" if uneven else "steps"


def column(record: Record, axis: Axis) -> int | None:
    """The column of a result: its steps; or its budget, else its evaluations. None if the sampler chose its steps."""
    if record["steps"] is None:
        return None
    if axis == "steps" or (not record["nfe"] and record.get("budget") is None):
        return int(record["steps"])
    return int(record["budget"] if record.get("budget") is not None else round(record["nfe"]))


def matrix(group: Group, metric: str, axis: Axis) -> Matrix:
    """The table of one metric of one protocol.

    Where two results of a row fall into one column (two step counts within a budget), the one with more steps stands
    there.
    """
    records = [r for r in group.records if metric in r["metrics"]]
    entry = records[0]["metrics"][metric]
    without = [r for r in group.records if metric in r.get("inapplicable", {})]
    found = {column(r, axis) for r in records}
    columns: list[int | None] = [*sorted(c for c in found if c is not None), *([None] if None in found else [])]
    rows = list(dict.fromkeys(group.label(r) for r in group.records if r in records or r in without))
    cells: dict[tuple[str, int | None], Record] = {}
    for r in sorted(records, key=lambda r: r["nfe"]):
        cells[group.label(r), column(r, axis)] = r
    by_column = [mark([cells.get((row, c)) for row in rows], metric) for c in columns]
    no_value = tuple(dict.fromkeys(group.label(r) for r in without))
    return Matrix(
        metric,
        entry["better"],
        measured_in(entry),
        axis,
        columns,
        [(row, [entries[i] for entries in by_column]) for i, row in enumerate(rows)],
        no_value,
        tuple(no_value_notes(without, metric)),
    )


def mark(records: Sequence[Record | None], metric: str) -> list[Entry | None]:
    """Mark the best entry of a column with two or more entries, and all that do not differ significantly from it."""
    from samplerbench.results.compare import difference

    entries = [None if r is None else _entry(r, metric) for r in records]
    rivals = [e for e in entries if e is not None and math.isfinite(e.value)]
    if len(rivals) < 2:
        return entries
    lower = rivals[0].record["metrics"][metric]["better"] == "lower"
    best = (min if lower else max)(rivals, key=lambda e: e.value)
    marked: list[Entry | None] = []
    for e in entries:
        if e is None or not math.isfinite(e.value):
            marked.append(e)
            continue
        same = e.value == best.value
        apart = None if same else difference(e.record, best.record, metric)
        marked.append(Entry(e.record, e.value, e.sd, same, apart is not None and apart.tied))
    return marked


def _entry(record: Record, metric: str) -> Entry:
    found = record["metrics"][metric]
    return Entry(record, found["value"], deviation_of(found))
