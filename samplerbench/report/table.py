"""Tables of results in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from samplerbench.report.wide import WideTable
from samplerbench.results.names import RowNames, metric_title, own_head, steps_label
from samplerbench.results.record import Record
from samplerbench.results.timings import describe_conditions, timings_of
from samplerbench.text import literal

BEST_NOTE = "* the best of its column"
NO_VALUE = "–"
"""A cell of a metric that has no value for the sampler."""
IMAGES_NOTE = "mean ± standard error over images"
FLOOR_NOTE = (
    "real against real: the FID between two disjoint random sets of {size} real images each; rows are measured against "
    "all real images, so a row may be lower"
)


def row_names(records: Sequence[Record]) -> list[str]:
    """The name of each record's row, with spacing and seed if the rows of a sampler differ in them."""
    table = RowNames(records)
    rows = [table.row(record) for record in records]
    found: dict[str, list[Record]] = {}
    for row, record in zip(rows, records, strict=True):
        found.setdefault(row, []).append(record)
    names = []
    for row, record in zip(rows, records, strict=True):
        same = [r for r in found[row] if "unmet" not in r]
        name = row
        if len({r["spacing"] for r in same}) > 1:
            name += f", {table.plugin(record, 'spacing') or 'own spacing'}"
        if len({r.get("task") for r in same}) > 1:
            name += f", {record.get('task')}"
        if len({r.get("seed") for r in same}) > 1:
            name += f", seed {record.get('seed')}"
        names.append(name)
    return names


def format_value(value: float) -> str:
    """Format with three or four significant digits, and with an exponent for very small values."""
    if value != value:
        return "nan"
    magnitude = abs(value)
    if 0 < magnitude < 0.001 or 1e9 <= magnitude < math.inf:
        return f"{value:.1e}"
    digits = 4 if magnitude < 0.1 else 3 if magnitude < 1 else 2 if magnitude < 100 else 1
    return f"{value:.{digits}f}"


def column_of(record: Record, by_cost: bool = False) -> int | None:
    """The column of a record: its budget of evaluations, else its steps, else None ("own").

    by_cost: in a table of budgets, where what was run by its steps stands at the evaluations it took.
    """
    if record.get("budget") is not None:
        return record["budget"]
    by_cost = by_cost and bool(record.get("nfe"))  # 0 where only data was measured
    return round(record["nfe"]) if by_cost and record["steps"] is not None else record["steps"]


def _columns(records: Sequence[Record], by_cost: bool) -> list[int | None]:
    found = {column_of(r, by_cost) for r in records}
    return [*sorted(c for c in found if c is not None), *([None] if None in found else [])]


def steps_table(records: Sequence[Record], metric: str, floor: tuple[float, float, int] | None = None) -> Group:
    """The table of a metric: rows are samplers, columns are steps. The best value of each column is bold, with a *.

    Args:
        records: the results.
        metric: name of the metric.
        floor: mean, standard deviation and size of `noise_floor`, shown in a row below the others; None for no row.
    """
    found = next((r["metrics"][metric] for r in records if metric in r["metrics"]), None)
    arrow = "↓" if found is None or found["better"] == "lower" else "↑"
    space = measured_in(found) if found else ""
    budgets = any(r.get("budget") is not None for r in records)
    columns, names = _columns(records, budgets), row_names(records)
    by_column = [(column_of(r, budgets), r) for r in records]
    own = own_head([r for column, r in by_column if column is None])
    heads = [own if column is None else str(column) for column in columns]
    table = WideTable(["sampler \\ NFE" if budgets else "sampler \\ steps", *heads])
    best = {column: _best([r for c, r in by_column if c == column], metric, arrow == "↓") for column in columns}
    places = {(name, column_of(r, budgets)): r for name, r in reversed(list(zip(names, records, strict=True)))}
    for name in dict.fromkeys(names):
        cells = []
        for column in columns:
            record = places.get((name, column))
            cells.append(_cell(record, metric, best[column]))
        table.add_row(literal(name), *cells)
    notes = [BEST_NOTE] if any(value is not None for value in best.values()) else []
    if any("sd" in (_value(r, metric) or {}) for r in records):
        notes.append(
            "mean ± standard deviation over blocks; ≈ not significantly different from the best (paired blocks, 95%)"
        )
    if any(_is_over_images(_value(r, metric)) for r in records):
        notes.append(IMAGES_NOTE)
    notes += no_value_notes(records, metric)
    if floor is not None:
        mean, deviation, size = floor
        text = f"{format_value(mean)} ± {format_value(deviation)}"
        table.add_section()
        table.add_row(Text(f"real against real, {size} each", "dim"), *[Text(text, "dim") for _ in columns])
        notes.append(FLOOR_NOTE.format(size=size))
    title = literal(f"{metric_title(metric)} {arrow}{space}", "bold")
    return Group(title, table, *[Text(note, style="dim") for note in notes])


