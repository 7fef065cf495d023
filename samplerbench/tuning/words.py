"""The verdicts of `samplerbench tune` and `samplerbench recommend`, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from samplerbench.results.compare import Difference
from samplerbench.results.names import metric_title
from samplerbench.tuning.search import Row, Tuned

if TYPE_CHECKING:
    from samplerbench.tuning.recommend import Recommendation

LISTED = 3
"""Candidates that cannot be told from the winner and are named in a verdict."""


def verdict(tuned: Tuned) -> str:
    """The result of the search of a budget in one paragraph.

    Args:
        tuned: the result.
    """
    start = f"{tuned.nfe} evaluations: {named(tuned.winner)} has {_value(tuned)} on images that the search did not use"
    compared = f"The search compared {tuned.tried} candidates.{_search_value(tuned.winner, 'In it,')}"
    return " ".join([f"{start}{_against_default(tuned)}", compared, *_ties(tuned)])


def recommended(found: Recommendation) -> str:
    """A recommendation in one paragraph.

    Args:
        found: the recommendation.
    """
    choice = found.choice
    of = "fresh images" if found.source == "results" else "images that the search did not use"
    length = f"{choice.steps} step{'s' if choice.steps > 1 else ''}"
    start = f"For {found.model} at {found.budget.text}, use {named(choice)}, {length}."
    if choice is found.winner or choice.candidate == found.winner.candidate:
        what = f"It has {_value(found)} on {of}"
    else:
        what = f"The best candidate, {named(found.winner)}, has {_value(found)} on {of}"
    parts = [start, f"{what}{_against_default(found)}"]
    compared = "existing results" if found.source == "results" else "candidates of a search"
    parts.append(f"{found.tried} {compared} were compared.{_search_value(found.winner, 'There,')}")
    if found.milliseconds is not None:
        latency = found.milliseconds[0 if choice is found.winner else 1]
        parts.append(f"An image takes {latency:.3g} ms ({found.conditions}).")
    return " ".join([*parts, *_ties(found)])


def _against_default(found: Tuned | Recommendation) -> str:
    winner, default, difference = found.winner, found.best_default, found.difference
    if winner.candidate == default.candidate and winner.nfe == default.nfe:
        return ". It is a default row: nothing better was found."
    versus = f"the best default row, {named(default)}, {_plus_minus(default)}"
    if difference.tied:
        return f". This is not significantly different from {versus}; the default row is the simpler choice."
    word = "better" if found.improvement > 0 else "worse"
    end = "" if found.improvement > 0 else "; use the default row"
    return f", {_change(difference)} {word} than {versus}{end}."


def _search_value(row: Row, where: str) -> str:
    return f" {where} the winner had {row.search:.4g}, which is biased: it is the best of many values."


def _ties(found: Tuned | Recommendation) -> list[str]:
    if not found.tied:
        return []
    listed = "; ".join(found.tied[:LISTED])
    more = f"; and {len(found.tied) - LISTED} more" if len(found.tied) > LISTED else ""
    many = f"{len(found.tied)} candidates" if len(found.tied) > 1 else "One candidate"
    return [f"{many} could not be distinguished from the winner before the last measurement: {listed}{more}."]


def named(row: Row) -> str:
    """A row in words: `ipndm + cfg:scale=2 with the spacing logsnr`.

    Args:
        row: the row.
    """
    guided = f" + {row.candidate.guidance}" if row.candidate.guidance else ""
    spacing = f" with the spacing {row.spacing}" if row.spacing else ""
    return f"{row.candidate.sampler}{guided}{spacing}"


def _value(found: Tuned | Recommendation) -> str:
    title = metric_title(found.metric)
    return f"{title} {_plus_minus(found.winner)} ({found.images} images, 95% interval)"


def _plus_minus(row: Row) -> str:
    return f"{row.fresh.value:.4g} ± {row.fresh.high - row.fresh.value:.2g}"


def _change(difference: Difference) -> str:
    return f"{abs(difference.mean):.3g} ± {difference.margin:.2g}"


__all__ = ["named", "recommended", "verdict"]
