"""What `samplerbench tune` gives: a verdict, a suite, and lines of diffusers code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from samplerbench.bench.request import Request
from samplerbench.tuning.search import FRESH, Row, Tuned


def verdict(tuned: Tuned) -> str:
    """One sentence about the result of a budget.

    Args:
        tuned: the result.
    """
    winner, default, metric = tuned.winner, tuned.best_default, tuned.metric
    value = f"{_named(winner)} has {metric} {_plus_minus(winner)}"
    start = f"{tuned.nfe} evaluations: {value} on images that the search did not use"
    if winner.candidate == default.candidate:
        return f"{start}. It is a default row: the search found nothing better."
    versus = f"the best default row, {default.candidate.label}, {_plus_minus(default)}"
    if tuned.difference.tied:
        return f"{start}. This is not significantly different from {versus}."
    word = "better" if tuned.improvement > 0 else "worse"
    change = f"{abs(tuned.difference.mean):.3g} ± {tuned.difference.margin:.2g}"
    return f"{start}, {change} {word} than {versus}."


def _named(row: Row) -> str:
    guided = f" + {row.candidate.guidance}" if row.candidate.guidance else ""
    spacing = f" with the spacing {row.spacing}" if row.spacing else ""
    return f"{row.candidate.sampler}{guided}{spacing}"


def _plus_minus(row: Row) -> str:
    return f"{row.fresh.value:.4g} ± {row.fresh.high - row.fresh.value:.2g}"


def suite(request: Request, results: Sequence[Tuned], n: int, seed: int) -> str:
    """The text of a suite that measures the winners and the best default rows again, with the noise of the verdict.

    Args:
        request: the request of the search.
        results: the results, one per budget.
        n: images per seed.
        seed: seed of the last measurement.
    """
    fields: dict[str, Any] = {"name": "tuned", "model": request.model, "labels": request.labels, "n": n}
    fields |= {"blocks": FRESH, "seeds": [seed], "dtype": request.dtype}
    fields |= {"metrics": [metric.spec for metric in request.metrics]}
    for name in ("features", "features_weights", "data", "revision", "variant", "prompts", "negative_prompt", "config"):
        value = getattr(request, name)
        fields |= {} if value is None else {name: list(value) if isinstance(value, tuple) else value}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    for tuned in results:
        rows = {row.candidate: row for row in (tuned.winner, tuned.best_default)}.values()
        for row in rows:
            lines += ["", "[[grid]]", f"samplers = {json.dumps([row.candidate.sampler])}", f"nfe = [{tuned.nfe}]"]
            if row.candidate.guidance:
                lines.append(f"guidances = {json.dumps([row.candidate.guidance])}")
            if row.candidate.spacing:
                lines.append(f"spacings = {json.dumps([row.candidate.spacing])}")
    return "\n".join(lines) + "\n"


def snippet(row: Row) -> str:
    """Python code that uses a row in a diffusers pipeline `pipe`.

    Guidance is that of the pipeline: `as_scheduler` replaces the sampler only.

    Args:
        row: the row.
    """
    spacing = "" if row.spacing is None else f", spacing={json.dumps(row.spacing)}"
    return (
        "from samplerbench.diffusers import as_scheduler\n\n"
        f"pipe.scheduler = as_scheduler({json.dumps(row.candidate.sampler)}, pipe.scheduler{spacing})\n"
        f"images = pipe(num_inference_steps={row.steps}).images\n"
    )


__all__ = ["snippet", "suite", "verdict"]
