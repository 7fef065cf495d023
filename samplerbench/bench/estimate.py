"""Estimates of the time of a run: number of network evaluations times the measured time of one evaluation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from samplerbench.bench.cell import Cell
from samplerbench.bench.cell_run import SOLUTIONS, solution_cell
from samplerbench.bench.generate import SamplerOnModel, prepare
from samplerbench.bench.prepare import Prepared, check_measurement, evaluated_images
from samplerbench.bench.session import why_not
from samplerbench.boundary import plugin_call
from samplerbench.metrics.metric import Context, names_of, need_samples
from samplerbench.metrics.reference import Reference
from samplerbench.models.sample import start_batch
from samplerbench.sampling import Denoiser, Generator, Guidance, Inputs, Step
from samplerbench.sampling.guidance import evaluations_of
from samplerbench.sampling.meter import Meter
from samplerbench.sampling.sampler import planned_nfe

TRIAL = 2
"""Number of images for measuring the evaluations of a solver that chooses its own steps."""


@dataclass(frozen=True)
class Row:
    """The estimate of one part of a run.

    Attributes:
        cell: The cell, or the cell that computes a converged solution.
        metrics: Names of the metrics that use the converged solution, or the name of the metric of the data that takes
            the evaluations. Empty for the samples of a cell.
        nfe: Network evaluations per image.
        measured: Whether `nfe` was measured on a few images instead of planned.
        images: Number of images over all blocks.
        seconds: Estimated time in seconds.
        of_data: Whether the evaluations are those of a metric of the data.
        backward: Backward passes through the network per image.
    """

    cell: Cell
    metrics: tuple[str, ...]
    nfe: float
    measured: bool
    images: int
    seconds: float
    of_data: bool = False
    backward: float = 0


@dataclass(frozen=True)
class Estimate:
    """The estimate of a run with one seed.

    Attributes:
        rows: The cells that are sampled, followed by the metrics of the data and by the converged solutions that
            metrics use.
        n: Images per block.
        evaluation: Time of one network evaluation of one image, in seconds.
    """

    rows: list[Row]
    n: int
    evaluation: float

    @property
    def seconds(self) -> float:
        """Total time of all rows, in seconds."""
        return sum(row.seconds for row in self.rows)


def estimate(prepared: Prepared) -> Estimate:
    """Estimate the time of a run from a short calibration.

    Args:
        prepared: The prepared request.

    Returns:
        The estimate for one seed.

    Raises:
        UserError: If the run would be rejected.
        RunError: If a plugin fails.
    """
    n, blocks = check_measurement(prepared), prepared.request.blocks
    evaluation = seconds_per_evaluation(prepared, min(prepared.batch_size, n))

    def row(cell: Cell, metrics: Sequence[str], nfe: float, measured: bool, images: int) -> Row:
        return Row(cell, tuple(metrics), nfe, measured, images, nfe * images * evaluation)

    rows = []
    sampled = need_samples(prepared.metrics)
    for cell, *_ in prepared.runs:
        if cell.error is not None:  # this cell fails immediately
            continue
        if not sampled:  # metrics of the data alone
            rows.append(row(cell, (), 0, False, n * blocks))
            continue
        planned = None if isinstance(cell.method, Generator) else planned_nfe(cell.sampler, cell.steps or 1)
        measured = planned is None
        nfe = measured_nfe(prepared, cell) if planned is None else planned * evaluations_of(cell.guidance)
        rows.append(row(cell, (), nfe, measured, n * blocks))
    rows += _evaluations(prepared, evaluation)
    for cell, names, images in _solutions(prepared, n):
        rows.append(row(cell, names, measured_nfe(prepared, cell), True, images))
    return Estimate(rows, n, evaluation)


def _evaluations(prepared: Prepared, evaluation: float) -> list[Row]:
    """Return a row for each cell and metric of the data with images of its own. A backward pass counts as two."""
    model, blocks, rows = prepared.model, prepared.request.blocks, []
    evaluated = evaluated_images(prepared)
    for name, metric in zip(names_of(prepared.metrics), prepared.metrics, strict=True):
        if (images := evaluated.get(metric.spec)) is None:
            continue
        for cell, *_ in prepared.runs:
            if cell.error is not None or isinstance(cell.method, Generator) or why_not(metric, cell, model) is not None:
                continue

            def denoiser(inputs: Inputs, guidance: Guidance | None = cell.guidance) -> Denoiser:
                return model.denoiser(inputs.to(model.device), guidance)

            context = Context(cast(Reference, None), denoiser=denoiser, model=model, evaluated=images)
            context.sigmas = cell.sigmas
            with plugin_call(metric, "in evaluations"):
                forward, backward = metric.evaluations(cell.sampler, cell.sigmas, context)
            forward, backward = forward * evaluations_of(cell.guidance), backward * evaluations_of(cell.guidance)
            count = images.n * blocks
            seconds = (forward + 2 * backward) * count * evaluation
            rows.append(Row(cell, (name,), forward, cell.steps is None, count, seconds, True, backward))
    return rows


def _solutions(prepared: Prepared, n: int) -> list[tuple[Cell, list[str], int]]:
    """Return (cell that computes it, names of metrics, images over all blocks) for each converged solution.

    Cells that draw noise do not use a solution. If all cells under a guidance draw noise, it has no entry.
    """
    model, blocks = prepared.model, prepared.request.blocks
    found: dict[tuple[str, str | None], tuple[Cell, list[str], int]] = {}
    for name, metric in zip(names_of(prepared.metrics), prepared.metrics, strict=True):
        with plugin_call(metric, "in solution"):
            wanted = metric.solution(n)
        if wanted is None:
            continue
        sampler, images = wanted
        for guidance in dict.fromkeys(c.guidance for c in prepared.cells if c.error is None):
            key = (sampler.spec, None if guidance is None else guidance.spec)
            cell, names, most = found.get(key, (solution_cell(model, sampler, guidance), [], 0))
            found[key] = (cell, [*names, name], max(most, images * blocks))
    # Solutions that do not fit into memory are computed again for every cell.
    size = torch.empty(0, dtype=torch.float64 if model.dtype == torch.float64 else torch.float32).element_size()
    each = size * model.shape[0] * model.shape[1] * model.shape[2]
    kept = SOLUTIONS // max(1, each * len(found))
    solved = []
    for cell, names, images in found.values():
        under = sorted(
            (c for c, *_ in prepared.runs if c.guidance == cell.guidance and c.error is None),
            key=lambda c: c.steps or 0,
        )
        if images <= kept:
            cells = int(not all(draws_noise(prepared, c) for c in under))
        else:
            cells = sum(not draws_noise(prepared, c) for c in under)
        if cells:
            solved.append((cell, names, min(images, kept) + max(0, images - kept) * cells))
    return solved


class _Drawn(BaseException):
    """Ends a trial when a sampler draws noise for the first time."""


def draws_noise(prepared: Prepared, cell: Cell) -> bool:
    """Return whether the sampler of a cell draws noise. Metrics of the discretisation error then do not apply.

    One image is sampled until noise is drawn for the first time.

    Args:
        prepared: The prepared request.
        cell: The cell.

    Returns:
        Whether the sampler draws noise. True for a generator.
    """
    generator = prepare(prepared.model, cell)
    if not isinstance(generator, SamplerOnModel):
        return True
    inputs, cell, seed = prepared.inputs(1), generator.cell, prepared.request.seeds[0]
    batch = start_batch(
        prepared.model, cell.sampler, cell.sigmas, torch.arange(1), inputs, guidance=cell.guidance, seed=seed
    )

    def stop(_index: int, _step: Step) -> None:
        if batch.noise.draws:
            raise _Drawn

    try:
        batch.walk(stop)
    except _Drawn:
        return True
    return batch.noise.draws > 0


def seconds_per_evaluation(prepared: Prepared, batch: int) -> float:
    """Measure the time of one network evaluation.

    Args:
        prepared: The prepared request.
        batch: Images per batch.

    Returns:
        Seconds per evaluation and image.
    """
    model, trials = prepared.model, 3
    x = torch.zeros(batch, *model.shape, device=model.device, dtype=torch.float32)
    index = torch.arange(batch, device=model.device)
    denoise = model.denoiser(model.inputs(index, prepared.inputs(batch).to(model.device)))
    with torch.no_grad():
        denoise(x, 1.0)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        start = time.perf_counter()
        for _ in range(trials):
            denoise(x, 1.0)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
    return (time.perf_counter() - start) / trials / batch


def measured_nfe(prepared: Prepared, cell: Cell) -> float:
    """Measure the cost of a sampler that chooses its own steps, on the first images of the run.

    Args:
        prepared: The prepared request.
        cell: The cell.

    Returns:
        Network evaluations per image.
    """
    model = prepared.model
    generator = prepare(model, cell)
    with Meter(generator.network) as meter:
        inputs, seed = prepared.inputs(TRIAL), prepared.request.seeds[0]
        for _ in generator.generate(torch.arange(TRIAL), inputs, seed, TRIAL, decode=False):
            pass
    return meter.network / TRIAL
