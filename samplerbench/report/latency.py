"""Latencies in a report: tables in the terminal, and a metric over milliseconds per image with its Pareto front."""

from __future__ import annotations

import base64
import html
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from samplerbench.report.plots import metric_lines, render
from samplerbench.report.series import Series, pareto
from samplerbench.report.table import format_nfe, row_names
from samplerbench.report.wide import WideTable
from samplerbench.results.groups import Group
from samplerbench.results.latency import Latency, cell_of
from samplerbench.results.names import metric_title
from samplerbench.results.record import Record
from samplerbench.results.timings import describe_conditions
from samplerbench.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXIS = "milliseconds per image (p50)"
MIB = 2**20


# In the terminal


def latency_table(latencies: Sequence[Latency]) -> WideTable:
    """The times, throughput and cost of each configuration: one row each."""
    priced = any(latency.cost_per_1000_images is not None for latency in latencies)
    heads = ["sampler", "NFE", "batch", "p50 ms", "p95 ms", "images/s", *(["per 1,000"] if priced else [])]
    table = WideTable(heads, fixed=3)
    for name, latency in zip(_names(latencies), latencies, strict=True):
        cost = latency.cost_per_1000_images
        times = (_ms(latency.p50_seconds), _ms(latency.p95_seconds), _three(latency.images_per_second))
        price = [] if not priced else ["" if cost is None else _three(cost)]
        table.add_row(name, _nfe(latency), str(latency.batch_size), *times, *price)
    return table


def stage_table(latencies: Sequence[Latency]) -> WideTable:
    """The time of the stages of a batch, and the peak memory. Stages that no configuration has are left out."""
    names = ("encoder", "network", "guidance", "decoder", "rest")
    stages = [name for name in names if any(getattr(latency.stages, name) is not None for latency in latencies)]
    device = any(latency.peak_device_bytes is not None for latency in latencies)
    heads = ["sampler", "NFE", "batch", *(f"{name} ms" for name in stages), *(["GPU MiB"] if device else [])]
    table = WideTable([*heads, "host MiB"], fixed=3)
    for name, latency in zip(_names(latencies), latencies, strict=True):
        parts = [getattr(latency.stages, stage) for stage in stages]
        memory = [latency.peak_device_bytes] * device + [latency.peak_host_bytes]
        table.add_row(
            name,
            _nfe(latency),
            str(latency.batch_size),
            *("" if part is None else _ms(part) for part in parts),
            *("" if size is None else f"{size / MIB:.0f}" for size in memory),
        )
    return table


def describe_latencies(latencies: Sequence[Latency]) -> str:
    """The conditions that the latencies share: `digits, float32, cpu, 2 threads`."""
    first = latencies[0]
    return printable(f"{first.model}, {first.dtype}, {_conditions(first, batch=False)}")


def _names(latencies: Sequence[Latency]) -> list[str]:
    records = [{"sampler": m.sampler, "guidance": m.guidance, "spacing": m.spacing} for m in latencies]
    return row_names(records)


def _nfe(latency: Latency) -> str:
    return format_nfe(int(latency.nfe) if latency.nfe == int(latency.nfe) else latency.nfe)


def _ms(seconds: float) -> str:
    return _three(1000 * seconds)


