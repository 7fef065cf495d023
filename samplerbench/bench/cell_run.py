"""The run of one cell: resumed, sampled, saved at checkpoints, finished as a record."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samplerbench.bench.cell import Cell, versions
from samplerbench.bench.generate import Batched, explain_memory, generate, prepare
from samplerbench.bench.plan import plan
from samplerbench.bench.session import Session
from samplerbench.bench.span import Span
from samplerbench.data.pixels import quantise
from samplerbench.errors import RunError, SamplerbenchError, Stopped, UserError
from samplerbench.metrics.metric import Accumulator, Batch, Context, Metric
from samplerbench.models.model import check_guidance
from samplerbench.results.files import write_atomically
from samplerbench.results.partial import PARTIAL, Extent, Progress, load_partial, save_partial
from samplerbench.sampling import Sampler, Spacing
from samplerbench.sampling.cost import Cost, Seconds
from samplerbench.sampling.driver import OnStep
from samplerbench.sampling.meter import Meter
from samplerbench.tensor_seal import DamagedError

SOLUTIONS = 256 * 2**20
"""Bytes of converged solutions that a session keeps."""


@dataclass
class Part:
    """What one process made of its share of a chunk.

    Attributes:
        states: one accumulator's state for each metric.
        pixels: (k, C, H, W) uint8, the first images, for the sample grid.
        cost, seconds: what it took.
    """

    states: list[dict[str, Tensor]] = field(default_factory=list)
    pixels: Tensor = field(default_factory=lambda: torch.empty(0))
    cost: Cost = field(default_factory=Cost)
    seconds: Seconds = field(default_factory=Seconds)


class CellRun:
    """One cell at work.

        run = CellRun(session, cell, key)
        run.resume()
        record = run.finish()  # samples what is missing, with a checkpoint after every chunk

    Attributes:
        progress: how far it is.
        whole: the accumulators of the block at work, one for each metric.
        shown: (k, C, H, W) uint8, the images of the sample grid so far.
    """

    def __init__(self, session: Session, cell: Cell, key: str, on_step: OnStep | None = None) -> None:
        self.session, self.cell, self.key, self.on_step = session, cell, key, on_step
        measurement, execution = session.measurement, session.execution
        self.model, self.team, self.store = measurement.model, execution.team, execution.store
        self.n, self.blocks, self.keep = measurement.n, measurement.blocks, execution.keep
        check_guidance(self.model, cell.guidance, measurement.labels)
        prepare(self.model, cell)  # before the meter: what is estimated once per model is no evaluation of this run
        self.context = Context(measurement.reference, measurement.real, solver(session, cell), measurement.n)
        self.progress = Progress()
        self.shown = torch.empty(0, *self.model.image_shape, dtype=torch.uint8)
        self.whole = self._accumulators()

    def resume(self) -> None:
        """Continue from the cell's checkpoint, if there is one."""
        self.progress.conditions = self.session.conditions
        if self.team.main and not self.session.execution.rerun:
            file = self.store.path(self.key, PARTIAL)
            try:
                self._load(file)
            except DamagedError as error:
                self.store.set_aside(file, str(error))
        self.progress = self.team.tell(self.progress)

    def _load(self, file: Path) -> None:
        """Take over a checkpoint, or leave everything as it is. Raises DamagedError."""
        extent = Extent(len(self.whole), self.n, self.blocks, self.model.image_shape, self.keep)
        found = load_partial(file, self.key, extent)
        if found is None:
            return
        try:
            _merge(self.whole, found.states)
        except Exception as error:
            self.whole = self._accumulators()
            raise DamagedError(f"its metrics cannot be taken over ({type(error).__name__}: {error})") from None
        progress, conditions = found.progress, self.session.conditions
        progress.resumed += 1
        progress.mixed = progress.mixed or progress.conditions != conditions
        progress.conditions = conditions
        self.progress, self.shown = progress, found.shown

    def finish(self) -> dict[str, Any]:
        """Sample and measure what is missing; the record, without its protocol.

        Raises:
            SamplerbenchError: what a plugin, the device or the disk did wrong; the last checkpoint remains.
            Stopped: the session's `stop` asked for it; the last checkpoint remains.
        """
        for block in range(self.progress.block, self.blocks):
            while self.progress.done < self.n:
                self._advance(block)
            clock = time.perf_counter()
            if self.team.main:
                self.progress.results.append(self._results())
            self.progress.seconds += Seconds(measuring=time.perf_counter() - clock)
            self.progress.block, self.progress.done = block + 1, 0
            self.whole = self._accumulators()
        record = self._record()
        if self.team.main:
            self._write_grid()
        return self.team.tell(record)

    def _advance(self, block: int) -> None:
        """Sample the next chunk of a block, with the other processes, and save it."""
        progress = self.progress
        last = min(self.n, progress.done + self.session.chunk)
        part, failure = Part(), None
        try:
            part = self.sample(block, progress.done, last)
        except SamplerbenchError as error:
            failure = error
        self.team.agree(failure)
        for other in self.team.gather(part):
            _merge(self.whole, other.states)
            progress.cost += other.cost
            if block == 0 and len(self.shown) < self.keep:
                self.shown = torch.cat([self.shown, other.pixels])[: self.keep]
        progress.seconds += part.seconds
        progress.done = last
        failure = None
        if self.team.main and (last < self.n or block + 1 < self.blocks):
            try:
                self.checkpoint(block)
            except SamplerbenchError as error:
                failure = error
        self.team.agree(failure)
        if self.team.tell(self.session.execution.stop()):
            raise Stopped

    def checkpoint(self, block: int) -> None:
        """Write what is known so far. A finished block is kept as its results, not as its accumulators."""
        file, progress = self.store.path(self.key, PARTIAL), self.progress
        if progress.done < self.n:
            save_partial(file, self.key, progress, [a.state() for a in self.whole], self.shown)
            return
        at_end = replace(progress, block=block + 1, done=0, results=[*progress.results, self._results()])
        save_partial(file, self.key, at_end, [{} for _ in self.whole], self.shown)

    def sample(self, block: int, first: int, last: int) -> Part:
        """Sample and measure this process's share of the images first … last-1 of a block."""
        model, measurement = self.model, self.session.measurement
        part = Part(pixels=torch.empty(0, *model.image_shape, dtype=torch.uint8))
        accumulators = self._accumulators()
        share = self.team.share(first, last)
        within = torch.arange(share.start, share.stop)
        labels = None if measurement.labels is None else measurement.labels[within]
        decoder = None if model.autoencoder is None else model.autoencoder.decoder
        sampling: list[Span] = []
        decoding: list[Span] = []
        measuring: list[Span] = []
        with Meter(model.network, model.classifiers, decoder) as meter:
            index, batch_size = within + block * self.n, self.session.execution.batch_size
            for batch in generate(model, self.cell, index, labels, measurement.seed, batch_size, self.on_step):
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
        part.seconds = Seconds(*(sum(span.seconds for span in spans) for spans in (sampling, decoding, measuring)))
        part.states = [accumulator.state() for accumulator in accumulators]
        part.cost += meter.cost
        return part

    def _accumulators(self) -> list[Accumulator]:
        return [metric.start(self.context) for metric in self.session.measurement.metrics]

    def _take_in(self, accumulators: list[Accumulator], batch: Batched, pixels: Tensor) -> None:
        measurement = self.session.measurement
        with explain_memory(len(pixels)):
            features = measurement.extractor.all(pixels)
        labels = None if measurement.labels is None else measurement.labels[batch.index % self.n]
        for metric, accumulator in zip(measurement.metrics, accumulators, strict=True):
            with _explain_metric(metric):
                accumulator.update(
                    Batch(pixels, features[metric.layer], labels, batch.index, batch.states, batch.stochastic)
                )

    def _results(self) -> list[dict[str, Any]]:
        found = []
        for metric, accumulator in zip(self.session.measurement.metrics, self.whole, strict=True):
            with _explain_metric(metric):
                found.append(accumulator.result())
        return found

    def _record(self) -> dict[str, Any]:
        n, seconds = self.n * self.blocks, self.progress.seconds
        timing = {
            **self.session.conditions,
            "seconds": round(seconds.sampling, 4),
            "decoder_seconds": round(seconds.decoding, 4),
            "metric_seconds": round(seconds.measuring, 4),
            "images_per_second": round(n / max(seconds.sampling, 1e-9), 3),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return describe(self.session, self.cell) | {
            **self.progress.cost.per_image(n),
            "metrics": self._summary() if self.team.main else {},
            **timing,
            "timings": [] if self.progress.mixed else [timing],
            "resumed": self.progress.resumed,
        }

    def _summary(self) -> dict[str, Any]:
        """For each metric: the mean over blocks, their values and standard deviation, and what else a result says."""
        measurement = self.session.measurement
        values = {}
        for i, metric in enumerate(measurement.metrics):
            blocks = [block[i] for block in self.progress.results]
            if not all(blocks):
                continue
            found = [b["value"] for b in blocks]
            entry: dict[str, Any] = {**blocks[0], "value": statistics.fmean(found)}
            if len(found) > 1:
                for name in blocks[0]:
                    entry[name] = statistics.fmean(b[name] for b in blocks)
                entry |= {"sd": statistics.stdev(found), "blocks": found}
            values[metric.label()] = entry | {
                "features": measurement.extractor.name,
                "reference": measurement.reference.label,
                "better": metric.better,
            }
        return values

    def _write_grid(self) -> None:
        from samplerbench.report.grid import save_grid

        buffer = io.BytesIO()
        save_grid(self.shown, buffer)
        write_atomically(self.store.path(self.key, ".png"), buffer.getvalue())


def describe(session: Session, cell: Cell) -> dict[str, Any]:
    """The part of a record that is known before anything has run."""
    measurement = session.measurement
    return {
        "sampler": cell.sampler.spec,
        "parameters": cell.sampler.parameters,
        "guidance": None if cell.guidance is None else cell.guidance.spec,
        "spacing": None if cell.spacing is None else cell.spacing.spec,
        "steps": cell.steps,
        "budget": cell.budget,
        "n": measurement.n,
        "blocks": measurement.blocks,
        "seed": measurement.seed,
        "model": measurement.model.identity["source"],
        "labels": measurement.mode,
        "versions": versions(),
    }


def solver(session: Session, cell: Cell) -> Callable[[Tensor, Tensor | None, Sampler], Tensor]:
    """For metrics of the discretisation error: the converged solution from the same x_T, under the same guidance.

    It is the same for all cells of a session, and kept for them as long as there is room.
    """
    guidance = None if cell.guidance is None else cell.guidance.spec
    model = session.measurement.model

    def solve(index: Tensor, labels: Tensor | None, sampler: Sampler) -> Tensor:
        key = (sampler.spec, guidance, tuple(index.tolist()))
        if key in session.solutions:
            return session.solutions[key].to(model.device)
        # A sampler that chooses its own steps starts at the model's largest level, whatever the cell's grid is.
        cells, _ = plan(model, [sampler], [], [cell.guidance], _no_spacing)
        found = generate(model, cells[0], index, labels, session.measurement.seed, len(index), decode=False)
        states = torch.cat([batch.states for batch in found])
        if sum(s.nbytes for s in session.solutions.values()) + states.nbytes <= SOLUTIONS:
            session.solutions[key] = states.cpu()
        return states

    return solve


def _no_spacing(sampler: Sampler) -> Spacing:
    raise UserError(f"sampler {sampler.label()} does not choose its own steps, so it is no converged solution.")


def _merge(whole: list[Accumulator], states: Iterable[dict[str, Tensor]]) -> None:
    for accumulator, state in zip(whole, states, strict=False):
        if state:  # nothing is known yet, as at the beginning of a block
            accumulator.merge(state)


@contextmanager
def _explain_metric(metric: Metric) -> Iterator[None]:
    """Turn whatever a metric plugin raises into one line for the cell."""
    try:
        yield
    except SamplerbenchError:
        raise
    except Exception as error:
        raise RunError(f"metric {metric.label()} raised {type(error).__name__}: {error}") from error
