"""Runs: every cell of a request for every seed. Several runs can work on one folder at the same time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from samplerbench.bench import engine
from samplerbench.bench.cell import Cell
from samplerbench.bench.cell_run import task_field
from samplerbench.bench.prepare import Measured, Prepared, make_session, measure_reference
from samplerbench.bench.request import Published
from samplerbench.bench.session import Session
from samplerbench.bench.team import Team
from samplerbench.errors import Message, SamplerbenchError, UserError, argument
from samplerbench.metrics.fd_dinov2 import FDDINOv2
from samplerbench.metrics.fid import FID
from samplerbench.metrics.fid_infinity import FIDInfinity
from samplerbench.metrics.metric import Metric, names_of
from samplerbench.models.text import prompt_warning
from samplerbench.results.compare import noise_floor
from samplerbench.results.store import Store
from samplerbench.sampling.driver import OnStep


class Observer:
    """Base class of observers, which show the progress of a run and can stop it. This one does neither."""

    def running(self) -> AbstractContextManager[Any]:
        """Return a context manager that is active while the cells run."""
        return nullcontext()

    def cell(
        self, title: str, steps: int | None, n: int, batch_size: int, blocks: int = 1
    ) -> AbstractContextManager[OnStep | None]:
        """Return a context manager that is active while a cell runs.

        Args:
            title: Title of the cell.
            steps: Number of steps. None if the sampler chooses its own steps.
            n: Number of images per block.
            batch_size: Images per batch, summed over all processes.
            blocks: Number of blocks.

        Returns:
            A context manager. Its value is called after each step of the sampler, unless it is None.
        """
        return nullcontext()

    def solution(self, images: int, total: int) -> AbstractContextManager[OnStep | None]:
        """Return a context manager that is active while converged solutions are computed.

        Args:
            images: Number of images that are solved now.
            total: Number of images that the run needs solved.

        Returns:
            A context manager. Its value is called after each step of the solver, unless it is None.
        """
        return nullcontext()

    def done(self, outcome: engine.Outcome, title: str) -> None:
        """Called after a cell has finished or failed.

        Args:
            outcome: The outcome of the cell.
            title: Title of the cell.
        """

    def stop(self) -> bool:
        """Return whether to stop the run. Called at each checkpoint and while waiting for another run."""
        return False


def has_floor(metric: Metric) -> bool:
    """Return whether the noise floor of a run (`Run.floor`) applies to a metric: the FID in the features of the run."""
    return metric.label() == "fid" and not metric.feature_space


@dataclass(frozen=True)
class Job:
    """A cell with one seed.

    Attributes:
        session: The session of the seed and the task.
        cell: The cell.
    """

    session: Session
    cell: Cell


@dataclass
class Run:
    """Runs a prepared request and stores the outcomes of its cells.

    Creating a run creates the folder of results and measures the real images.

    Args:
        prepared: The model, the cells and the metrics.
        store: The folder of results.
        rerun: Whether to run cells again that have a result in the store.
        team: The processes that share the work.

    Attributes:
        measured: The real images, their statistics, and the number of images per block.
        jobs: Every cell with every task and seed.
        outcomes: Outcome of each job. None for jobs that have not run.
        units: Indices of jobs that differ only in their budget. The jobs of a unit are sampled once.

    Raises:
        UserError: If the folder cannot be written, or if a metric lacks something that it needs.
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
            make_session(self.prepared, self.measured, seed, self.store, self.rerun, self.team, task)
            for task in (*self.prepared.tasks,) or (None,)
            for seed in self.prepared.request.seeds
        ]
        self.jobs = [Job(session, cell) for session in sessions for cell in self.prepared.cells]
        self.outcomes = [None] * len(self.jobs)
        places = {(id(job.session), id(job.cell)): i for i, job in enumerate(self.jobs)}
        self.units = [
            [places[id(session), id(cell)] for cell in cells] for session in sessions for cells in self.prepared.runs
        ]

    def _make_folder(self) -> None:
        """Create the folder on the main process. If that fails, raise the error on all processes."""
        failure: SamplerbenchError | None = None
        if self.team.main:
            try:
                self.store.prepare()
            except SamplerbenchError as error:
                failure = error
        self.team.agree(failure)

    def run(self, observer: Observer | None = None) -> None:
        """Run the cells that have no outcome yet.

        An error in a cell does not raise: it is part of the outcome. Cells that another run has claimed come last,
        because they may be finished by then. KeyboardInterrupt is not caught.

        Args:
            observer: Shows the progress and can stop the run.

        Raises:
            Stopped: If the observer stops the run. Finished cells remain in `outcomes`.
            LostProcess: If another process of the team has ended.
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
        size, blocks = self.prepared.batch_size * self.team.size, self.prepared.request.blocks
        title, task = self.prepared.title(cell), session.measurement.task
        if len(self.prepared.tasks) > 1 and task is not None:
            title = f"{title}, {task.spec}"
        with observer.cell(title, cell.steps, self.measured.n, size, blocks) as on_step:
            outcome = engine.run_cell(session, cell, on_step, wait)
            cells = [self.jobs[place].cell for place in unit]
            for place, found in zip(unit, engine.under_budgets(outcome, cells), strict=True):
                self.outcomes[place] = found
            observer.done(outcome, title)

    @property
    def finished(self) -> int:
        """Number of units that have an outcome."""
        return sum(self.outcomes[unit[0]] is not None for unit in self.units)

    @property
    def failed(self) -> list[engine.Outcome]:
        """Outcomes of the cells that failed."""
        return [outcome for outcome in self.outcomes if outcome is not None and outcome.error is not None]

    @property
    def records(self) -> list[dict[str, Any]]:
        """Records of the cells that have an outcome, followed by those of the budgets that are too small."""
        return [o.record for o in self.outcomes if o is not None] + self._unmet()

    @property
    def pending(self) -> list[dict[str, Any]]:
        """Like `records`, with a placeholder for each cell that has no outcome yet."""
        pairs = zip(self.jobs, self.outcomes, strict=True)
        found = [
            o.record
            if o is not None
            else job.cell.pending | {"seed": job.session.measurement.seed} | task_field(job.session)
            for job, o in pairs
        ]
        return found + self._unmet()

    def _unmet(self) -> list[dict[str, Any]]:
        return [gap.record for gap in self.prepared.unmet]

    def published(self) -> Iterator[tuple[dict[str, Any], Published]]:
        """Yield the record of each cell that has a published value of one of the metrics, and this value."""
        known = names_of(self.prepared.metrics)
        for cell, value in self.prepared.published:
            for job, outcome in zip(self.jobs, self.outcomes, strict=True):
                if job.cell is cell and outcome is not None and value.metric in known:
                    yield outcome.record, value

    def warnings(self) -> list[Message]:
        """Return warnings about settings that make the values of this run unreliable."""
        cut = prompt_warning(self.prepared.model)
        return [*self._few_images(), *([Message.read(cut)] if cut else []), *self._truncated_prompts()]

    def _few_images(self) -> list[Message]:
        """Return a warning if a Fréchet distance is measured with fewer images than features."""
        references, n = [], self.measured.n
        if any(isinstance(m, FID | FIDInfinity) for m in self.prepared.metrics):
            references.append(self.measured.reference)
        spaces = self.measured.spaces
        references += [spaces[m.feature_space].reference for m in self.prepared.metrics if isinstance(m, FDDINOv2)]
        d = max((len(reference.moments.mean) for reference in references if reference is not None), default=0)
        if n > d:
            return []
        text = f"{n} images for {d} features: the covariance is singular and the FID strongly biased; use "
        return [Message.read(f"{text}{argument('n', 10 * d)} or more.")]

    def _truncated_prompts(self) -> list[Message]:
        """Return a warning for each feature space whose text encoder truncates prompts of the run."""
        prompts: tuple[str, ...] = getattr(self.prepared.model, "prompts", ())
        warnings = []
        for name in dict.fromkeys(m.feature_space for m in self.prepared.metrics if m.needs_prompts):
            encoder = self.measured.spaces[name].extractor.prompts if name in self.measured.spaces else None
            if encoder is not None and (cut := encoder.truncated(prompts)):
                longer = f"{cut} of {len(prompts)} prompts {'is' if cut == 1 else 'are'} longer"
                limit = f"than the {encoder.length} tokens of {encoder.name}"
                warnings.append(Message.read(f"{longer} {limit}; the scores are of the first tokens."))
        return warnings

    def floor(self) -> tuple[float, float, int] | None:
        """Return the noise floor of the FID (see `noise_floor`).

        Returns:
            The noise floor. None if there is only one block, or if the real images are not available.
        """
        fid = any(has_floor(metric) for metric in self.prepared.metrics)
        if self.prepared.request.blocks == 1 or not fid or self.measured.real is None:
            return None
        try:
            return noise_floor(self.measured.real("fid"), self.measured.n)
        except UserError:
            return None
