"""The plot of a search or a recommendation: a metric over the cost, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from samplerbench.report.plots import SETTINGS, plain_ticks
from samplerbench.report.series import pareto
from samplerbench.report.style import COLOURS
from samplerbench.results.names import metric_title
from samplerbench.text import printable
from samplerbench.tuning.search import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Dot:
    """A candidate in the plot.

    Attributes:
        cost: evaluations or milliseconds per image.
        value: the metric.
        default: whether it is a default row.
    """

    cost: float
    value: float
    default: bool


@dataclass(frozen=True)
class Mark:
    """A row that was measured with fresh noise.

    Attributes:
        cost: evaluations or milliseconds per image.
        row: the row.
        label: entry of the legend.
        winner: whether it is a winner, and not a best default row.
    """

    cost: float
    row: Row
    label: str
    winner: bool


def pareto_figure(
    dots: Sequence[Dot],
    marks: Sequence[Mark],
    metric: str,
    better: str,
    axis: str,
    title: str,
    budget: float | None = None,
) -> Figure:
    """A metric over the cost.

    Values of the search are dots; the front through them is grey. Fresh values have their 95% interval.

    Args:
        dots: the candidates that were measured.
        marks: the rows that were measured again.
        metric: name of the metric.
        better: "lower" or "higher".
        axis: label of the horizontal axis.
        title: title.
        budget: position of a vertical line. None for no line.
    """
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    from samplerbench.report.notebook_figure import NotebookFigure

    lower = better == "lower"
    values = [dot.value for dot in dots] + [mark.row.fresh.value for mark in marks]
    log = lower and min(values) > 0
    with matplotlib.rc_context(SETTINGS):
        figure = NotebookFigure(SETTINGS, figsize=(6.8, 3.8), layout="constrained")
        axes = figure.subplots()
        looks: tuple[tuple[bool, str, dict[str, Any]], ...] = (
            (False, "candidates", {"color": "#999999", "s": 12, "alpha": 0.7}),
            (True, "default rows", {"facecolors": "none", "edgecolors": COLOURS[0], "s": 22, "linewidths": 1}),
        )
        for default, label, look in looks:
            chosen = [dot for dot in dots if dot.default == default]
            if chosen:
                axes.scatter([d.cost for d in chosen], [d.value for d in chosen], label=label, zorder=2, **look)
        front = pareto([(dot.cost, dot.value) for dot in dots], lower)
        if len(front) > 1:
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
        for mark in marks:
            fresh = mark.row.fresh
            low = fresh.low if not log or fresh.low > 0 else fresh.value / 10  # above zero on a log axis
            axes.errorbar(
                [mark.cost],
                [fresh.value],
                yerr=[[fresh.value - low], [fresh.high - fresh.value]],
                fmt="*" if mark.winner else "s",
                markersize=11 if mark.winner else 6,
                color=COLOURS[1] if mark.winner else COLOURS[2],
                capsize=3,
                linewidth=1.2,
                label=printable(mark.label),
                zorder=4 if mark.winner else 3,
            )
        if budget is not None:
            axes.axvline(budget, color="#777777", linewidth=1, linestyle=":", label="budget", zorder=1)
        if log:
            axes.set_yscale("log")
            plain_ticks(axes.yaxis, values)
        costs = [dot.cost for dot in dots] + [mark.cost for mark in marks]
        if min(costs) > 0 and max(costs) > 2 * min(costs):
            axes.set_xscale("log")
            plain_ticks(axes.xaxis, costs)
        elif all(cost == int(cost) for cost in costs):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(axis)
        axes.set_ylabel(printable(f"{metric_title(metric)} {'↓' if lower else '↑'}"))
        axes.set_title("\n".join(map(printable, title.splitlines())), fontsize=8, color="#555555", loc="left")
        handles, labels = axes.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        figure.legend(once.values(), once.keys(), loc="outside right center", fontsize=8)
    return figure


__all__ = ["Dot", "Mark", "pareto_figure"]
