"""The data of the plots."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from samplerbench.report.table import deviation_of
from samplerbench.results.groups import Group
from samplerbench.results.names import RowNames
from samplerbench.results.record import Record
from samplerbench.text import printable

Horizontal = Literal["nfe", "steps", "seconds_per_image"]


@dataclass(frozen=True)
class Series:
    """The points of one row of the table, in the order of x. sd: standard deviations (`deviation_of`)."""

    label: str
    x: list[float]
    y: list[float]
    sd: list[float | None]


def series(group: Group, metric: str, horizontal: Horizontal) -> list[Series]:
    """A metric over evaluations, steps or seconds per image, one series per row."""
    found: dict[str, list[tuple[float, float, float | None]]] = defaultdict(list)
    for r in group.records:
        x = group.seconds_per_image(r) if horizontal == "seconds_per_image" else r[horizontal]
        if metric in r["metrics"] and horizontal == "nfe" and not x:  # only data was measured
            x = r["metrics"][metric].get("nfe", 0)
        if metric in r["metrics"] and x is not None and math.isfinite(r["metrics"][metric]["value"]):
            entry = r["metrics"][metric]
            found[group.label(r)].append((float(x), float(entry["value"]), deviation_of(entry)))
    return [_series(label, points) for label, points in found.items()]


def _series(label: str, points: list[tuple[float, float, float | None]]) -> Series:
    points = sorted(points, key=lambda p: p[0])
    return Series(label, [p[0] for p in points], [p[1] for p in points], [p[2] for p in points])


def sweeps(group: Group, metric: str) -> list[Series]:
    """A metric over the guidance scale: one series per sampler, steps and guidance with at least two scales."""
    found: dict[str, list[tuple[float, float, float | None]]] = defaultdict(list)
    names = RowNames(group.records)
    for r in group.records:
        guidance = r["protocol_fields"].get("guidance")
        scale = guidance.get("parameters", {}).get("scale") if isinstance(guidance, dict) else None
        entry = r["metrics"].get(metric)
        if isinstance(scale, int | float) and entry is not None and math.isfinite(entry["value"]):
            found[_sweep(group, names, r)].append((float(scale), float(entry["value"]), deviation_of(entry)))
    return [_series(label, points) for label, points in found.items() if len({p[0] for p in points}) > 1]


def _sweep(group: Group, names: RowNames, record: Record) -> str:
    """The name of a row without the guidance scale, and the steps."""
    added = group.label(record).removeprefix(printable(names.row(record)))  # spacing, seed and other fields
    label = printable(names.row(record, hide={"scale"})) + added
    return f"{label}, " + ("own steps" if record["steps"] is None else f"{record['steps']} steps")


def pareto(points: Sequence[tuple[float, float]], lower: bool) -> list[tuple[float, float]]:
    """The Pareto front of cost (x, lower is better) and quality (y), in the order of x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], p[1] if lower else -p[1])):
        if not front or (y < front[-1][1] if lower else y > front[-1][1]):
            front.append((x, y))
    return front


def measured_order(found: Series) -> float | None:
    """Order p of convergence from the slope of log gap over log NFE, by least squares.

    The gap is a mean squared distance, so gap ∝ NFE^(-2p) and p is minus half of the slope. None with fewer than two
    points.
    """
    points = [(math.log(x), math.log(y)) for x, y in zip(found.x, found.y, strict=True) if x > 0 and y > 0]
    if len({x for x, _ in points}) < 2:
        return None
    middle = sum(x for x, _ in points) / len(points)
    slope = sum((x - middle) * y for x, y in points) / sum((x - middle) ** 2 for x, _ in points)
    return -slope / 2
