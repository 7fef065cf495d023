"""The engine: runs cells, measures them, and keeps what is finished."""

from __future__ import annotations

import io
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from samplerbench.bench.cell import Cell, digest, protocol_of, versions
from samplerbench.bench.store import Store, write_atomically
from samplerbench.data.pixels import quantise
from samplerbench.errors import OutOfMemoryError, SamplerbenchError, UserError, is_out_of_memory
from samplerbench.metrics.extractors import Extractor
from samplerbench.metrics.metric import Accumulator, Batch, Metric
from samplerbench.metrics.reference import Reference
from samplerbench.models.model import Model, check_guidance
from samplerbench.sampling import Guidance, Noise, Sampler, Spacing
from samplerbench.sampling.driver import OnStep, drive
from samplerbench.sampling.meter import Meter
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.spacing import make_grid


@dataclass(frozen=True)
class Batched:
    """One sampled batch: which samples, and the images, (B, C, H, W) in [-1, 1]."""

    index: Tensor
    images: Tensor


def plan(
    model: Model,
    samplers: Sequence[Sampler],
    steps: Sequence[int],
    guidances: Sequence[Guidance | None],
    spacing_of: Callable[[Sampler], Spacing],
    budgets: Sequence[int] = (),
) -> tuple[list[Cell], list[Unmet]]:
    """The cells of a run, in the order of the table: every sampler, guidance, and number of steps or budget.

    A sampler that chooses its own steps has one cell, from the model's largest level. Under a budget of network
    evaluations a sampler takes the most steps that fit; one that cannot be met is no cell but a row's gap.

    Raises:
        UserError: a spacing that cannot give so many steps.
    """
    cells: list[Cell] = []
    unmet: list[Unmet] = []
    for sampler in samplers:
        for guidance in guidances:
            if sampler.nfe(1) is None:
                ends = torch.stack([model.levels[-1], model.levels.new_zeros(())])
                cells.append(Cell(sampler, guidance, None, None, ends))
                continue
            spacing = spacing_of(sampler)
            shown = None if sampler.own_grid else spacing
            wanted: list[tuple[int, int | None]] = [(n, None) for n in steps]
            for budget in budgets:
                cost = 1 if guidance is None else guidance.evaluations
                most = most_steps(sampler, cost, budget)
                if most is None:
                    unmet.append(Unmet(sampler, guidance, budget, cost * (sampler.nfe(1) or 0)))
                else:
                    wanted.append((most, budget))
            cells += [Cell(sampler, guidance, shown, n, make_grid(spacing, model.levels, n), b) for n, b in wanted]
    return cells, unmet


@dataclass(frozen=True)
class Unmet:
    """A budget of evaluations below what even one step of a sampler costs."""

    sampler: Sampler
    guidance: Guidance | None
    budget: int
    least: int

    @property
    def record(self) -> dict[str, Any]:
        """What stands in the place of a result."""
        return {
            "sampler": self.sampler.spec,
            "guidance": None if self.guidance is None else self.guidance.spec,
            "spacing": None,
            "steps": None,
            "budget": self.budget,
            "metrics": {},
            "unmet": f"a budget of {self.budget} evaluations is below the {self.least} of one step",
        }


