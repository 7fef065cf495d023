"""The settings to use for a model within a number of evaluations or a time per image: `samplerbench recommend`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from samplerbench.bench.latency import REPEATS, prepare_latency
from samplerbench.bench.request import Request
from samplerbench.errors import RunError, UserError, argument
from samplerbench.models.model import Model
from samplerbench.registry import split
from samplerbench.results.compare import Difference
from samplerbench.results.store import Store
from samplerbench.tuning.arena import Arena, Entry
from samplerbench.tuning.clock import Clock
from samplerbench.tuning.code import Code, Elsewhere, code_of, elsewhere, pipeline_of
from samplerbench.tuning.figure import Dot
from samplerbench.tuning.search import (
    FRESH,
    FRESH_OFFSET,
    Limit,
    NothingFitsError,
    Point,
    Row,
    Tuned,
    budget_of,
    measure_fresh,
    tune,
)
from samplerbench.tuning.space import Space
from samplerbench.tuning.stored import Stored, best_of, compared, images_per_block, stored_rows, suffices
from samplerbench.tuning.words import recommended

DEFAULT_N = 200
"""Images per block without results whose number could be used."""
TRIES = 6
"""Number of times that a search is repeated with one evaluation less, if nothing fits into the time."""
SLACK = 1.1
"""Rows whose predicted latency is at most this many times the budget are measured."""
DRAWN = 4
"""Number of candidates whose latency is measured only for the plot: the best ones, and the best of their cost."""

Source = Literal["auto", "results", "search"]


@dataclass(frozen=True)
class Budget:
    """What an image may cost. Exactly one of `nfe` and `milliseconds` is set.

    Attributes:
        nfe: network evaluations per image.
        milliseconds: time per image: the median time of a batch divided by its images.
        batch_size: images per batch, for `milliseconds`.
        repeats: number of measured batches of each candidate, for `milliseconds`.
    """

    nfe: int | None = None
    milliseconds: float | None = None
    batch_size: int = 1
    repeats: int = REPEATS

    @property
    def text(self) -> str:
        """`8 evaluations`, or `300 ms per image in batches of 1`."""
        if self.milliseconds is None:
            return f"{self.nfe} evaluation{'s' if self.nfe != 1 else ''} per image"
        return f"{self.milliseconds:g} ms per image in batches of {self.batch_size}"

    def as_dict(self) -> dict[str, Any]:
        """`nfe`, or `ms_per_image` and `batch_size`."""
        if self.milliseconds is None:
            return {"nfe": self.nfe}
        return {"ms_per_image": self.milliseconds, "batch_size": self.batch_size}


@dataclass(frozen=True)
class Recommendation:
    """The settings to use.

    Attributes:
        model: source of the model.
        budget: what an image may cost.
        source: "results" if the candidates were results that existed, "search" if they were searched.
        protocol: what the candidates were compared with, in words.
        metric: name of the metric.
        better: "lower" or "higher".
        images: number of images of the fresh measurement, as text: `8 × 200`.
        winner: the best candidate.
        best_default: the best of the default rows.
        difference: fresh value of the winner minus that of the best default row, paired by block, with a 95% interval.
        tied: labels of candidates that cannot be told from the winner.
        tried: number of candidates within the budget that were compared.
        milliseconds: latency per image of the winner and of the best default row, for a budget of time.
        conditions: conditions of these latencies, in words. "" for a budget of evaluations.
        code: the recommended row in diffusers.
        elsewhere: its names in ComfyUI and k-diffusion.
        verdict: the result in one paragraph.
        seconds: seconds of the search or the fresh measurement.
        tuned: the search. None if the candidates were results that existed.
        dots: the candidates, for the plot.
        request: the request that all cells have in common.
        n: images per block.
    """

    model: str
    budget: Budget
    source: Literal["results", "search"]
    protocol: str
    metric: str
    better: str
    images: str
    winner: Row
    best_default: Row
    difference: Difference
    tied: tuple[str, ...]
    tried: int
    milliseconds: tuple[float, float] | None
    conditions: str
    code: Code
    elsewhere: Elsewhere
    verdict: str
    seconds: float
    tuned: Tuned | None = field(default=None, repr=False)
    dots: tuple[Dot, ...] = field(default=(), repr=False)
    request: Request = field(default_factory=lambda: Request(()), repr=False)
    n: int = 0

    @property
    def improvement(self) -> float:
        """By how much the winner is better than the best default row. Negative if it is worse."""
        return -self.difference.mean if self.better == "lower" else self.difference.mean

    @property
    def choice(self) -> Row:
        """The recommended row: the winner if it is significantly better than the best default row, else that row."""
        better = self.improvement > 0 and not self.difference.tied
        return self.winner if better else self.best_default

    @property
    def cost(self) -> tuple[float, float]:
        """Cost of the winner and of the best default row: milliseconds or evaluations per image."""
        return self.milliseconds or (self.winner.evaluations, self.best_default.evaluations)

    def as_dict(self) -> dict[str, Any]:
        """The recommendation as it is written to JSON."""
        latencies = self.milliseconds or (None, None)
        rows = [
            {**row.as_dict(), "fresh": row.fresh.as_dict(), "search": row.search, "ms_per_image": latency}
            for row, latency in zip((self.winner, self.best_default), latencies, strict=True)
        ]
        return {
            "model": self.model,
            "budget": self.budget.as_dict(),
            "source": self.source,
            "protocol": self.protocol,
            "metric": self.metric,
            "better": self.better,
            "recommended": "winner" if self.choice is self.winner else "best_default",
            "winner": rows[0],
            "best_default": rows[1],
            "difference": {
                "value": self.difference.mean,
                "low": self.difference.mean - self.difference.margin,
                "high": self.difference.mean + self.difference.margin,
                "tied": self.difference.tied,
            },
            "tied": list(self.tied),
            "tried": self.tried,
            "latency_conditions": self.conditions or None,
            "diffusers": self.code.as_dict(),
            "comfyui": self.elsewhere.as_dict(),
            "verdict": self.verdict,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class _Chosen:
    """The winner and the best default row, before their latency and code are known."""

    winner: Row
    best_default: Row
    difference: Difference
    tied: tuple[str, ...]
    tried: int
    points: tuple[Point, ...]
    tuned: Tuned | None = None


def recommend(
    request: Request,
    device: str,
    store: Store,
    space: Space,
    budget: Budget,
    *,
    source: Source = "auto",
    named: bool = False,
    seed: int = 0,
    limit: Limit = Limit(seconds=600.0),  # noqa: B008 - immutable
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
    loaded: Model | None = None,
) -> Recommendation:
    """Choose the settings to use for a model within a budget.

    The candidates are results in the folder, where enough of them have the protocol of the request. Otherwise they are
    searched by `tune`. In both cases the winner and the best default row are measured on noise that was not used.

    Args:
        request: the model, the metric, and everything else that the cells have in common. Its n may be None.
        device: name of the device, or "auto".
        store: folder of results and latencies.
        space: the candidates of a search. Of existing results, those with its samplers and guidances are used.
        budget: what an image may cost.
        source: "results" never searches, "search" uses no existing results, and "auto" searches where they do not
            suffice.
        named: whether the user named the samplers. Then existing results suffice if all of them are there.
        seed: first seed of the search.
        limit: when the search ends.
        stop: function that returns whether to stop.
        say: called with a line about the progress.
        loaded: the model of the request, if it is loaded already.

    Raises:
        UserError: if the model cannot be loaded, nothing fits into the budget, or `source` is "results" and they do not
            suffice.
        RunError: if a candidate fails in the last measurement.
        Stopped: if `stop` returns true. What is finished is kept.
    """
    if source == "results" and not store.folder.is_dir():
        raise UserError(
            f"{argument('out', store.folder)}: there is no such folder, so it has no results to choose from."
        )
    if loaded is None and budget.milliseconds is not None:
        loaded = prepare_latency(request, device).model
    n = DEFAULT_N if request.n is None else request.n
    store.prepare()
    arena = searching = Arena(request.replace(n=n), device, store, stop, loaded)
    records = [] if source == "search" else [record for _, record in store.records() if record is not None]
    if request.n is None and (most := images_per_block(records, arena)) not in (None, n):
        arena = Arena(request.replace(n=most), device, store, stop, arena.model)
    clock = None
    if budget.milliseconds is not None:
        clock = Clock(arena.request, arena.model, device, store, budget.batch_size, budget.repeats, say)
        within = clock.evaluations_within(space, budget.milliseconds)
        space = replace(space, guidances=tuple(g for g in space.guidances if _name(g) in within))
    else:
        assert budget.nfe is not None
        within = {_name(guidance): budget.nfe for guidance in space.guidances}
    fits = _fits(clock, budget)
    chosen, reason = None, ""
    if source != "search":
        chosen, reason = _of_results(records, arena, space, within, named, seed, fits, clock is not None)
    if chosen is None and source == "results":
        raise UserError(f"the results in {store.folder} do not suffice for a recommendation: {reason}.")
    if chosen is None:
        if reason:
            say(f"searching, because the results in {store.folder} do not suffice: {reason}")
        arena = searching  # results may have many more images than a search can afford
        chosen = _of_search(arena, space, within, seed, limit, say, fits, clock is not None)
    return _finished(chosen, arena, clock, budget)


def _name(guidance: str | None) -> str | None:
    return None if guidance is None else split(guidance)[0]


def _fits(clock: Clock | None, budget: Budget) -> Callable[[Entry], bool]:
    def fits(entry: Entry) -> bool:
        if clock is None or budget.milliseconds is None:
            return True
        assert entry.cell is not None
        assert entry.cell.budget is not None
        try:
            return clock.latency(entry.candidate, entry.cell.budget).ms_per_image <= budget.milliseconds
        except (UserError, RunError) as error:
            entry.reason = str(error)
            return False

    return fits


def _of_search(
    arena: Arena,
    space: Space,
    within: Mapping[str | None, int],
    seed: int,
    limit: Limit,
    say: Callable[[str], None],
    fits: Callable[[Entry], bool],
    timed: bool,
) -> _Chosen:
    """Search. If nothing fits into the time, again with one evaluation less."""
    for less in range(TRIES):
        fewer = {name: nfe - less for name, nfe in within.items() if nfe > less}
        if not fewer:
            break
        kept = replace(space, guidances=tuple(g for g in space.guidances if _name(g) in fewer))
        try:
            tuned = tune(arena, kept, fewer, seed, limit, say, fits)
        except NothingFitsError:
            if not timed:
                raise
            continue
        parts = (tuned.winner, tuned.best_default, tuned.difference, tuned.tied, tuned.tried, tuned.points)
        return _Chosen(*parts, tuned=tuned)
    raise NothingFitsError("no sampler takes at most this time; give a larger budget.")


def _of_results(
    records: list[dict[str, Any]],
    arena: Arena,
    space: Space,
    within: Mapping[str | None, int],
    named: bool,
    seed: int,
    fits: Callable[[Entry], bool],
    timed: bool,
) -> tuple[_Chosen | None, str]:
    """Choose from results that exist. Without a choice, the second value says why."""
    rows = stored_rows(records, arena, space, FRESH_OFFSET, float("inf"))
    if not rows:
        return None, f"none has this model, metric and protocol with n = {arena.n} and at least two blocks or seeds"
    slack = SLACK if timed else 1.0
    share = {row.entry: row.evaluations / budget_of(row.entry.candidate, within) for row in rows}
    inside = [row for row in rows if share[row.entry] <= slack + 1e-9]
    if not suffices(inside, space, named, share):
        wanted = "not all of the named samplers use" if named else "too few samplers use"
        return None, f"{wanted} the budget of {_within(within)} evaluations"
    if not any(row.default for row in inside):
        return None, "there is no default row to compare with"
    best = _best_that_fits(inside, fits)
    default = _best_that_fits([row for row in inside if row.default], fits)
    if best is None or default is None:
        return None, "none of them fits into the budget"
    winner, best_default, difference = measure_fresh(
        arena, (best.entry, best.mean), (default.entry, default.mean), seed + FRESH_OFFSET
    )
    others = [(row, compared(row, best)) for row in inside if row is not best and row.entry.reason is None]
    tied = tuple(row.entry.candidate.label for row, d in others if d is not None and d.tied and share[row.entry] <= 1)
    points = tuple(
        Point(row.entry.candidate, row.entry.cell, row.evaluations, arena.sign * row.mean, row.default)
        for row in rows
        if row.entry.cell is not None
    )
    return _Chosen(winner, best_default, difference, tied, len(inside), points), ""


def _best_that_fits(rows: list[Stored], fits: Callable[[Entry], bool]) -> Stored | None:
    """The best row; one that takes longer than the budget is left out."""
    left = list(rows)
    while (best := best_of(left)) is not None and not fits(best.entry):
        best.entry.reason = best.entry.reason or "it takes longer than the budget"
        left = [row for row in left if row is not best]
    return best


def _within(within: Mapping[str | None, int]) -> str:
    return " or ".join(map(str, dict.fromkeys(within.values())))


def _finished(chosen: _Chosen, arena: Arena, clock: Clock | None, budget: Budget) -> Recommendation:
    milliseconds, conditions = None, ""
    dots = tuple(Dot(point.evaluations, point.value, point.default) for point in chosen.points)
    if clock is not None:
        rows = (chosen.winner, chosen.best_default)
        latencies = [clock.latency(row.candidate, row.nfe) for row in rows]
        milliseconds = (latencies[0].ms_per_image, latencies[1].ms_per_image)
        conditions = clock.conditions
        dots = _timed_dots(chosen.points, arena, clock)
    request, metric = arena.request, arena.request.metrics[0]
    source: Literal["results", "search"] = "results" if chosen.tuned is None else "search"
    labels = "" if request.labels in (None, "none") else f", labels {request.labels}"
    where = f"results in {arena.store.folder}" if source == "results" else "a search"
    protocol = f"{where}: {metric.spec}, blocks of {arena.n} images{labels}, {_dtype(arena)}"
    made = Recommendation(
        request.model,
        budget,
        source,
        protocol,
        arena.metric,
        "lower" if arena.sign == 1 else "higher",
        f"{FRESH} × {arena.n}",
        chosen.winner,
        chosen.best_default,
        chosen.difference,
        chosen.tied,
        chosen.tried,
        milliseconds,
        conditions,
        Code("", "", "", None),
        Elsewhere(("", ""), None, None),
        "",
        arena.seconds,
        chosen.tuned,
        dots,
        request,
        arena.n,
    )
    pipeline = pipeline_of(request, arena.model)
    code, names = code_of(made.choice, pipeline), elsewhere(made.choice, arena.model)
    return replace(made, code=code, elsewhere=names, verdict=recommended(made))


def _timed_dots(points: tuple[Point, ...], arena: Arena, clock: Clock) -> tuple[Dot, ...]:
    """The candidates whose latency is known, or is measured because they are the best ones."""
    ranked = sorted(points, key=lambda point: arena.sign * point.value)
    best: dict[int, Point] = {}
    for point in ranked:
        best.setdefault(round(point.evaluations), point)
    measured = [*ranked[:DRAWN], *list(best.values())[:DRAWN]]
    dots = []
    for point in points:
        latency = clock.known(point.cell)
        if latency is None and point in measured:
            try:
                latency = clock.latency(point.candidate, point.cell.budget or 1)
            except (UserError, RunError):
                continue
        if latency is not None:
            dots.append(Dot(latency.ms_per_image, point.value, point.default))
    return tuple(dots)


def _dtype(arena: Arena) -> str:
    """The precision of the network, as in a protocol."""
    return str(arena.shared(0)["dtype"])


__all__ = ["Budget", "Recommendation", "Source", "recommend"]
