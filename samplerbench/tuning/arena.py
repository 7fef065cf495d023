"""Measurements of candidates: every one is an ordinary cell of a run, kept in a folder of results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from samplerbench.bench import engine
from samplerbench.bench.cell import Cell
from samplerbench.bench.prepare import Measured, Prepared, make_session, measure_reference, prepare
from samplerbench.bench.request import Grid, Request
from samplerbench.bench.session import Session
from samplerbench.errors import RunError, UserError
from samplerbench.metrics.metric import names_of
from samplerbench.models.model import Model
from samplerbench.results.seal import canonical
from samplerbench.results.store import Store
from samplerbench.tuning.space import Candidate


@dataclass(eq=False)
class Entry:
    """A candidate at a budget, and what was measured of it.

    Attributes:
        candidate: the candidate.
        cell: its cell. None if it cannot be run.
        reason: why it cannot be run, or failed. None if there is no such reason.
        values: values of the metric by seed. Lower is better.
        nfe: network evaluations per image, counted. None before it is measured.
    """

    candidate: Candidate
    cell: Cell | None
    reason: str | None = None
    values: dict[int, float] = field(default_factory=dict)
    nfe: float | None = None

    def at(self, seeds: Iterable[int]) -> list[float]:
        """The values for some seeds, all of which were measured."""
        return [self.values[seed] for seed in seeds]

    def mean(self, seeds: Sequence[int]) -> float:
        """The mean over some seeds. Infinity if the candidate cannot be run."""
        if self.reason is not None:
            return math.inf
        return math.fsum(self.at(seeds)) / len(seeds)


@dataclass
class Arena:
    """Measures candidates on one model with one metric.

    All candidates share the noise and the labels of a seed, so their differences are paired. The model, the reference
    and converged solutions are computed once.

    Args:
        request: the model, the metric, the number of images, and everything else that the cells have in common. Its
            grids name the samplers whose rows are measured first.
        device: name of the device, or "auto".
        store: folder of results.
        stop: function that returns whether to stop.
        loaded: the model of the request, if it is loaded already.

    Attributes:
        metric: name of the metric in the records.
        sign: 1 if lower values are better, -1 otherwise.
        evaluations: network evaluations of the cells that were used so far, summed over images.
        earlier: recorded seconds of the cells that an earlier run has measured.

    Raises:
        UserError: if the model cannot be loaded, or if the metric lacks something that it needs.
    """

    request: Request
    device: str
    store: Store
    stop: Callable[[], bool] = lambda: False
    loaded: Model | None = None
    metric: str = field(init=False)
    sign: int = field(init=False)
    evaluations: int = field(init=False, default=0)
    earlier: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._start = time.monotonic()
        self._base: Prepared = prepare(self.request, self.device, self.loaded)
        self.request = self.request.replace(labels=self._base.mode)
        self.metric = names_of(self.request.metrics)[0]
        chosen = self.request.metrics[0]
        if chosen.of == "data":
            raise UserError(f"the metric {chosen.label()} is of the data and not of samples; choose another one.")
        self.sign = -1 if chosen.better == "higher" else 1
        self.store.prepare()
        self._measured: Measured = measure_reference(self._base)
        self._sessions: dict[int, Session] = {}
        self._entries: dict[tuple[Candidate, int], Entry] = {}
        self._same: dict[str, Entry] = {}

    @property
    def seconds(self) -> float:
        """Seconds since the arena was created, and those that an earlier run has spent on the cells."""
        return time.monotonic() - self._start + self.earlier

    @property
    def n(self) -> int:
        """Images per seed."""
        return self._measured.n

    @property
    def model(self) -> Model:
        """The loaded model."""
        return self._base.model

    def entry(self, candidate: Candidate, budget: int) -> Entry:
        """Plan a candidate at a budget. Candidates with the same cell, such as a default that is named, are one entry.

        Args:
            candidate: the candidate.
            budget: network evaluations per image.
        """
        key = (candidate, budget)
        if key not in self._entries:
            entry = self._planned(candidate, budget)
            if entry.cell is not None:
                entry = self._same.setdefault(_identity(entry.cell, budget), entry)
            self._entries[key] = entry
        return self._entries[key]

    def _planned(self, candidate: Candidate, budget: int) -> Entry:
        try:
            grid = Grid([candidate.sampler], [], [budget], [candidate.guidance], [candidate.spacing])
            prepared = prepare(self.request.replace(grids=(grid,)), self.device, model=self._base.model)
        except (UserError, RunError) as error:
            return Entry(candidate, None, str(error))
        if prepared.unmet:
            return Entry(candidate, None, str(prepared.unmet[0].record["unmet"]))
        cell = prepared.cells[0]
        if cell.budget is None:
            return Entry(candidate, None, "it chooses its own number of evaluations")
        return Entry(candidate, cell)

    def measure(self, entries: Sequence[Entry], seeds: Sequence[int]) -> None:
        """Measure candidates for some seeds, as far as they are not measured yet.

        Cells that another run has claimed come last: they may be finished by then.

        Args:
            entries: the candidates.
            seeds: the seeds.

        Raises:
            Stopped: if `stop` returns true. What is finished is kept.
        """
        jobs = [(entry, seed) for seed in seeds for entry in dict.fromkeys(entries)]
        for wait in (False, True):
            for entry, seed in jobs:
                if entry.reason is None and entry.cell is not None and seed not in entry.values:
                    try:
                        outcome = engine.run_cell(self._session(seed), entry.cell, wait=wait)
                    except engine.Claimed:
                        continue
                    self._keep(entry, seed, outcome)

    def measure_again(self, entries: Sequence[Entry], seed: int, blocks: int) -> list[dict[str, Any]]:
        """Measure candidates with several blocks of one seed.

        Args:
            entries: the candidates.
            seed: the seed, which `measure` must not use.
            blocks: number of blocks of `n` images.

        Returns:
            The records of the cells.

        Raises:
            RunError: if a candidate fails.
            Stopped: if `stop` returns true.
        """
        base = replace(self._base, request=self.request.replace(blocks=blocks, seeds=(seed,)))
        session = make_session(base, self._measured, seed, self.store)
        session.execution.stop = self.stop
        records = []
        for entry in entries:
            assert entry.cell is not None
            outcome = engine.run_cell(session, entry.cell)
            if outcome.error is not None:
                raise outcome.error
            self._count(outcome, blocks)
            records.append(outcome.record)
        return records

    def protocol(self, entry: Entry, seed: int) -> dict[str, Any]:
        """The protocol of a candidate's cell with one block.

        Args:
            entry: the candidate. It must have a cell.
            seed: the seed.
        """
        assert entry.cell is not None
        return self._session(seed).measurement.protocol(entry.cell)

    def shared(self, seed: int) -> dict[str, Any]:
        """The protocol fields that all cells with one block of a seed have in common."""
        return self._session(seed).measurement.shared

    def _count(self, outcome: engine.Outcome, blocks: int = 1) -> None:
        self.evaluations += round(outcome.record["nfe"] * self.n * blocks)
        if outcome.reused:
            self.earlier += float(outcome.record.get("seconds") or 0.0)

    def _keep(self, entry: Entry, seed: int, outcome: engine.Outcome) -> None:
        if outcome.error is not None:
            entry.reason = str(outcome.error)
            return
        measured = outcome.record["metrics"].get(self.metric)
        if measured is None:
            entry.reason = f"it has no {self.metric}"
            return
        value = measured.get("value")
        if not isinstance(value, int | float) or not math.isfinite(value):
            entry.reason = f"its {self.metric} is not a finite number"
            return
        entry.values[seed] = self.sign * float(value)
        entry.nfe = float(outcome.record["nfe"])
        self._count(outcome)

    def _session(self, seed: int) -> Session:
        if seed not in self._sessions:
            session = make_session(self._base, self._measured, seed, self.store)
            session.execution.stop = self.stop
            self._sessions[seed] = session
        return self._sessions[seed]


def _identity(cell: Cell, budget: int) -> str:
    guidance = None if cell.guidance is None else cell.guidance.spec
    grid = cell.sigmas.tolist() if cell.error is None else None
    return canonical([cell.method.spec, guidance, grid, budget])


__all__ = ["Arena", "Entry"]
