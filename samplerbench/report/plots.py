"""The figures of a report, as SVG and PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from samplerbench.report.matrix import Axis, column, default_axis
from samplerbench.report.series import Horizontal, Series, measured_order, pareto, series, sweeps
from samplerbench.report.sheet import block, tiles
from samplerbench.report.style import style
from samplerbench.results.groups import Group
from samplerbench.results.names import metric_title, own_head
from samplerbench.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"nfe": "NFE (network evaluations per image)", "steps": "steps", "seconds_per_image": "seconds per image"}
SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "samplerbench",
    "svg.fonttype": "none",
    "text.parse_math": False,
}


def figures(
    group: Group, pictures: dict[str, Path], metrics: Sequence[str] = (), by: Axis | None = None
) -> dict[str, Callable[[], Figure]]:
    """The figures of a group: file stem → function that draws the figure. by: the columns of the samples."""
    found: dict[str, Callable[[], Figure]] = {}
    chosen = list(metrics or group.metrics())
    stems = [re.sub(r"[^A-Za-z0-9]+", "-", metric) for metric in chosen]
    for i, (metric, plain) in enumerate(zip(chosen, stems, strict=True)):
        stem = f"{plain}-{stems[:i].count(plain) + 1}" if plain in stems[:i] else plain
        for horizontal in ("nfe", "seconds_per_image"):
            if series(group, metric, horizontal):
                name = f"{stem}-vs-{horizontal.replace('_', '-')}"
                found[name] = lambda m=metric, h=horizontal: metric_figure(group, m, h)  # type: ignore[misc]
        if sweeps(group, metric):
            found[f"{stem}-vs-guidance"] = lambda m=metric: guidance_figure(group, m)  # type: ignore[misc]
    if any(r["protocol"] in pictures for r in group.records):
        found["samples"] = lambda: samples_figure(group, pictures, by)
    return found


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write STEM.svg and STEM.png."""
    from samplerbench.results.files import write_atomically

    files = []
    for form in ("svg", "png"):
        files.append(stem.with_name(f"{stem.name}.{form}"))
        write_atomically(files[-1], render(figure, form))
    return files


def render(figure: Figure, form: str) -> bytes:
    """A figure as SVG or PNG, the same bytes for the same figure."""
    import matplotlib

    buffer = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else {}
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(buffer, format=form, dpi=160, bbox_inches="tight", metadata=metadata)
    return buffer.getvalue()


def metric_figure(group: Group, metric: str, horizontal: Horizontal) -> Figure:
    """A metric over the cost, ± one standard deviation over blocks. Over seconds, with the Pareto front."""
    found = series(group, metric, horizontal)
    lower = _better(group, metric) == "lower"
    order = metric == "gap" and horizontal == "nfe"
    notes = {s.label: f" (order {p:.1f})" for s in found if order and (p := measured_order(s)) is not None}
    front = None
    if horizontal == "seconds_per_image":
        front = pareto([p for s in found for p in zip(s.x, s.y, strict=True)], lower)
    times = group.describe_times() if horizontal == "seconds_per_image" else ""
    return metric_lines(group, metric, found, AXES[horizontal], notes, front, subtitle=times)


def guidance_figure(group: Group, metric: str) -> Figure:
    """A metric over the guidance scale."""
    return metric_lines(group, metric, sweeps(group, metric), "guidance scale", log_x=False)


def _better(group: Group, metric: str) -> str:
    return str(next(r["metrics"][metric]["better"] for r in group.records if metric in r["metrics"]))


