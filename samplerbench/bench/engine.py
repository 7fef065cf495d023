"""The engine: runs cells, measures them, and keeps what is finished."""

from __future__ import annotations

import io
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from samplerbench.bench.cell import Cell, digest, metric_sources, protocol_of, versions
from samplerbench.bench.generate import Batched, explain_memory, generate, prepare
from samplerbench.bench.partial import Progress, load_partial, save_partial
from samplerbench.bench.plan import Unmet, most_steps, plan
from samplerbench.bench.span import Span
from samplerbench.bench.store import Store, write_atomically
from samplerbench.bench.team import Team
from samplerbench.data.pixels import quantise
from samplerbench.errors import RunError, SamplerbenchError, UserError
from samplerbench.metrics.extractors import Extractor
from samplerbench.metrics.metric import Accumulator, Batch, Context, Layer, Metric
from samplerbench.metrics.reference import Reference
from samplerbench.models.model import Model, check_guidance
from samplerbench.sampling import Sampler, Spacing
from samplerbench.sampling.driver import OnStep
from samplerbench.sampling.meter import Meter


@dataclass
class Session:
    """What the cells of a run share.

    labels: (n,) int64 or None. mode: how they were asked for. n: images per block. blocks: disjoint sets of samples,
    b·n … (b+1)·n-1 the b-th. keep: how many images the sample grid shows. real: the features of the real images in a
    layer, for the metrics that need them. checkpoint: images between two checkpoints of a cell; None is a tenth of n.
    stop: asked after each checkpoint; true ends the run there.
    """

    model: Model
    reference: Reference
    extractor: Extractor
    metrics: Sequence[Metric]
    labels: Tensor | None
    mode: str
    n: int
    seed: int
    batch_size: int
    store: Store
    rerun: bool = False
    keep: int = 100
    blocks: int = 1
    real: Callable[[Layer], Tensor] | None = None
    team: Team = field(default_factory=Team)
    checkpoint: int | None = None
    stop: Callable[[], bool] = lambda: False
    shared: dict[str, Any] = field(init=False)
    solutions: dict[Any, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for metric in self.metrics:
            if self.n < metric.fewest:
                raise UserError(f"--n {self.n}: the metric {metric.label()} needs at least {metric.fewest} images.")
        counts = None if self.labels is None else torch.bincount(self.labels).tolist()
        self.shared = {
            "model": self.model.identity,
            "labels": {"mode": self.mode, "counts": counts},
            "n": self.n,
            "blocks": self.blocks,
            "seed": self.seed,
            "dtype": "tf32" if self.model.precision == "tf32" else str(self.model.dtype).removeprefix("torch."),
            **({"compile": True} if self.model.compiled else {}),
            "metrics": [m.spec for m in self.metrics],
            **metric_sources(self.metrics),
            "features": self.extractor.identity,
            "reference": self.reference.data,
        }

    def protocol(self, cell: Cell) -> dict[str, Any]:
        """The cell's protocol, with the classifier's weights where it is guided by one."""
        fields = protocol_of(cell, self.shared)
        classifier = None if cell.guidance is None else self.model.guide_classifier(cell.guidance)
        if classifier is not None:
            fields["classifier"] = classifier.sha256
        return fields

    @property
    def chunk(self) -> int:
        """Images between two checkpoints: whole batches, so that a resumed run cuts the stream as the first did."""
        wanted = self.checkpoint or -(-self.n // 10)
        whole = self.batch_size * self.team.size
        return max(whole, -(-wanted // whole) * whole)


@dataclass
class Outcome:
    """What became of a cell: a record as written, the error if it failed, and whether it was there already."""

    cell: Cell
    record: dict[str, Any]
    error: SamplerbenchError | None = None
    reused: bool = False


def run_cell(session: Session, cell: Cell, on_step: OnStep | None = None) -> Outcome:
    """Run one cell, or take its result from the store. A cell that fails is an outcome too; Ctrl-C is not caught.

    The cell is claimed while it runs, so another run on the same folder waits for it instead of doing it again.
    """
    fields = session.protocol(cell)
    key = digest(fields)
    with session.store.claim(key, session.team):
        found = None if session.rerun else session.store.get(key)
        found = session.team.tell(found)
        if found is not None:
            return Outcome(cell, found | {"budget": cell.budget}, reused=True)
        try:
            record = _measure(session, cell, key, on_step) | {"protocol": key, "protocol_fields": fields}
            failure: SamplerbenchError | None = None
            if session.team.main:
                try:
                    session.store.put(record)
                except SamplerbenchError as error:
                    failure = error
            session.team.agree(failure)
        except SamplerbenchError as error:
            failed = {**_describe(session, cell), "metrics": {}, "error": str(error), "protocol": key}
            # The outcome keeps the error, whose frames would keep the failed batch while the other cells run.
            for kept in (error, error.__cause__):
                if kept is not None:
                    traceback.clear_frames(kept.__traceback__)
            return Outcome(cell, failed, error=error)
        if session.team.main:
            session.store.path(key, PARTIAL).unlink(missing_ok=True)
    return Outcome(cell, record)


PARTIAL = ".partial.safetensors"
SOLUTIONS = 256 * 2**20
"""Bytes of converged solutions that a session keeps."""


def is_claimed(session: Session, cell: Cell) -> bool:
    """Whether another run is at work on the cell right now."""
    return session.team.tell(session.store.is_claimed(digest(session.protocol(cell))))


def _describe(session: Session, cell: Cell) -> dict[str, Any]:
    return {
        "sampler": cell.sampler.spec,
        "parameters": cell.sampler.parameters,
        "guidance": None if cell.guidance is None else cell.guidance.spec,
        "spacing": None if cell.spacing is None else cell.spacing.spec,
        "steps": cell.steps,
        "budget": cell.budget,
        "n": session.n,
        "blocks": session.blocks,
        "seed": session.seed,
        "model": session.model.identity["source"],
        "labels": session.mode,
        "versions": versions(),
    }


def _measure(session: Session, cell: Cell, key: str, on_step: OnStep | None) -> dict[str, Any]:
    model, team = session.model, session.team
    check_guidance(model, cell.guidance, session.labels)
    prepare(model, cell)  # before the meter: what is estimated once per model is no evaluation of this run
    context = Context(session.reference, session.real, _solver(session, cell), session.n)
    file = session.store.path(key, PARTIAL)
    progress, shown = Progress(), torch.empty(0, *model.image_shape, dtype=torch.uint8)
    whole = _start(session, context)
    loaded = load_partial(file, len(session.metrics)) if team.main and not session.rerun else None
    if loaded is not None:
        progress, states, shown = loaded
        progress.resumed += 1
        _merge(whole, states)
    progress = team.tell(progress)
    for block in range(progress.block, session.blocks):
        while progress.done < session.n:
            last = min(session.n, progress.done + session.chunk)
            part, failure = _Part(), None
            try:
                part = _sample_part(session, cell, context, block, progress.done, last, on_step)
            except SamplerbenchError as error:
                failure = error
            team.agree(failure)
            for other in team.gather(part):
                _merge(whole, other.states)
                progress.network += other.network
                progress.network_backward += other.network_backward
                progress.forward += other.forward
                progress.backward += other.backward
                progress.decoder += other.decoder
                if block == 0 and len(shown) < session.keep:
                    shown = torch.cat([shown, other.pixels])[: session.keep]
            progress.sampling += part.sampling
            progress.decoding += part.decoding
            progress.measuring += part.measuring
            progress.done = last
            failure = None
            if team.main and (last < session.n or block + 1 < session.blocks):
                try:
                    _checkpoint(session, file, progress, whole, shown, block)
                except SamplerbenchError as error:
                    failure = error
            team.agree(failure)
            if team.tell(session.stop()):
                raise KeyboardInterrupt
        clock = time.perf_counter()
        if team.main:
            progress.results.append(_results(session, whole))
        progress.measuring += time.perf_counter() - clock
        progress.block, progress.done = block + 1, 0
        whole = _start(session, context)
    n = session.n * session.blocks
    record = _describe(session, cell) | {
        "nfe": _per_image(progress.network, n),
        "network_backward": _per_image(progress.network_backward, n),
        "classifier_forward": _per_image(progress.forward, n),
        "classifier_backward": _per_image(progress.backward, n),
        "decoder_passes": _per_image(progress.decoder, n),
        "metrics": _summary(session, progress.results) if team.main else {},
        "seconds": round(progress.sampling, 4),
        "decoder_seconds": round(progress.decoding, 4),
        "metric_seconds": round(progress.measuring, 4),
        "images_per_second": round(n / max(progress.sampling, 1e-9), 3),
        "batch_size": session.batch_size,
        "processes": team.size,
        "resumed": progress.resumed,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if team.main:
        _write_grid(session, key, shown)
    return team.tell(record)


def _checkpoint(
    session: Session, file: Any, progress: Progress, whole: list[Accumulator], shown: Tensor, block: int
) -> None:
    """Write what is known so far. A finished block is kept as its results, not as its accumulators."""
    if progress.done < session.n:
        save_partial(file, progress, [a.state() for a in whole], shown)
        return
    results = [*progress.results, _results(session, whole)]
    at_end = Progress(**{**vars(progress), "block": block + 1, "done": 0, "results": results})
    save_partial(file, at_end, [{} for _ in whole], shown)


@dataclass
class _Part:
    """What one process made of its share of a chunk."""

    states: list[dict[str, Tensor]] = field(default_factory=list)
    pixels: Tensor = field(default_factory=lambda: torch.empty(0))
    network: int = 0
    network_backward: int = 0
    forward: int = 0
    backward: int = 0
    decoder: int = 0
    sampling: float = 0.0
    decoding: float = 0.0
    measuring: float = 0.0


def _start(session: Session, context: Context) -> list[Accumulator]:
    return [metric.start(context) for metric in session.metrics]


def _merge(whole: list[Accumulator], states: Iterable[dict[str, Tensor]]) -> None:
    for accumulator, state in zip(whole, states, strict=False):
        if state:  # nothing is known yet, as at the beginning of a block
            accumulator.merge(state)


def _sample_part(
    session: Session, cell: Cell, context: Context, block: int, first: int, last: int, on_step: OnStep | None
) -> _Part:
    """Sample and measure this process's share of the images first … last-1 of a block."""
    model, part = session.model, _Part(pixels=torch.empty(0, *session.model.image_shape, dtype=torch.uint8))
    accumulators = _start(session, context)
    share = session.team.share(first, last)
    within = torch.arange(share.start, share.stop)
    labels = None if session.labels is None else session.labels[within]
    decoder = None if model.autoencoder is None else model.autoencoder.decoder
    sampling, decoding, measuring, uncounted = [], [], [], Counter[str]()
    with Meter(model.network, model.classifiers, decoder) as meter:
        batches = generate(model, cell, within + block * session.n, labels, session.seed, session.batch_size, on_step)
        for batch in batches:
            quantising = Span(model.device)
            pixels = quantise(batch.images)
            sampling += [batch.sampling, quantising.stop()]
            decoding += [batch.decoding] if batch.decoding is not None else []
            uncounted.update(batch.uncounted)
            taking = Span(model.device)
            meter.pause()
            _take_in(session, accumulators, batch, pixels)
            meter.resume()
            if block == 0 and len(part.pixels) < session.keep:
                part.pixels = torch.cat([part.pixels, pixels[: session.keep - len(part.pixels)].cpu()])
            measuring.append(taking.stop())
    part.sampling, part.decoding, part.measuring = (
        sum(span.seconds for span in spans) for spans in (sampling, decoding, measuring)
    )
    part.states = [accumulator.state() for accumulator in accumulators]
    part.network = meter.network + uncounted["network"]
    part.network_backward = meter.network_backward + uncounted["network_backward"]
    part.forward = meter.classifier_forward + uncounted["classifier_forward"]
    part.backward = meter.classifier_backward + uncounted["classifier_backward"]
    part.decoder = meter.decoder
    return part


def _take_in(session: Session, accumulators: list[Accumulator], batch: Batched, pixels: Tensor) -> None:
    with explain_memory(len(pixels)):
        features = session.extractor.all(pixels)
    labels = None if session.labels is None else session.labels[batch.index % session.n]
    for metric, accumulator in zip(session.metrics, accumulators, strict=True):
        with _explain_metric(metric):
            accumulator.update(
                Batch(pixels, features[metric.layer], labels, batch.index, batch.states, batch.stochastic)
            )


@contextmanager
def _explain_metric(metric: Metric) -> Iterator[None]:
    """Turn whatever a metric plugin raises into one line for the cell."""
    try:
        yield
    except SamplerbenchError:
        raise
    except Exception as error:
        raise RunError(f"metric {metric.label()} raised {type(error).__name__}: {error}") from error


def _results(session: Session, whole: list[Accumulator]) -> list[dict[str, Any]]:
    found = []
    for metric, accumulator in zip(session.metrics, whole, strict=True):
        with _explain_metric(metric):
            found.append(accumulator.result())
    return found


def _solver(session: Session, cell: Cell) -> Callable[[Tensor, Tensor | None, Sampler], Tensor]:
    """For metrics of the discretisation error: the converged solution from the same x_T, under the same guidance.

    It is the same for all cells of a session, and kept for them as long as there is room.
    """
    guidance = None if cell.guidance is None else cell.guidance.spec

    def solve(index: Tensor, labels: Tensor | None, sampler: Sampler) -> Tensor:
        key = (sampler.spec, guidance, tuple(index.tolist()))
        if key in session.solutions:
            return session.solutions[key].to(session.model.device)
        # A sampler that chooses its own steps starts at the model's largest level, whatever the cell's grid is.
        cells, _ = plan(session.model, [sampler], [], [cell.guidance], _no_spacing)
        found = generate(session.model, cells[0], index, labels, session.seed, len(index), decode=False)
        states = torch.cat([batch.states for batch in found])
        if sum(s.nbytes for s in session.solutions.values()) + states.nbytes <= SOLUTIONS:
            session.solutions[key] = states.cpu()
        return states

    return solve


def _no_spacing(sampler: Sampler) -> Spacing:
    raise UserError(f"sampler {sampler.label()} does not choose its own steps, so it is no converged solution.")


def _summary(session: Session, results: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Per metric: the mean over blocks, their values and standard deviation; what else one block's result says."""
    values = {}
    for i, metric in enumerate(session.metrics):
        blocks = [block[i] for block in results]
        if not all(blocks):
            continue
        found = [b["value"] for b in blocks]
        entry: dict[str, Any] = {**blocks[0], "value": statistics.fmean(found)}
        if len(found) > 1:
            for name in blocks[0]:
                entry[name] = statistics.fmean(b[name] for b in blocks)
            entry |= {"sd": statistics.stdev(found), "blocks": found}
        values[metric.label()] = entry | {
            "features": session.extractor.name,
            "reference": session.reference.label,
            "better": metric.better,
        }
    return values


def _per_image(rows: int, n: int) -> int | float:
    return rows // n if rows % n == 0 else rows / n


def _write_grid(session: Session, key: str, pixels: Tensor) -> None:
    from samplerbench.report.grid import save_grid

    buffer = io.BytesIO()
    save_grid(pixels, buffer)
    write_atomically(session.store.path(key, ".png"), buffer.getvalue())


__all__ = [
    "Batched",
    "Cell",
    "Outcome",
    "Session",
    "Unmet",
    "generate",
    "is_claimed",
    "most_steps",
    "plan",
    "prepare",
    "run_cell",
]
