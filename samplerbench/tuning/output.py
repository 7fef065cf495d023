"""What `samplerbench tune` and `samplerbench recommend` write: a suite, and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from samplerbench.bench.request import Request
from samplerbench.tuning.figure import Dot, Mark, pareto_figure
from samplerbench.tuning.recommend import Recommendation
from samplerbench.tuning.search import FRESH, Tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def suite(request: Request, results: Sequence[Tuned | Recommendation], n: int, seed: int, name: str = "tuned") -> str:
    """The text of a suite that measures the winners and the best default rows again, with the noise of the verdict.

    Args:
        request: the request of the search.
        results: the results, one per budget.
        n: images per seed.
        seed: seed of the last measurement.
        name: name of the suite.
    """
    fields: dict[str, Any] = {"name": name, "model": request.model, "labels": request.labels, "n": n}
    fields |= {"blocks": FRESH, "seeds": [seed], "dtype": request.dtype}
    fields |= {"metrics": [metric.spec for metric in request.metrics]}
    for field in (
        "features",
        "features_weights",
        "data",
        "revision",
        "variant",
        "prompts",
        "negative_prompt",
        "config",
    ):
        value = getattr(request, field)
        fields |= {} if value is None else {field: list(value) if isinstance(value, tuple) else value}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    for result in results:
        rows = {(row.candidate, row.nfe): row for row in (result.winner, result.best_default)}.values()
        for row in rows:
            lines += ["", "[[grid]]", f"samplers = {json.dumps([row.candidate.sampler])}", f"nfe = [{row.nfe}]"]
            if row.candidate.guidance:
                lines.append(f"guidances = {json.dumps([row.candidate.guidance])}")
            if row.candidate.spacing:
                lines.append(f"spacings = {json.dumps([row.candidate.spacing])}")
    return "\n".join(lines) + "\n"


def search_figure(results: Sequence[Tuned], model: str) -> Figure:
    """The plot of a search: the metric over network evaluations per image, for all budgets.

    Args:
        results: the results, one per budget.
        model: source of the model.
    """
    dots = [Dot(point.evaluations, point.value, point.default) for tuned in results for point in tuned.points]
    marks = []
    for tuned in results:
        marks.append(Mark(tuned.winner.evaluations, tuned.winner, "winner, fresh images", True))
        if tuned.best_default.candidate != tuned.winner.candidate:
            marks.append(Mark(tuned.best_default.evaluations, tuned.best_default, "best default, fresh images", False))
    first = results[0]
    title = f"{model}; {first.images} fresh images of each marked row, with 95% intervals"
    return pareto_figure(dots, marks, first.metric, first.better, "NFE (network evaluations per image)", title)


def recommendation_figure(found: Recommendation) -> Figure:
    """The plot of a recommendation: the metric over the latency or the network evaluations per image.

    Args:
        found: the recommendation.
    """
    marks = [Mark(found.cost[0], found.winner, "winner, fresh images", True)]
    if found.best_default.candidate != found.winner.candidate:
        marks.append(Mark(found.cost[1], found.best_default, "best default, fresh images", False))
    timed = found.budget.milliseconds is not None
    axis = "milliseconds per image (p50)" if timed else "NFE (network evaluations per image)"
    limit = float(found.budget.milliseconds or found.budget.nfe or 0)
    title = f"{found.model}; {found.images} fresh images of each marked row, with 95% intervals"
    title += f"\n{found.conditions}" if found.conditions else ""
    return pareto_figure(found.dots, marks, found.metric, found.better, axis, title, limit)


__all__ = ["recommendation_figure", "search_figure", "suite"]
