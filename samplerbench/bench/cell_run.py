"""Execution of one cell: resume from a checkpoint, sample, save checkpoints, and create the record."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from samplerbench.bench.cell import Cell, versions
from samplerbench.bench.cell_grid import describe_shown, images_in_grid, with_observations
from samplerbench.bench.evaluate import evaluate, update_counted
from samplerbench.bench.generate import Batched, Generates, SamplerOnModel, explain_memory, generate, prepare
from samplerbench.bench.plan import plan
from samplerbench.bench.session import Session, has_own_labels
from samplerbench.bench.span import Span
from samplerbench.boundary import plugin_call
from samplerbench.data.grid import save_grid
from samplerbench.data.pixels import dequantise, quantise
from samplerbench.errors import SamplerbenchError, Stopped, UserError
from samplerbench.metrics.guarded import Guarded
from samplerbench.metrics.metric import Accumulator, Batch, Context, Metric, need_samples
from samplerbench.metrics.reference import Reference
from samplerbench.metrics.summary import summarise_blocks
from samplerbench.models.model import Model, check_guidance
from samplerbench.results.claims import Lease
from samplerbench.results.files import write_atomically
from samplerbench.results.partial import PARTIAL, Extent, Progress, load_partial, save_partial
from samplerbench.sampling import Denoiser, Guidance, Inputs, Sampler, Spacing, Step
from samplerbench.sampling.cost import Cost, Seconds
from samplerbench.sampling.driver import OnStep
from samplerbench.sampling.meter import Meter
from samplerbench.tensor_seal import DamagedError

SOLUTIONS = 256 * 2**20
"""Maximum size in bytes of the converged solutions that a session keeps in memory."""


@dataclass
class Part:
    """The results of one process for its share of a chunk.

    Attributes:
        states: State of the accumulator of each metric.
        pixels: First images (k, C, H, W), uint8, for the sample grid.
        cost: Network evaluations.
        seconds: Time in seconds.
    """

    states: list[dict[str, Tensor]] = field(default_factory=list)
    pixels: Tensor = field(default_factory=lambda: torch.empty(0))
    cost: Cost = field(default_factory=Cost)
    seconds: Seconds = field(default_factory=Seconds)


class CellRun:
    """Runs one cell.

        run = CellRun(session, cell, key)
        run.resume()
        record = run.finish()  # samples what is missing, with a checkpoint after every chunk

    Args:
        session: The measurement and how it is executed.
        cell: The cell.
        key: Hash of the protocol of the cell.
        on_step: Called after each step of the sampler.

    Attributes:
        progress: Progress of the cell.
        generator: Generates the images. None before `resume` is called.
        whole: Accumulators of the current block, one for each metric.
        reasons: Why a metric has no value for this cell, or None, for each metric.
        shown: Images of the sample grid so far (k, C, H, W), uint8.
        lease: Claim of this run on the cell. It is checked before anything is written.
    """

    lease: Lease | None = None

    def __init__(self, session: Session, cell: Cell, key: str, on_step: OnStep | None = None) -> None:
        self.session, self.cell, self.key, self.on_step = session, cell, key, on_step
        measurement, execution = session.measurement, session.execution
        self.model, self.team, self.store = measurement.model, execution.team, execution.store
        self.n, self.blocks = measurement.n, measurement.blocks
        self.keep = images_in_grid(execution.keep, self.model)
        self.generator: Generates | None = None
        self.progress = Progress()
        self.shown = torch.empty(0, *self.model.image_shape, dtype=torch.uint8)
        self.whole: list[Guarded] = []
        self.reasons = [measurement.reason(metric, cell) for metric in measurement.metrics]

    def resume(self) -> None:
        """Prepare the model and the metrics, and resume from the checkpoint of the cell, if there is one.

        If the checkpoint is damaged, it is renamed and the cell starts from the beginning.

        Raises:
            SamplerbenchError: If the model or a plugin fails.
        """
        self.progress.conditions = self.session.conditions
        with self._together("in preparing the cell"):
            # Before the meter starts: estimates that are made once per model do not count as evaluations of this run.
            self.generator = prepare(self.model, self.cell)
            if isinstance(self.generator, SamplerOnModel):
                check_guidance(self.model, self.generator.cell.guidance, self.session.measurement.inputs)
            self.whole = self._accumulators()
            if self.team.main and not self.session.execution.rerun:
                file = self.store.path(self.key, PARTIAL)
                try:
                    self._load(file)
                except DamagedError as error:
                    self.store.set_aside(file, str(error))
        self.progress = self.team.tell(self.progress)

    def _load(self, file: Path) -> None:
        """Load a checkpoint. If that fails, raise DamagedError and leave the state unchanged."""
        extent = Extent(len(self.whole), self.n, self.blocks, self.model.image_shape, self.keep)
        found = load_partial(file, self.key, extent)
        if found is None:
            return
        try:
            _merge(self.whole, found.states)
        except Exception as error:
            self.whole = self._accumulators()
            raise DamagedError(
                f"the states of its metrics cannot be loaded ({type(error).__name__}: {error})"
            ) from None
        progress, conditions = found.progress, self.session.conditions
        progress.resumed += 1
        progress.mixed = progress.mixed or progress.conditions != conditions
        progress.conditions = conditions
        self.progress, self.shown = progress, found.shown

    def finish(self) -> dict[str, Any]:
        """Sample and measure the remaining images.

        Returns:
            The record of the cell, without its protocol.

        Raises:
            SamplerbenchError: If a plugin, the device or the disk fails. The last checkpoint remains.
            Stopped: If `stop` of the session returns true. The last checkpoint remains.
        """
        for block in range(self.progress.block, self.blocks):
            while self.progress.done < self.n:
                self._advance(block)
            clock = time.perf_counter()
            with self._together("in measuring"):
                if self.team.main:
                    self.progress.results.append(self._results())
                self.whole = self._accumulators()
            self.progress.seconds += Seconds(measuring=time.perf_counter() - clock)
            self.progress.block, self.progress.done = block + 1, 0
        record: dict[str, Any] = {}
        with self._together("in finishing the cell"):
            record = self._record()
            if self.team.main:
                self._write_grid()
        return self.team.tell(record)

    def _advance(self, block: int) -> None:
        """Sample the next chunk of a block together with the other processes, and write a checkpoint."""
        progress = self.progress
        last = min(self.n, progress.done + self.session.chunk)
        part = Part()
        with self._together("in sampling"):
            part = self.sample(block, progress.done, last)
        parts = self.team.gather(part)
        with self._together("in merging"):
            for other in parts:
                _merge(self.whole, other.states)
        for other in parts:
            progress.cost += other.cost
            if block == 0 and len(self.shown) < self.keep:
                self.shown = torch.cat([self.shown, other.pixels])[: self.keep]
        progress.seconds += part.seconds
        progress.done = last
        with self._together("in writing a checkpoint"):
            if self.team.main and (last < self.n or block + 1 < self.blocks):
                self.checkpoint(block)
        if self.team.tell(self.session.execution.stop()):
            raise Stopped

    @contextmanager
    def _together(self, doing: str) -> Iterator[None]:
        """Raise an exception of one process on all processes, so that no process waits for another.

        Raises:
            SamplerbenchError: If a process fails. An unexpected exception becomes a RunError with a one-line message.
            Stopped: If a process was asked to stop.
        """
        failure: SamplerbenchError | Stopped | None = None
        try:
            with plugin_call(f"cell {self.cell.title}", doing, memory=False):
                yield
        except (SamplerbenchError, Stopped) as error:
            failure = error
        self.team.agree(failure)

    def checkpoint(self, block: int) -> None:
        """Write a checkpoint. A finished block is stored as its results, not as its accumulators.

        Args:
            block: Number of the current block.
        """
        if self.lease is not None:
            self.lease.check()
        file, progress = self.store.path(self.key, PARTIAL), self.progress
        if progress.done < self.n:
            save_partial(file, self.key, progress, [a.state() for a in self.whole], self.shown)
            return
        at_end = replace(progress, block=block + 1, done=0, results=[*progress.results, self._results()])
        save_partial(file, self.key, at_end, [{} for _ in self.whole], self.shown)

    def sample(self, block: int, first: int, last: int) -> Part:
        """Sample and measure the share of this process in the images first … last-1 of a block.

        Args:
            block: Number of the block.
            first: Index of the first image within the block.
            last: Index after the last image within the block.

        Returns:
            The states of the metrics, the first images, and the cost.
        """
        model, measurement = self.model, self.session.measurement
        part = Part(pixels=torch.empty(0, *model.image_shape, dtype=torch.uint8))
        accumulators = self._accumulators()
        share = self.team.share(first, last)
        within = torch.arange(share.start, share.stop)
        if need_samples(measurement.metrics):
            self._sample(block, within, accumulators, part)
        if any(metric.of == "data" for metric in measurement.metrics):
            taking = Span(model.device)
            self._take_in_data(block, within, accumulators)
            evaluate(self.session, self.reasons, accumulators, block, first, last, self._networks_beside())
            part.seconds += Seconds(measuring=taking.stop().seconds)
        part.states = [accumulator.state() for accumulator in accumulators]
        return part

    def _networks_beside(self) -> Sequence[nn.Module]:
        return () if self.generator is None else self.generator.beside

    def _sample(self, block: int, within: Tensor, accumulators: list[Guarded], part: Part) -> None:
        """Sample and measure the images with indices `within` (k,) of a block."""
        model, measurement, generator = self.model, self.session.measurement, self._prepared()
        decoder = None if model.autoencoder is None else model.autoencoder.decoder
        sampling: list[Span] = []
        decoding: list[Span] = []
        measuring: list[Span] = []
        with Meter(generator.network, generator.beside, decoder) as meter:
            index, batch_size = within + block * self.n, self.session.execution.batch_size
            inputs = measurement.inputs.rows(within)
            for batch in generator.generate(index, inputs, measurement.seed, batch_size, self.on_step):
                quantising = Span(model.device)
                pixels = quantise(batch.images)
                sampling += [batch.sampling, quantising.stop()]
                decoding += [batch.decoding] if batch.decoding is not None else []
                part.cost += batch.uncounted
                taking = Span(model.device)
                meter.pause()
                self._take_in(accumulators, batch, pixels)
                meter.resume()
                if block == 0 and len(part.pixels) < self.keep:
                    part.pixels = torch.cat([part.pixels, pixels[: self.keep - len(part.pixels)].cpu()])
                measuring.append(taking.stop())
        part.seconds += Seconds(*(sum(span.seconds for span in spans) for spans in (sampling, decoding, measuring)))
        part.cost += meter.cost

    def _prepared(self) -> Generates:
        if self.generator is None:
            self.generator = prepare(self.model, self.cell)
        return self.generator

    def _accumulators(self) -> list[Guarded]:
        return [Guarded(metric, self._context(metric)) for metric in self.session.measurement.metrics]

    def _context(self, metric: Metric) -> Context:
        """Create the context of a metric: the real images in its feature space, and the cell."""
        measurement, generator = self.session.measurement, self._prepared()
        space = measurement.space(metric)
        bound = generator.cell if isinstance(generator, SamplerOnModel) else None
        # Without self: a metric that stores its context would keep this run and its captured graph in memory.
        model, guidance = self.model, None if bound is None else bound.guidance

        def denoiser(inputs: Inputs) -> Denoiser:
            return model.denoiser(inputs.to(model.device), guidance)

        solve = solver(self.session, self.cell)
        return Context(
            cast(Reference, None if space is None else space.reference),  # None for a metric that needs none
            None if space is None else space.real,
            solve,
            measurement.n,
            measurement.stratified_in(self.cell),
            measurement.strata,
            denoiser,
            None if bound is None else bound.sampler,
            torch.empty(0, dtype=torch.float64) if bound is None else bound.sigmas,
            measurement.real_set(metric),
            None if space is None else space.extractor.prompts,
            image_solver(self.session, self.cell, solve),
            model,
            measurement.evaluated.get(metric.spec),
            measurement.seed,
        )

    def _features(self, pixels: Tensor, of: str) -> dict[str, dict[str, Tensor]]:
        """Compute the features of images that the metrics need, by feature space and layer."""
        measurement = self.session.measurement
        found: dict[str, dict[str, Tensor]] = {}
        for metric in measurement.metrics:
            space = measurement.space(metric)
            if space is not None and metric.of == of and metric.feature_space not in found:
                with explain_memory(len(pixels)):
                    found[metric.feature_space] = space.extractor.all(pixels)
        return found

    def _take_in(self, accumulators: list[Guarded], batch: Batched, pixels: Tensor) -> None:
        measurement = self.session.measurement
        given = measurement.inputs.rows(batch.index % self.n)
        complete = self._complete(batch.index, given)
        labels = given.labels
        if labels is not None and has_own_labels(self.cell):
            labels = batch.labels
        self._update(
            accumulators,
            "samples",
            Batch(
                pixels,
                torch.empty(len(pixels), 0),
                labels,
                batch.index,
                batch.states,
                batch.stochastic,
                complete,
                self._prompts(given),
            ),
        )

    def _complete(self, index: Tensor, inputs: Inputs) -> Inputs:
        """The inputs of the samples `index`, completed by the model, on the CPU."""
        if not self.model.adds_inputs:  # it adds nothing: do not wait for the device
            return inputs
        device = self.model.device
        with plugin_call(f"model {self.model.identity.get('source')}", "in inputs"):
            return self.model.inputs(index.to(device), inputs.to(device)).to("cpu")

    def _update(self, accumulators: list[Guarded], of: str, batch: Batch) -> None:
        """Update the metrics of samples or of the data with a batch and the features that each metric requires."""
        features = self._features(batch.images, of)
        measurement = self.session.measurement
        for metric, accumulator, reason in zip(measurement.metrics, accumulators, self.reasons, strict=True):
            if metric.of != of or reason is not None or metric.spec in measurement.evaluated:
                continue
            own = features.get(metric.feature_space, {}).get(metric.layer) if metric.needs_features else None
            given = batch if own is None else replace(batch, features=own)
            if of == "data":
                update_counted(accumulator, given, self.model, self._networks_beside())
            else:
                accumulator.update(given)

    def _prompts(self, inputs: Inputs) -> tuple[str, ...] | None:
        texts: tuple[str, ...] = getattr(self.model, "prompts", ())
        return None if inputs.prompts is None or not texts else tuple(texts[i] for i in inputs.prompts.tolist())

    def _take_in_data(self, block: int, within: Tensor, accumulators: list[Guarded]) -> None:
        """Update the metrics of the real images with the images `within` (k,) of a block."""
        data = self.session.measurement.data
        if data is None:  # all metrics of the data have images of their own
            return
        model, index = self.model, within + block * self.n
        for rows in index.split(self.session.execution.batch_size):
            pixels = data.images[rows]
            labels = None if data.labels is None else data.labels[rows]
            with torch.no_grad(), explain_memory(len(rows)):
                states = model.encode(dequantise(pixels).to(model.device)).to(model.state_dtype)
            inputs = self._complete(rows, Inputs(len(rows), labels))
            empty = torch.empty(len(rows), 0)
            self._update(accumulators, "data", Batch(pixels, empty, labels, rows, states, False, inputs))

    def _results(self) -> list[dict[str, Any]]:
        pairs = zip(self.whole, self.reasons, strict=True)
        return [accumulator.result() if reason is None else {} for accumulator, reason in pairs]

    def _record(self) -> dict[str, Any]:
        n, seconds = self.n * self.blocks, self.progress.seconds
        timing = {
            **self.session.conditions,
            "seconds": round(seconds.sampling, 4),
            "decoder_seconds": round(seconds.decoding, 4),
            "metric_seconds": round(seconds.measuring, 4),
            "images_per_second": round(n / seconds.sampling, 3) if seconds.sampling else 0.0,  # only data was measured
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return describe(self.session, self.cell) | {
            **self.progress.cost.per_image(n),
            **({"bound_evaluations": bound} if (bound := self._prepared().bound_evaluations) else {}),
            "metrics": self._summary() if self.team.main else {},
            **self._inapplicable(),
            **timing,
            "timings": [] if self.progress.mixed else [timing],
            "resumed": self.progress.resumed,
            **({"shown": describe_shown(self.session, len(self.shown))} if len(self.shown) else {}),
        }

    def _inapplicable(self) -> dict[str, dict[str, str]]:
        """Return the field of a record that says why metrics have no value. Empty if all have one."""
        pairs = zip(self.session.measurement.names, self.reasons, strict=True)
        reasons = {name: reason for name, reason in pairs if reason is not None}
        return {"inapplicable": reasons} if reasons else {}

    def _summary(self) -> dict[str, Any]:
        """Return the summary of each metric: mean over blocks, values per block, standard deviation, and details."""
        measurement = self.session.measurement
        values = {}
        for i, metric in enumerate(measurement.metrics):
            entry = summarise_blocks([block[i] for block in self.progress.results])
            if not entry:
                continue
            space = measurement.space(metric)
            reference = None if space is None else space.reference
            label = "" if reference is None else reference.label
            if metric.data_source is not None:
                label = measurement.named[metric.data_source].label
            values[measurement.names[i]] = entry | {
                "features": "" if space is None else space.extractor.name,
                "reference": label,
                "better": metric.better,
                **({"unit": metric.unit} if metric.unit else {}),
                **({"of": "data"} if metric.of == "data" else {}),
            }
            if (images := measurement.evaluated.get(metric.spec)) is not None:
                values[measurement.names[i]]["data"] = images.name
        return values

    def _write_grid(self) -> None:
        if not len(self.shown):  # all metrics measure the data
            return
        buffer, images, columns = io.BytesIO(), self.shown, None
        if self.model.observation is not None:
            index = torch.arange(len(images))
            given = self._complete(index, self.session.measurement.inputs.rows(index))
            images, columns = with_observations(self.model, given, images)
        save_grid(images, buffer, columns)
        write_atomically(self.store.path(self.key, ".png"), buffer.getvalue())


def describe(session: Session, cell: Cell) -> dict[str, Any]:
    """Return the fields of a record that are known before the cell runs."""
    measurement = session.measurement
    return {
        "sampler": cell.method.spec,
        "parameters": cell.method.parameters,
        "guidance": None if cell.guidance is None else cell.guidance.spec,
        "spacing": None if cell.spacing is None else cell.spacing.spec,
        "steps": cell.steps,
        "budget": cell.budget,
        "n": measurement.n,
        "blocks": measurement.blocks,
        "seed": measurement.seed,
        "model": measurement.model.identity["source"],
        "labels": measurement.mode,
        **task_field(session),
        "versions": versions(),
    }


def task_field(session: Session) -> dict[str, str]:
    """Return the field of a record with the spec of the task. Empty without a task."""
    task = session.measurement.task
    return {} if task is None else {"task": task.spec}


def solver(session: Session, cell: Cell) -> Callable[[Tensor, Sampler], Tensor]:
    """Return a function that computes the converged solution from the same x_T, under the same guidance.

    Metrics of the discretisation error use it. Solutions are shared by all cells of a session and are kept in memory up
    to `SOLUTIONS` bytes. A request to stop takes effect after the next step of the solver. The solution in progress is
    then lost, because checkpoints do not contain it.

    Args:
        session: The measurement and how it is executed.
        cell: The cell that is compared with the solution.

    Returns:
        A function of image indices (k,) and a sampler. It returns the final states (k, ...).
    """
    guidance = None if cell.guidance is None else cell.guidance.spec
    model, measurement = session.measurement.model, session.measurement

    def total(sampler: Sampler) -> int:
        """Return the number of images, over all blocks, for which this sampler computes solutions."""
        wanted = [metric.solution(measurement.n) for metric in measurement.metrics]
        return max((w[1] for w in wanted if w is not None and w[0] == sampler), default=0) * measurement.blocks

    def solve(index: Tensor, sampler: Sampler) -> Tensor:
        key = (sampler.spec, guidance, tuple(index.tolist()))
        if key in session.solutions:
            return session.solutions[key].to(model.device)
        solving = solution_cell(model, sampler, cell.guidance)
        if session.execution.stop():
            raise Stopped
        with session.execution.solving(len(index), max(len(index), total(sampler))) as on_step:

            def stop_or_go_on(i: int, step: Step) -> None:
                if session.execution.stop():
                    raise Stopped
                if on_step is not None:
                    on_step(i, step)

            seed, size = session.measurement.seed, len(index)
            inputs = measurement.inputs.rows(index.cpu() % measurement.n)
            found = generate(model, solving, index, inputs, seed, size, stop_or_go_on, decode=False)
            states = torch.cat([batch.states for batch in found])
        if sum(s.nbytes for s in session.solutions.values()) + states.nbytes <= SOLUTIONS:
            session.solutions[key] = states.cpu()
        return states

    return solve


def image_solver(
    session: Session, cell: Cell, solve: Callable[[Tensor, Sampler], Tensor]
) -> Callable[[Tensor, Sampler], Tensor]:
    """Return a function that decodes the solutions of `solver`. The images are kept within the same `SOLUTIONS` bytes.

    Args:
        session: The measurement and how it is executed.
        cell: The cell that is compared with the solution.
        solve: The function of `solver`.

    Returns:
        A function of image indices (k,) and a sampler. It returns images (k, C, H, W), uint8, on the CPU.
    """
    guidance = None if cell.guidance is None else cell.guidance.spec
    model = session.measurement.model

    def solve_images(index: Tensor, sampler: Sampler) -> Tensor:
        key = ("images", sampler.spec, guidance, tuple(index.tolist()))
        if key not in session.solutions:
            with torch.no_grad(), explain_memory(len(index)):
                images = quantise(model.decode(solve(index, sampler).to(model.device))).cpu()
            if sum(s.nbytes for s in session.solutions.values()) + images.nbytes > SOLUTIONS:
                return images
            session.solutions[key] = images
        return session.solutions[key]

    return solve_images


def solution_cell(model: Model, sampler: Sampler, guidance: Guidance | None) -> Cell:
    """Create the cell that computes a converged solution.

    It starts at the largest noise level of the model, independently of the grid of the cell it is compared with.

    Args:
        model: The model.
        sampler: A sampler that chooses its own steps.
        guidance: The guidance, or None.

    Returns:
        The cell.

    Raises:
        UserError: If the sampler does not choose its own steps.
    """
    cells, _ = plan(model, [sampler], [1], [guidance], _no_spacing)
    cells[0].check()
    return cells[0]


def _no_spacing(sampler: Sampler) -> Spacing:
    raise UserError(
        f"sampler {sampler.label()} does not choose its own steps, so it cannot compute a converged solution."
    )


def _merge(whole: Sequence[Accumulator], states: Iterable[dict[str, Tensor]]) -> None:
    for accumulator, state in zip(whole, states, strict=False):
        if state:  # empty at the beginning of a block
            accumulator.merge(state)
