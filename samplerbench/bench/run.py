"""A run: every cell of a request for every seed, in an order that several runs on one folder can share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from samplerbench.bench import engine
from samplerbench.bench.cell import Cell
from samplerbench.bench.prepare import Measured, Prepared, make_session, measure_reference
from samplerbench.bench.request import Published
from samplerbench.bench.session import Session
from samplerbench.bench.team import Team
from samplerbench.errors import Message, SamplerbenchError, UserError, argument
from samplerbench.metrics.fid import FID
from samplerbench.metrics.fid_infinity import FIDInfinity
from samplerbench.results.compare import noise_floor
from samplerbench.results.store import Store
from samplerbench.sampling.driver import OnStep


class Observer:
    """What a run is watched by, and stopped. This one shows nothing and never stops."""

    def running(self) -> AbstractContextManager[Any]:
        """Entered while the cells run."""
        return nullcontext()

    def cell(self, title: str, steps: int | None, n: int, batch_size: int) -> AbstractContextManager[OnStep | None]:
        """Entered while a cell runs; gives what is called after each of the sampler's steps.

        Args:
            title: what the cell is called. steps: of the sampler; None where it chooses its own.
            n: images, over all blocks. batch_size: images at a time, on all processes.
        """
        return nullcontext()

    def solution(self, images: int, total: int) -> AbstractContextManager[OnStep | None]:
        """Entered while the converged solution of so many images, of `total` in the run, is computed."""
        return nullcontext()

    def done(self, outcome: engine.Outcome, title: str) -> None:
        """A cell has finished, or failed."""

    def stop(self) -> bool:
        """Asked at each checkpoint, and while waiting for another run; true ends the run there."""
        return False


@dataclass(frozen=True)
class Job:
    """A cell under one seed."""

    session: Session
    cell: Cell


@dataclass
class Run:
    """A prepared request and what has become of its cells.

    Making one makes the folder of results and measures the real images.

    Args:
        prepared: the model, the cells and the metrics.
        store: the folder of results.
        rerun: run cells again whose results are in the store.
        team: the processes that share the work.

    Attributes:
        measured: the real side: reference, features, images per block.
        jobs: each cell under each seed.
        outcomes: what became of each job; None of those that have not run.
        units: the jobs that are sampled together: they differ in their budget of evaluations alone.

    Raises:
        UserError: the folder cannot be written, or a metric lacks what it needs.
    """

    prepared: Prepared
    store: Store
    rerun: bool = False
    team: Team = field(default_factory=Team)
    measured: Measured = field(init=False)
    jobs: list[Job] = field(init=False)
    outcomes: list[engine.Outcome | None] = field(init=False)
    units: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self._make_folder()
        self.measured = measure_reference(self.prepared)
        sessions = [
            make_session(self.prepared, self.measured, seed, self.store, self.rerun, self.team)
            for seed in self.prepared.request.seeds
        ]
        self.jobs = [Job(session, cell) for session in sessions for cell in self.prepared.cells]
        self.outcomes = [None] * len(self.jobs)
        places = {(id(job.session), id(job.cell)): i for i, job in enumerate(self.jobs)}
        self.units = [
            [places[id(session), id(cell)] for cell in cells] for session in sessions for cells in self.prepared.runs
        ]

    def _make_folder(self) -> None:
        """On the main process; where it cannot, all of them end."""
        failure: SamplerbenchError | None = None
        if self.team.main:
            try:
                self.store.prepare()
            except SamplerbenchError as error:
                failure = error
        self.team.agree(failure)

    def run(self, observer: Observer | None = None) -> None:
        """Run the cells that have no outcome yet. A cell that fails is an outcome too.

        Cells that another run works on come last, when they may be finished already.

        Raises:
            Stopped: the observer asked for it; what is finished stays in `outcomes`. Ctrl-C is not caught either.
            LostProcess: another process of the team has ended.
        """
        observer = observer or Observer()
        with observer.running():
            for job in self.jobs:
                job.session.execution.stop = observer.stop
                job.session.execution.solving = observer.solution
            for wait in (False, True):
                for unit in self.units:
                    if self.outcomes[unit[0]] is None:
                        with suppress(engine.Claimed):
                            self._run_unit(unit, observer, wait)
        self.team.close()

    def _run_unit(self, unit: Sequence[int], observer: Observer, wait: bool) -> None:
        session, cell = self.jobs[unit[0]].session, self.jobs[unit[0]].cell
        images, size = self.measured.n * self.prepared.request.blocks, self.prepared.batch_size * self.team.size
        title = self.prepared.title(cell)
        with observer.cell(title, cell.steps, images, size) as on_step:
            outcome = engine.run_cell(session, cell, on_step, wait)
            cells = [self.jobs[place].cell for place in unit]
            for place, found in zip(unit, engine.under_budgets(outcome, cells), strict=True):
                self.outcomes[place] = found
            observer.done(outcome, title)

    @property
    def finished(self) -> int:
        """How many of the units have an outcome."""
        return sum(self.outcomes[unit[0]] is not None for unit in self.units)

    @property
    def failed(self) -> list[engine.Outcome]:
        """The outcomes of the cells that failed."""
        return [outcome for outcome in self.outcomes if outcome is not None and outcome.error is not None]

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of the cells that have an outcome, then those of the budgets that cannot be met."""
        return [o.record for o in self.outcomes if o is not None] + self._unmet()

    @property
    def pending(self) -> list[dict[str, Any]]:
        """The records as in `records`, with one in the place of each cell that has no outcome yet."""
        pairs = zip(self.jobs, self.outcomes, strict=True)
        found = [
            o.record if o is not None else job.cell.pending | {"seed": job.session.measurement.seed} for job, o in pairs
        ]
        return found + self._unmet()

    def _unmet(self) -> list[dict[str, Any]]:
        return [gap.record for gap in self.prepared.unmet]

    def published(self) -> Iterator[tuple[dict[str, Any], Published]]:
        """The record of each cell for which a paper reports a value of one of the metrics, and that value."""
        known = {metric.label() for metric in self.prepared.metrics}
        for cell, value in self.prepared.published:
            for job, outcome in zip(self.jobs, self.outcomes, strict=True):
                if job.cell is cell and outcome is not None and value.metric in known:
                    yield outcome.record, value

    def warnings(self) -> list[Message]:
        """What makes the values of this run doubtful, whatever they are."""
        reference, n = self.measured.reference, self.measured.n
        if reference is None or not any(isinstance(m, FID | FIDInfinity) for m in self.prepared.metrics):
            return []
        d = len(reference.moments.mean)
        if n > d:
            return []
        text = f"{n} images for {d} features: the covariance is singular and the FID strongly biased; use "
        return [Message.read(f"{text}{argument('n', 10 * d)} or more.")]

    def floor(self) -> tuple[float, float, int] | None:
        """The noise floor of the FID (`noise_floor`), where there are blocks to compare; None without real images."""
        blocks = self.prepared.request.blocks > 1 and any(m.label() == "fid" for m in self.prepared.metrics)
        if not blocks or self.measured.real is None:
            return None
        try:
            return noise_floor(self.measured.real("fid"), self.measured.n)
        except UserError:
            return None