def _value(record: Record, metric: str) -> dict[str, Any] | None:
    return record["metrics"].get(metric)


def measured_in(entry: dict[str, Any]) -> str:
    """` (digits-cnn features, against digits (all, 1797))`, for an entry of a metric with features and a reference.

    For a metric of the data, ` (bits/dim, 256 images of digits:split=held-out)`.
    """
    features, reference, data = entry["features"], entry["reference"], entry.get("data")
    count = f"{entry['images']:g} images of " if "images" in entry else ""
    parts = [entry.get("unit") or "", f"{features} features" if features else ""]
    parts += [f"against {reference}" if reference else "", f"{count}{data}" if data else ""]
    return f" ({', '.join(filter(None, parts))})" if any(parts) else ""


def deviation_of(entry: dict[str, Any]) -> float | None:
    """What stands after ± in a table: the standard deviation over blocks, or that of the mean over real images.

    None if there is a single block, except for a metric of the data.
    """
    if "sd" in entry:
        return entry["sd"]
    return entry["standard_error"] if _is_over_images(entry) else None


def _is_over_images(entry: dict[str, Any] | None) -> bool:
    """Whether ± is the standard error over the images of a metric of the data, in a single block."""
    if entry is None or "sd" in entry or entry.get("of") != "data":
        return False
    return isinstance(entry.get("standard_error"), int | float)


def no_value_notes(records: Sequence[Record], metric: str) -> list[str]:
    """Why a metric has no value for some samplers, one line for each reason."""
    reasons = dict.fromkeys(reason for r in records if (reason := r.get("inapplicable", {}).get(metric)))
    return [f"{NO_VALUE} no value: {reason}" for reason in reasons]


def _best(column: Sequence[Record], metric: str, lower: bool) -> dict[str, Any] | None:
    """The best entry of a column; None if fewer than two rows have a finite value."""
    found = [r["metrics"][metric] for r in column if metric in r["metrics"]]
    found = [entry for entry in found if math.isfinite(entry["value"])]
    if len(found) < 2:
        return None
    return (min if lower else max)(found, key=lambda entry: entry["value"])


def _cell(record: Record | None, metric: str, best: dict[str, Any] | None) -> Text:
    """The text of a cell: bold with a * for the best of its column, ≈ if it does not differ significantly from it."""
    if record is None:
        return Text("")
    if "unmet" in record:
        return Text("unmet", "dim")
    if record.get("pending"):
        return Text("…", "dim")
    if metric in record.get("inapplicable", {}):
        return Text(NO_VALUE, "dim")
    if metric not in record["metrics"]:
        return Text("failed", "red") if "error" in record else Text("")  # the metric is not applicable to it
    entry = record["metrics"][metric]
    text = format_value(entry["value"])
    if (deviation := deviation_of(entry)) is not None:
        text += f" ± {format_value(deviation)}"
    if best is None or not math.isfinite(entry["value"]):
        return Text(text)
    if entry["value"] == best["value"]:
        return Text(f"* {text}", "bold green")
    if "blocks" in entry and len(entry["blocks"]) == len(best.get("blocks", [])):
        from samplerbench.results.compare import paired_difference

        finite = all(map(math.isfinite, [*entry["blocks"], *best["blocks"]]))
        if len(entry["blocks"]) > 1 and finite and paired_difference(entry["blocks"], best["blocks"]).tied:
            return Text(f"≈ {text}", "green")
    return Text(text)