def most_steps(sampler: Sampler, cost: int, budget: int) -> int | None:
    """The most steps whose evaluations, `cost` network rows each, are within the budget; None if one is too many."""
    return next((n for n in range(budget // cost, 0, -1) if (sampler.nfe(n) or 0) * cost <= budget), None)


def prepare(model: Model, cell: Cell) -> None:
    """Estimate what the sampler needs of the model besides D, where it is not known yet."""
    if "posterior variance" in cell.sampler.needs:
        model.estimate_posterior_variances(cell.sigmas)


def generate(
    model: Model,
    cell: Cell,
    index: Tensor,
    labels: Tensor | None,
    seed: int,
    batch_size: int,
    on_step: OnStep | None = None,
) -> Iterator[Batched]:
    """Sample the images `index` (n,) int64 with `labels` (n,) or None, batch by batch.

    Sample i is a function of (seed, i) and the cell alone.

    Raises:
        UserError, RunError: what the sampler meets; OutOfMemoryError names a batch size to try.
    """
    state_dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    start = float(cell.sigmas[0])
    prepare(model, cell)
    for first in range(0, len(index), batch_size):
        part = index[first : first + batch_size]
        rows = part.to(model.device)
        chosen = None if labels is None else labels[first : first + batch_size].to(model.device)
        with _explained(len(part)):
            z = normal(seed, Purpose.PRIOR, rows, 0, model.shape).to(state_dtype)
            noise = Noise(seed, rows, model.shape, state_dtype)
            denoise = model.denoiser(chosen, len(part), cell.guidance)
            x = drive(cell.sampler, denoise, model.prior(z, start), cell.sigmas, noise, on_step)
            with torch.no_grad():
                images = model.decode(x)
        yield Batched(part, images)


@contextmanager
def _explained(batch: int) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, SamplerbenchError) or not is_out_of_memory(error):
            raise
        advice = f"try --batch-size {batch // 2}" if batch > 1 else "one image alone does not fit; use another --device"
        raise OutOfMemoryError(f"the device has not enough memory for a batch of {batch}; {advice}.") from error


@dataclass
class Session:
    """What the cells of a run share.

    labels: (n,) int64 or None. mode: how they were asked for. keep: how many images the sample grid shows.
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
    shared: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        for metric in self.metrics:
            if self.n < metric.fewest:
                raise UserError(f"--n {self.n}: the metric {metric.label()} needs at least {metric.fewest} images.")
        counts = None if self.labels is None else torch.bincount(self.labels).tolist()
        self.shared = {
            "model": self.model.identity,
            "labels": {"mode": self.mode, "counts": counts},
            "n": self.n,
            "seed": self.seed,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "metrics": [m.spec for m in self.metrics],
            "features": self.extractor.identity,
            "reference": self.reference.data,
        }

    def protocol(self, cell: Cell) -> dict[str, Any]:
        """The cell's protocol, with the classifier's weights where it is guided by one."""
        fields = protocol_of(cell, self.shared)
        if cell.guidance is not None and "classifier" in cell.guidance.needs:
            weights = str(cell.guidance.parameters.get("weights", ""))
            fields["classifier"] = self.model.classifier(weights).sha256
        return fields


@dataclass
class Outcome:
    """What became of a cell: a record as written, the error if it failed, and whether it was there already."""

    cell: Cell
    record: dict[str, Any]
    error: SamplerbenchError | None = None
    reused: bool = False


def run_cell(session: Session, cell: Cell, on_step: OnStep | None = None) -> Outcome:
    """Run one cell, or take its result from the store. A cell that fails is an outcome too; Ctrl-C is not caught."""
    fields = session.protocol(cell)
    key = digest(fields)
    if not session.rerun and (found := session.store.get(key)) is not None:
        return Outcome(cell, found | {"budget": cell.budget}, reused=True)
    try:
        record = _measure(session, cell, on_step)
    except SamplerbenchError as error:
        failed = {**_describe(session, cell), "metrics": {}, "error": str(error), "protocol": key}
        # The outcome keeps the error, whose frames would keep the failed batch while the other cells run.
        for kept in (error, error.__cause__):
            if kept is not None:
                traceback.clear_frames(kept.__traceback__)
        return Outcome(cell, failed, error=error)
    record |= {"protocol": key, "protocol_fields": fields}
    session.store.put(record)
    return Outcome(cell, record)


def _describe(session: Session, cell: Cell) -> dict[str, Any]:
    return {
        "sampler": cell.sampler.spec,
        "parameters": cell.sampler.parameters,
        "guidance": None if cell.guidance is None else cell.guidance.spec,
        "spacing": None if cell.spacing is None else cell.spacing.spec,
        "steps": cell.steps,
        "budget": cell.budget,
        "n": session.n,
        "seed": session.seed,
        "model": session.model.identity["source"],
        "labels": session.mode,
        "versions": versions(),
    }


def _measure(session: Session, cell: Cell, on_step: OnStep | None) -> dict[str, Any]:
    model = session.model
    check_guidance(model, cell.guidance, session.labels)
    accumulators: list[Accumulator] = [metric.start(session.reference) for metric in session.metrics]
    shown: list[Tensor] = []
    sampling = measuring = 0.0
    prepare(model, cell)  # before the meter: what is estimated once per model is no evaluation of this run
    clock = time.perf_counter()
    with Meter(model.network, model.classifiers) as meter:
        batches = generate(
            model, cell, torch.arange(session.n), session.labels, session.seed, session.batch_size, on_step
        )
        for batch in batches:
            pixels = quantise(batch.images)
            _wait(model.device)
            sampling += time.perf_counter() - clock
            clock = time.perf_counter()
            features = session.extractor(pixels)
            labels = None if session.labels is None else session.labels[batch.index]
            for accumulator in accumulators:
                accumulator.update(Batch(pixels, features, labels))
            if sum(map(len, shown)) < session.keep:
                shown.append(pixels[: session.keep - sum(map(len, shown))].cpu())
            measuring += time.perf_counter() - clock
            clock = time.perf_counter()
    clock = time.perf_counter()
    values = {}
    for metric, accumulator in zip(session.metrics, accumulators, strict=True):
        values[metric.label()] = {
            **accumulator.result(),
            "features": session.extractor.name,
            "reference": session.reference.label,
            "better": metric.better,
        }
    measuring += time.perf_counter() - clock
    record = _describe(session, cell) | {
        "nfe": _per_image(meter.network, session.n),
        "classifier_forward": _per_image(meter.classifier_forward, session.n),
        "classifier_backward": _per_image(meter.classifier_backward, session.n),
        "metrics": values,
        "seconds": round(sampling, 4),
        "metric_seconds": round(measuring, 4),
        "images_per_second": round(session.n / sampling, 3),
        "batch_size": session.batch_size,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    _write_grid(session, cell, torch.cat(shown))
    return record


def _per_image(rows: int, n: int) -> int | float:
    return rows // n if rows % n == 0 else rows / n


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _write_grid(session: Session, cell: Cell, pixels: Tensor) -> None:
    from samplerbench.report.grid import save_grid

    buffer = io.BytesIO()
    save_grid(pixels, buffer)
    write_atomically(session.store.path(digest(session.protocol(cell)), ".png"), buffer.getvalue())


__all__ = ["Batched", "Cell", "Outcome", "Session", "generate", "plan", "run_cell"]