def metric_lines(
    group: Group,
    metric: str,
    found: list[Series],
    name: str,
    notes: Mapping[str, str] = MappingProxyType({}),
    front: list[tuple[float, float]] | None = None,
    log_x: bool = True,
    subtitle: str = "",
) -> Figure:
    """A metric as one line for each row.

    Args:
        group: the results.
        metric: name of the metric.
        found: the lines.
        name: label of the horizontal axis.
        notes: additions to the labels of lines.
        front: points of the Pareto front. None for no front.
        log_x: whether the horizontal axis is logarithmic.
        subtitle: second line of the title.
    """
    import matplotlib

    from samplerbench.report.notebook_figure import NotebookFigure

    entry = next(r["metrics"][metric] for r in group.records if metric in r["metrics"])
    with matplotlib.rc_context(SETTINGS):
        figure = NotebookFigure(SETTINGS, figsize=(6.4, max(3.6, 0.22 * len(found))), layout="constrained")
        axes = figure.subplots()
        for i, s in enumerate(found):
            look = style(i)
            axes.plot(s.x, s.y, label=s.label + notes.get(s.label, ""), linewidth=1.5, markersize=5, **look)  # type: ignore[arg-type]
            if any(s.sd):
                sd = [d or 0.0 for d in s.sd]
                low = [_above_zero(y, d) for y, d in zip(s.y, sd, strict=True)]
                high = [y + d for y, d in zip(s.y, sd, strict=True)]
                axes.fill_between(s.x, low, high, color=look["color"], alpha=0.15, linewidth=0)
        if front and len(front) > 1:
            axes.step(
                *zip(*front, strict=True),
                where="post",
                color="#000000",
                linewidth=4,
                alpha=0.22,
                label="Pareto front",
                zorder=0,
                solid_capstyle="round",
            )
        values = [y for s in found for y in s.y]
        if entry["better"] == "lower" and min(values) > 0:
            axes.set_yscale("log")
            plain_ticks(axes.yaxis, values)
        if log_x and min(x for s in found for x in s.x) > 0:
            axes.set_xscale("log")
            plain_ticks(axes.xaxis, [x for s in found for x in s.x])
        arrow = "↓" if entry["better"] == "lower" else "↑"
        axes.set_xlabel(name)
        axes.set_ylabel(printable(f"{metric_title(metric)} {arrow}"))
        title = printable("; ".join(filter(None, [group.describe(), entry["features"]])))
        title += f"\n{printable(subtitle)}" if subtitle else ""
        axes.set_title(title, fontsize=8, color="#555555", loc="left")
        figure.legend(loc="outside right center", fontsize=8, handlelength=3)
    return figure


def _above_zero(y: float, d: float) -> float:
    """The lower edge of a band, above zero on a log axis."""
    return y - d if y > d or y <= 0 else y / 10


def plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks at 1, 2 and 5 if the axis has little more than a decade; numbers without exponents."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    few = max(values) / min(values) < 300
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def samples_figure(
    group: Group, pictures: dict[str, Path], by: Axis | None = None, count: int = 6, across: int = 3
) -> Figure:
    """The first images of every cell, in the columns of the table, with the same x_T in the same place of each.

    Only the results of the first seed, since another seed is another x_T.
    """
    import matplotlib
    from matplotlib.figure import Figure

    seed = group.records[0]["seed"]
    axis = by or default_axis(group)
    shown = [r for r in group.records if r["protocol"] in pictures and r["seed"] == seed]
    places = {column(r, axis) for r in shown}
    columns: list[int | None] = [*sorted(c for c in places if c is not None), *([None] if None in places else [])]
    rows = list(dict.fromkeys(group.label(r) for r in shown))
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(1.4 * len(columns) + 1.6, 1.0 * len(rows) + 0.5), layout="constrained")
        grid = figure.subplots(len(rows), len(columns), squeeze=False)
        for line in grid:
            for axes in line:
                _bare(axes)
        cells = {(group.label(r), column(r, axis)): r for r in sorted(shown, key=lambda r: r["nfe"])}
        for (row, place), r in cells.items():
            images = tiles(pictures[r["protocol"]], r, count)
            axes = grid[rows.index(row)][columns.index(place)]
            if images:
                axes.imshow(block(images, across), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        for i, name in enumerate(rows):
            grid[i][0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        own = own_head([r for r in shown if column(r, axis) is None])
        for j, place in enumerate(columns):
            unit = "NFE" if axis == "nfe" else "step" if place == 1 else "steps"
            grid[0][j].set_title(own if place is None else f"{place} {unit}", fontsize=8)
    return figure


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
