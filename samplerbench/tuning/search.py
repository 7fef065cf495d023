"""The search of `samplerbench tune`: candidates are proposed, races drop them, and the winner is measured again."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samplerbench.bench.cell import Cell
from samplerbench.errors import UserError
from samplerbench.registry import split
from samplerbench.results.compare import Difference, paired_difference
from samplerbench.tuning.arena import Arena, Entry
from samplerbench.tuning.proposals import Proposals
from samplerbench.tuning.space import Candidate, Space

RUNGS = (3, 5, 8)
"""Numbers of seeds after which candidates are compared."""
KEPT = (8, 4, 4)
"""Largest number of candidates that stay after each comparison."""
BATCH = 8
"""Candidates that are proposed before the next race."""
IDLE = 5
"""The search ends after this many batches without a candidate that can be run."""
FRESH = 8
"""Blocks of the last measurement."""
FRESH_OFFSET = 1_000_000
"""Distance of its seed from the first one of the search, which never uses it."""


@dataclass(frozen=True)
class Limit:
    """When a search ends. The default rows are measured in any case.

    Attributes:
        evaluations: network evaluations, summed over images, of the search of one budget. None for no limit.
        seconds: seconds of the search of one budget, those of an earlier run included. None for no limit.
    """

    evaluations: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class ConfidenceInterval:
    """A mean with Student's 95% interval over blocks."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> ConfidenceInterval:
        """The interval of some values, at least two."""
        from scipy.stats import t

        mean, n = statistics.fmean(values), len(values)
        half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
        return cls(mean, mean - half, mean + half)

    def as_dict(self) -> dict[str, float]:
        """`value`, `low` and `high`."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Row:
    """A candidate after the search.

    Attributes:
        candidate: the candidate.
        spacing: spec of the spacing that it used. None for a method with noise levels of its own.
        nfe: the budget, in network evaluations per image.
        steps: number of steps that fit into the budget.
        evaluations: network evaluations per image, counted. At most `nfe`.
        search: mean of the metric over the seeds of the search.
        fresh: the metric on noise that the search never used.
        sigmas: noise levels of the steps, `steps` + 1 of them, the last one 0.
    """

    candidate: Candidate
    spacing: str | None
    nfe: int
    steps: int
    evaluations: float
    search: float
    fresh: ConfidenceInterval
    sigmas: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """The settings of the row."""
        settings = {"sampler": self.candidate.sampler, "guidance": self.candidate.guidance, "spacing": self.spacing}
        return {**settings, "nfe": self.nfe, "steps": self.steps}


@dataclass(frozen=True, eq=False)
class Point:
    """A candidate that was measured, for a plot.

    Attributes:
        candidate: the candidate.
        cell: its cell.
        evaluations: network evaluations per image, counted.
        value: mean of the metric over the seeds that were measured.
        default: whether it is a default row.
    """

    candidate: Candidate
    cell: Cell
    evaluations: float
    value: float
    default: bool


@dataclass(frozen=True)
class Tuned:
    """The result of the search of one budget.

    Attributes:
        nfe: the budget of the winner, in network evaluations per image.
        metric: name of the metric.
        better: "lower" or "higher".
        images: number of images of the fresh measurement, as text: `8 × 200`.
        winner: the best candidate.
        best_default: the best of the default rows.
        difference: fresh value of the winner minus that of the best default row, paired by block, with a 95% interval.
        tied: labels of candidates that the search cannot tell from the winner.
        tried: number of candidates that were measured, default rows included.
        refused: number of proposals that could not be run.
        evaluations: network evaluations of the search, summed over images.
        seconds: seconds of the search and the fresh measurement, those of an earlier run included.
        points: all candidates that were measured.
    """

    nfe: int
    metric: str
    better: str
    images: str
    winner: Row
    best_default: Row
    difference: Difference
    tied: tuple[str, ...]
    tried: int
    refused: int
    evaluations: int
    seconds: float
    points: tuple[Point, ...] = ()

    @property
    def improvement(self) -> float:
        """By how much the winner is better than the best default row. Negative if it is worse."""
        return -self.difference.mean if self.better == "lower" else self.difference.mean

    def as_dict(self) -> dict[str, Any]:
        """The result as it is written to JSON."""
        return {
            "nfe": self.nfe,
            "metric": self.metric,
            "better": self.better,
            "winner": self.winner.as_dict(),
            "fresh": self.winner.fresh.as_dict(),
            "search_best": self.winner.search,
            "best_default": {
                **self.best_default.as_dict(),
                "fresh": self.best_default.fresh.as_dict(),
                "search": self.best_default.search,
            },
            "difference": {
                "value": self.difference.mean,
                "low": self.difference.mean - self.difference.margin,
                "high": self.difference.mean + self.difference.margin,
                "tied": self.difference.tied,
            },
            "tied": list(self.tied),
            "tried": self.tried,
            "refused": self.refused,
            "evaluations": self.evaluations,
            "seconds": round(self.seconds, 3),
        }


def race(arena: Arena, entries: Sequence[Entry], seed: int) -> list[Entry]:
    """Measure candidates with more and more seeds, and drop those that are worse than the leader.

    A candidate is dropped if the 95% interval of its paired difference to the leader is above 0. At most `KEPT`
    candidates stay. This is sequential racing with common random numbers (Maron & Moore 1994; Birattari et al. 2002).

    Args:
        arena: measures the candidates.
        entries: the candidates.
        seed: first seed of the search.

    Returns:
        The candidates that were not dropped, the best one first.
    """
    alive = list(dict.fromkeys(entries))
    for rung, most in zip(RUNGS, KEPT, strict=True):
        seeds = range(seed, seed + rung)
        arena.measure(alive, seeds)
        alive = sorted((e for e in alive if e.reason is None and e.cell is not None), key=lambda e: e.mean(seeds))
        alive = [e for e in alive if not _worse(e, alive[0], seeds)][:most]
    return alive


def _worse(entry: Entry, leader: Entry, seeds: Sequence[int]) -> bool:
    if entry is leader:
        return False
    difference = paired_difference(entry.at(seeds), leader.at(seeds))
    return difference.mean > difference.margin


def tune(
    arena: Arena,
    space: Space,
    nfe: int | Mapping[str | None, int],
    seed: int,
    limit: Limit,
    say: Callable[[str], None] = lambda line: None,
    fits: Callable[[Entry], bool] = lambda entry: True,
) -> Tuned:
    """Search the best candidate at a budget.

    The default rows race first. Then `Proposals` are made in batches, which race against the leader, until the limit is
    reached or every proposal was tried. At the end, the winner and the best default row are measured on
    new noise: the value of the search is the smallest of many noisy ones, and therefore too good.

    With the same folder, an interrupted search continues. If the limit is in evaluations, the result depends only on
    the arguments.

    Args:
        arena: measures the candidates.
        space: the candidates.
        nfe: the budget, in network evaluations per image. A mapping has one for the name of each guidance.
        seed: first seed of the search, and seed of the proposals.
        limit: when the search ends.
        say: called with a line about the progress.
        fits: called with each new leader. A leader for which it returns false is dropped. It may be called again.

    Raises:
        NothingFitsError: if no default row can be run at this budget.
        UserError: if Optuna is not installed.
        Stopped: if the arena is stopped. What is finished is kept.
    """
    start, seconds = arena.evaluations, arena.seconds
    seeds = range(seed, seed + RUNGS[-1])

    def planned(candidate: Candidate) -> Entry:
        return arena.entry(candidate, budget_of(candidate, nfe))

    proposals = Proposals(space, seed)  # before anything is measured: it needs Optuna
    rows = {candidate: planned(candidate) for candidate in space.defaults()}
    alive = _race_until_it_fits(arena, list(rows.values()), seed, fits)
    if not alive:
        reasons = "; ".join(f"{c.label}: {e.reason}" for c, e in list(rows.items())[:3])
        raise NothingFitsError(f"no sampler can be run with {_budgets(nfe)} evaluations ({reasons}).")
    best_default = leader = alive[0]
    for candidate, entry in rows.items():
        proposals.add(candidate, _score(entry, seed))
    measured, refused = {e: True for e in rows.values() if e.reason is None}, 0
    idle = 0
    while idle < IDLE and not _ended(limit, arena.evaluations - start, arena.seconds - seconds):
        line = f"{len(measured)} candidates, best {arena.sign * leader.mean(seeds):.4g} of {leader.candidate.label}"
        say(f"{_budgets(nfe)} evaluations: {line}")
        batch = {candidate: planned(candidate) for candidate in proposals.batch(BATCH)}
        if not batch:
            break
        alive = _race_until_it_fits(arena, [leader, *batch.values()], seed, fits)
        leader = alive[0]
        for candidate, entry in batch.items():
            proposals.tell(candidate, _score(entry, seed))
            refused += entry.reason is not None
        new = {entry: False for entry in batch.values() if entry.reason is None and entry not in measured}
        measured |= new
        idle = 0 if new else idle + 1
    tied = tuple(e.candidate.label for e in alive if e is not leader)
    chosen = ((leader, leader.mean(seeds)), (best_default, best_default.mean(seeds)))
    winner, default, difference = measure_fresh(arena, *chosen, seed + FRESH_OFFSET)
    return Tuned(
        winner.nfe,
        arena.metric,
        "lower" if arena.sign == 1 else "higher",
        f"{FRESH} × {arena.n}",
        winner,
        default,
        difference,
        tied,
        len(measured),
        refused,
        arena.evaluations - start,
        arena.seconds - seconds,
        tuple(_point(arena, entry, usual) for entry, usual in measured.items() if entry.values),
    )


class NothingFitsError(UserError):
    """No default row can be run within the budget."""


def budget_of(candidate: Candidate, nfe: int | Mapping[str | None, int]) -> int:
    """The budget of a candidate, in network evaluations per image.

    Args:
        candidate: the candidate.
        nfe: the budget, or one for the name of each guidance.
    """
    if not isinstance(nfe, Mapping):
        return nfe
    return nfe[None if candidate.guidance is None else split(candidate.guidance)[0]]


def measure_fresh(
    arena: Arena, leader: tuple[Entry, float], best_default: tuple[Entry, float], seed: int
) -> tuple[Row, Row, Difference]:
    """Measure the winner and the best default row on noise that was not used to choose them.

    Args:
        arena: measures the candidates.
        leader: the winner, and the value by which it was chosen (lower is better).
        best_default: the best default row and its value. It may be the winner.
        seed: seed of the noise.

    Returns:
        The two rows, and the paired difference of the first to the second.
    """
    chosen = (leader, best_default)
    records = arena.measure_again([entry for entry, _ in chosen], seed, FRESH)
    values = [record["metrics"][arena.metric]["blocks"] for record in records]
    rows = [
        row_of(entry, arena.sign * value, blocks, record)
        for (entry, value), blocks, record in zip(chosen, values, records, strict=True)
    ]
    return rows[0], rows[1], paired_difference(*values)


def _race_until_it_fits(
    arena: Arena, entries: Sequence[Entry], seed: int, fits: Callable[[Entry], bool]
) -> list[Entry]:
    """Race candidates. If the best one does not fit, it is dropped, and the others race again."""
    while (alive := race(arena, [entry for entry in entries if entry.reason is None], seed)) and not fits(alive[0]):
        alive[0].reason = alive[0].reason or "it takes longer than the budget"
    return alive


def _budgets(nfe: int | Mapping[str | None, int]) -> str:
    if not isinstance(nfe, Mapping):
        return str(nfe)
    return " or ".join(map(str, dict.fromkeys(nfe.values())))


def _score(entry: Entry, seed: int) -> float:
    """The value that the proposals learn from. Infinity for a candidate that cannot be run."""
    return entry.mean(range(seed, seed + RUNGS[0]))


def _ended(limit: Limit, evaluations: int, seconds: float) -> bool:
    return (limit.evaluations is not None and evaluations >= limit.evaluations) or (
        limit.seconds is not None and seconds >= limit.seconds
    )


def row_of(entry: Entry, search: float, values: Sequence[float], record: Mapping[str, Any]) -> Row:
    """The row of a candidate.

    Args:
        entry: the candidate.
        search: its value in the search.
        values: its fresh values.
        record: the record of the fresh measurement.
    """
    cell = entry.cell
    assert cell is not None
    assert cell.steps is not None
    assert cell.budget is not None
    return Row(
        entry.candidate,
        None if cell.spacing is None else cell.spacing.spec,
        cell.budget,
        cell.steps,
        float(record.get("nfe") or cell.budget),
        search,
        ConfidenceInterval.of(values),
        tuple(cell.sigmas.tolist()),
    )


def _point(arena: Arena, entry: Entry, default: bool) -> Point:
    assert entry.cell is not None
    budget = entry.cell.budget or 0
    return Point(entry.candidate, entry.cell, entry.nfe or budget, arena.sign * entry.mean([*entry.values]), default)


__all__ = ["ConfidenceInterval", "Limit", "NothingFitsError", "Point", "Row", "Tuned", "measure_fresh", "race", "tune"]
