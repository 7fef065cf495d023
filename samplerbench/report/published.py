"""Published values next to measured values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from samplerbench.report.table import column_of, format_value
from samplerbench.results.names import RowNames
from samplerbench.text import literal


def published_table(rows: Sequence[tuple[dict[str, Any], str, float, str]]) -> Group:
    """One row per published value: (record, metric, value, source) -> published, measured, difference.

    A difference is measured - published, and in per cent of the published value.
    """
    table, names = Table(header_style="bold"), RowNames([record for record, *_ in rows])
    for name in ("sampler", "spacing"):
        table.add_column(name, no_wrap=True)
    for name in ("steps", "metric", "published", "measured", "difference"):
        table.add_column(name, justify="right")
    for record, metric, value, _ in rows:
        entry = record["metrics"].get(metric)
        measured = difference = Text("failed", "red") if "error" in record else Text("")
        if entry is not None:
            spread = f" ± {format_value(entry['sd'])}" if "sd" in entry else ""
            measured = Text(format_value(entry["value"]) + spread)
            gap = entry["value"] - value
            difference = Text(f"{'+' if gap >= 0 else '-'}{format_value(abs(gap))} ({gap / value:+.0%})")
        table.add_row(
            literal(names.row(record)),
            literal(names.plugin(record, "spacing") or "own"),
            str(column_of(record)),
            literal(metric),
            format_value(value),
            measured,
            difference,
        )
    sources = dict.fromkeys(source for *_, source in rows)
    return Group(Text("Published and measured", style="bold"), table, *[literal(s, "dim") for s in sources])