def long_table(records: Sequence[Record], keys: bool = False) -> WideTable:
    """One row per cell, with costs and metrics. Cells that differ only in their budget are merged.

    Args:
        records: the results.
        keys: show the field `key` of each result in the first column.
    """
    records = _sampled(records)
    metrics = list(dict.fromkeys(m for r in records for m in r["metrics"]))
    spacings = RowNames(records)
    extra = any(r.get("classifier_forward") for r in records)
    decoded = any(r.get("decoder_passes") for r in records)
    evaluated = any("nfe" in entry for r in records for entry in r["metrics"].values())
    heads = ["key"] if keys else []
    heads += ["sampler", "spacing", "steps", "NFE", *metrics, *(["metric NFE"] if evaluated else [])]
    heads += ["seconds", "images/s"]
    heads += ["classifier passes"] if extra else []
    heads += ["decoder passes", "decoder seconds"] if decoded else []
    table = WideTable(heads, fixed=1 if keys else 4, left=2 + keys, name=int(keys))
    for name, r in zip(row_names(records), records, strict=True):
        key = [literal(r["key"])] if keys else []
        start = [*key, literal(name), literal(spacings.spacing(r)), literal(steps_label(r))]
        if "unmet" in r:
            table.add_row(*key, literal(name), "", "", Text(f"> {r['budget']}", "dim"))
            continue
        if "error" in r:
            table.add_row(*start, Text("failed", "red"))
            continue
        missing = r.get("inapplicable", {})
        values = [
            format_value(r["metrics"][m]["value"]) if m in r["metrics"] else NO_VALUE if m in missing else ""
            for m in metrics
        ]
        values += [_metric_nfe(r)] if evaluated else []
        cells = [_passes(r), *values, _time(r["seconds"]), _time(r["images_per_second"])]
        if extra:
            passes = f"{format_nfe(r['classifier_forward'])} + {format_nfe(r['classifier_backward'])} backward"
            cells.append(passes if r["classifier_forward"] else "")
        if decoded:
            cells += [format_nfe(r.get("decoder_passes", 0)), _time(r.get("decoder_seconds", 0.0))]
        table.add_row(*start, *cells)
    if untimed := [r for r in records if "metrics" in r and r.get("seconds", 0.0) is None]:
        table.caption = untimed_note(untimed)
    return table


def _passes(cost: dict[str, Any]) -> str:
    """`10`, or `10 + 10 backward`: the network evaluations of a record, or of an entry of a metric of the data."""
    backward = f" + {format_nfe(cost['network_backward'])} backward" if cost.get("network_backward") else ""
    return format_nfe(cost["nfe"]) + backward


def _metric_nfe(record: Record) -> str:
    """`vlb 10`: the evaluations of the metrics of the data, per image of the metric."""
    return ", ".join(f"{name} {_passes(entry)}" for name, entry in record["metrics"].items() if "nfe" in entry)


def _sampled(records: Sequence[Record]) -> list[Record]:
    """The records, without repetitions under another budget of evaluations."""
    found: dict[Any, Record] = {}
    for i, r in enumerate(records):
        same = r.get("budget") is not None and "unmet" not in r and not r.get("pending") and r.get("protocol")
        found.setdefault((same, r.get("seed")) if same else i, r)
    return list(found.values())


def _time(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def untimed_note(records: Sequence[Record]) -> str:
    """The note on rows whose time was measured under other conditions than those of the table."""
    conditions = dict.fromkeys(describe_conditions(t) for r in records for t in timings_of(r))
    where = "; ".join(name or "unknown conditions" for name in conditions)
    count = f"{len(records)} row{'s' if len(records) != 1 else ''}"
    how = f"timed under other conditions ({where})" if where else "timed under changing conditions"
    return f"no time: {count} {how}; `samplerbench run … --rerun` measures the time again"


def format_nfe(nfe: float) -> str:
    """Format as an integer if possible, else with one decimal (the mean of adaptive solvers)."""
    return str(nfe) if isinstance(nfe, int) else f"{nfe:.1f}"