def _three(value: float) -> str:
    """Three significant digits, or all digits before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def _conditions(latency: Latency, batch: bool = True) -> str:
    conditions = latency.conditions if batch else latency.conditions | {"batch_size": None}
    return describe_conditions(conditions) + (", compiled" if latency.compile else "")


# Quality against latency


@dataclass(frozen=True)
class Point:
    """A result with its latency.

    Attributes:
        label: name of the row.
        record: the result.
        latency: the latency of the same cell.
        value: value of the metric.
        optimal: whether the point is on the Pareto front.
    """

    label: str
    record: Record
    latency: Latency
    value: float
    optimal: bool


@dataclass(frozen=True)
class Tradeoff:
    """A metric over latency for the results of a group, measured under the same conditions.

    Attributes:
        group: the results.
        metric: name of the metric.
        points: the points, in the order of latency.
    """

    group: Group
    metric: str
    points: list[Point]

    @property
    def lower(self) -> bool:
        """Whether lower values of the metric are better."""
        return _better(self.group, self.metric) == "lower"

    @property
    def batch_size(self) -> int:
        """Images per batch."""
        return self.points[0].latency.batch_size

    @property
    def conditions(self) -> str:
        """The conditions as text: `cpu, 2 threads, batches of 4`."""
        return _conditions(self.points[0].latency)

    @property
    def title(self) -> str:
        """`FID over milliseconds per image; cpu, 2 threads, batches of 4`."""
        return printable(f"{metric_title(self.metric)} over milliseconds per image; {self.conditions}")

    @property
    def front(self) -> list[Point]:
        """The points on the Pareto front, from the fastest to the best."""
        return [point for point in self.points if point.optimal]

    def series(self) -> list[Series]:
        """One series for each row of the table, in the order of the table."""
        rows: dict[str, list[Point]] = defaultdict(list)
        for point in self.points:
            rows[point.label].append(point)
        return [
            Series(
                label,
                [p.latency.ms_per_image for p in points],
                [p.value for p in points],
                [p.record["metrics"][self.metric].get("sd") for p in points],
            )
            for label in self.group.rows()
            if (points := rows.get(label))
        ]


def tradeoffs(group: Group, latencies: Sequence[Latency], metrics: Sequence[str] = ()) -> list[Tradeoff]:
    """Combine the results of a group with the latencies of the same cells.

    Args:
        group: the results.
        latencies: the latencies.
        metrics: names of metrics. Empty for all metrics of the group.

    Returns:
        One item for each metric and each set of conditions with at least one point, small batches first.
    """
    by_conditions: dict[str, dict[tuple[Any, ...], Latency]] = defaultdict(dict)
    for latency in sorted(latencies, key=lambda found: found.batch_size):
        by_conditions[json.dumps(latency.conditions)][latency.cell] = latency
    found = []
    for metric in metrics or group.metrics():
        for cells in by_conditions.values():
            pairs = [
                (record, cells[cell_of(record)], float(record["metrics"][metric]["value"]))
                for record in group.records
                if metric in record["metrics"] and cell_of(record) in cells
            ]
            pairs = [pair for pair in pairs if pair[2] == pair[2] and abs(pair[2]) != float("inf")]
            if not pairs:
                continue
            lower = _better(group, metric) == "lower"
            front = set(pareto([(latency.ms_per_image, value) for _, latency, value in pairs], lower))
            points = [
                Point(group.label(r), r, latency, value, (latency.ms_per_image, value) in front)
                for r, latency, value in sorted(pairs, key=lambda pair: (pair[1].ms_per_image, pair[2]))
            ]
            found.append(Tradeoff(group, metric, points))
    return found


def _better(group: Group, metric: str) -> str:
    return str(next(r["metrics"][metric]["better"] for r in group.records if metric in r["metrics"]))


def tradeoff_figure(tradeoff: Tradeoff) -> Figure:
    """A metric over milliseconds per image, with the Pareto front."""
    front = [(point.latency.ms_per_image, point.value) for point in tradeoff.front]
    return metric_lines(
        tradeoff.group, tradeoff.metric, tradeoff.series(), AXIS, front=front, subtitle=tradeoff.conditions
    )


def tradeoff_figures(found: Sequence[Tradeoff]) -> dict[str, Callable[[], Figure]]:
    """The figures: file stem → function that draws the figure."""
    figures: dict[str, Callable[[], Figure]] = {}
    for tradeoff in found:
        plain = re.sub(r"[^A-Za-z0-9]+", "-", tradeoff.metric)
        stem, number = f"{plain}-vs-latency-batch-{tradeoff.batch_size}", 1
        while (name := stem if number == 1 else f"{stem}-{number}") in figures:
            number += 1
        figures[name] = lambda tradeoff=tradeoff: tradeoff_figure(tradeoff)  # type: ignore[misc]
    return figures


def front_table(tradeoff: Tradeoff) -> WideTable:
    """The Pareto front as a table, from the fastest to the best."""
    from samplerbench.report.table import format_value

    heads = ["Pareto front", "steps", "NFE", "ms per image", metric_title(tradeoff.metric)]
    table = WideTable(heads, fixed=2)
    for point in tradeoff.front:
        steps = "own" if point.record["steps"] is None else str(point.record["steps"])
        cost = format_nfe(point.record["nfe"])
        table.add_row(point.label, steps, cost, _three(point.latency.ms_per_image), format_value(point.value))
    return table


def html_section(found: Sequence[Tradeoff]) -> str:
    """A section of the HTML page with the figures as embedded SVG images. "" if there are none."""
    if not found:
        return ""
    figures = []
    for tradeoff in found:
        front = "; ".join(
            f"{p.label}, NFE {format_nfe(p.record['nfe'])}: {_three(p.latency.ms_per_image)} ms" for p in tradeoff.front
        )
        described = printable(f"{tradeoff.group.title + '; ' if tradeoff.group.title else ''}{tradeoff.title}")
        alt = html.escape(f"{described}. Pareto front: {front}", quote=True)
        figures.append(
            f'<figure><img src="{_svg(tradeoff_figure(tradeoff))}" alt="{alt}" loading="lazy">'
            f"<figcaption>{html.escape(described)}</figcaption></figure>"
        )
    return (
        '<section id="latency" aria-labelledby="latency-title"><h2 id="latency-title">Quality and latency</h2>'
        '<p class="quiet">The grey line is the Pareto front: no other sampler is both faster and better.</p>'
        f"{''.join(figures)}</section>"
    )


def _svg(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(render(figure, "svg")).decode("ascii")
