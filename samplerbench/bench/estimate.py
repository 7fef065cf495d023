"""How long a run will take: its evaluations, planned or measured on two images, times the measured time of one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from samplerbench.bench.cell import Cell
from samplerbench.bench.cell_run import SOLUTIONS, solution_cell
from samplerbench.bench.generate import SamplerOnModel, prepare
from samplerbench.bench.prepare import Prepared, check_measurement
from samplerbench.boundary import plugin_call
from samplerbench.models.sample import start_batch
from samplerbench.sampling import Generator, Step
from samplerbench.sampling.guidance import evaluations_of
from samplerbench.sampling.meter import Meter
from samplerbench.sampling.sampler import planned_nfe

TRIAL = 2
"""Images on which the evaluations of a solver that chooses its own steps are measured."""


@dataclass(frozen=True)
class Row:
    """A part of a run.

    Attributes:
        cell: the cell; for a converged solution, the cell that solves it.
        metrics: the metrics that the solution is for; empty for a cell of the run.
        nfe: network evaluations per image.
        measured: whether `nfe` was measured on a few images, and not planned.
        images: how many images, over all blocks.
        seconds: the time they take.
    """

    cell: Cell
    metrics: tuple[str, ...]
    nfe: float
    measured: bool
    images: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """An estimate of one seed's run.

    Attributes:
        rows: the cells that are sampled, then the converged solutions that metrics compute.
        n: images per block.
        evaluation: seconds for one evaluation of one image.
    """

    rows: list[Row]
    n: int
    evaluation: float

    @property
    def seconds(self) -> float:
        """Of all rows."""
        return sum(row.seconds for row in self.rows)


def estimate(prepared: Prepared) -> Estimate:
    """The estimate for a run, by a short calibration. Raises UserError for a run that would be refused, RunError."""
    n, blocks = check_measurement(prepared), prepared.request.blocks
    evaluation = seconds_per_evaluation(prepared, min(prepared.batch_size, n))

    def row(cell: Cell, metrics: Sequence[str], nfe: float, measured: bool, images: int) -> Row:
        return Row(cell, tuple(metrics), nfe, measured, images, nfe * images * evaluation)

    rows = []
    for cell, *_ in prepared.runs:
        if cell.error is not None:  # it will fail at once
            continue
        planned = None if isinstance(cell.method, Generator) else planned_nfe(cell.sampler, cell.steps or 1)
        measured = planned is None
        nfe = measured_nfe(prepared, cell) if planned is None else planned * evaluations_of(cell.guidance)
        rows.append(row(cell, (), nfe, measured, n * blocks))
    for cell, names, images in _solutions(prepared, n):
        rows.append(row(cell, names, measured_nfe(prepared, cell), True, images))
    return Estimate(rows, n, evaluation)


def _solutions(prepared: Prepared, n: int) -> list[tuple[Cell, list[str], int]]:
    """(the cell that solves it, the metrics it is for, images over all blocks) of each converged solution.

    Where every cell under a guidance draws noise, none asks for a solution, and there is no row.
    """
    model, blocks = prepared.model, prepared.request.blocks
    found: dict[tuple[str, str | None], tuple[Cell, list[str], int]] = {}
    for metric in prepared.metrics:
        with plugin_call(metric, "in solution"):
            wanted = metric.solution(n)
        if wanted is None:
            continue
        name, (sampler, images) = metric.label(), wanted
        for guidance in dict.fromkeys(c.guidance for c in prepared.cells if c.error is None):
            key = (sampler.spec, None if guidance is None else guidance.spec)
            cell, names, most = found.get(key, (solution_cell(model, sampler, guidance), [], 0))
            found[key] = (cell, [*names, name], max(most, images * blocks))
    # What does not fit into the memory for solutions is solved again for every cell.
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
    """Ends a trial at the first noise that a sampler draws."""


def draws_noise(prepared: Prepared, cell: Cell) -> bool:
    """Whether a cell's sampler draws noise on its way: metrics of the discretisation error do not apply to it.

    One image is sampled, up to the first noise that is drawn.
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
    """Seconds for one evaluation of one image, in batches of `batch` images."""
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
    """Network evaluations per image of a sampler that chooses its own steps, on the first images of the run."""
    model = prepared.model
    generator = prepare(model, cell)
    with Meter(generator.network) as meter:
        inputs, seed = prepared.inputs(TRIAL), prepared.request.seeds[0]
        for _ in generator.generate(torch.arange(TRIAL), inputs, seed, TRIAL, decode=False):
            pass
    return meter.network / TRIAL
