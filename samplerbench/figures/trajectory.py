"""The trajectory from noise to an image: the state x_t and the denoised image D(x_t)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samplerbench.bench.cell import Cell
from samplerbench.errors import UserError, argument
from samplerbench.figures.panel import Drawing, Panel
from samplerbench.figures.scene import Scene, name_sigma, nearest, spread
from samplerbench.sampling import Step


@dataclass(frozen=True)
class Point:
    """The samples at one noise level.

    Attributes:
        taken: number of steps so far.
        sigma: the noise level.
        x: states, (n, *shape).
        x0: denoised states, (n, *shape).
    """

    taken: int
    sigma: float
    x: Tensor
    x0: Tensor


def follow(scene: Scene, cell: Cell, columns: int, sigmas: list[float] | None = None) -> list[Point]:
    """The states of a run at some of its noise levels.

    D is evaluated again at each of the states, so that it is D(x_t, σ_t) for every method. At σ = 0 it is the state.

    Args:
        scene: the model and the samples.
        cell: the run.
        columns: the number of levels, evenly spaced in steps.
        sigmas: noise levels; the nearest levels in log σ are used, in place of `columns`.

    Raises:
        UserError: a sampler that chooses its own steps.
    """
    if cell.steps is None:
        raise UserError(
            f"sampler {cell.sampler.spec} chooses its own steps, so there are no common levels to show; name another "
            f"{argument('sampler')}."
        )
    start = scene.start(cell)
    states: list[list[Tensor]] = [[start]]
    levels = [float(cell.sigmas[0])]

    def on_step(i: int, step: Step) -> None:
        if i + 1 == len(states):
            states.append([])
            levels.append(step.sigma)
        states[i + 1].append(step.x)

    scene.run(cell, start, scene.labels, on_step=on_step)
    chosen = spread(len(states), columns) if sigmas is None else nearest(levels, sigmas)
    points = []
    for i in chosen:
        x = torch.cat(states[i])
        x0 = scene.denoised(cell, x, levels[i], scene.labels) if levels[i] > 0 else x
        points.append(Point(i, levels[i], x, x0))
    return points


def still(scene: Scene, cell: Cell, points: list[Point]) -> Drawing:
    """A still figure: for each sample a row of states above a row of denoised states. Columns are noise levels."""
    states, denoised = _seen(scene, points)
    both = torch.stack([states, denoised], dim=2).flatten(1, 2).transpose(0, 1)
    rows = [row for name in scene.name_rows(scene.labels) for row in (f"{name}    xₜ", "D(xₜ)")]
    heads = [f"{name_sigma(p.sigma)}\nstep {p.taken}" for p in points]
    return Drawing("From noise to an image", [Panel(both, rows, heads, group=2)], scene.describe(cell, noisy=True))


def frames(scene: Scene, cell: Cell, points: list[Point]) -> list[Drawing]:
    """An animation: one frame per noise level, with a row of states above a row of denoised states."""
    states, denoised = _seen(scene, points)
    names = scene.name_rows(scene.labels)
    return [
        Drawing(
            f"{name_sigma(p.sigma)}, step {p.taken} of {cell.steps}",
            [Panel(torch.stack([states[i], denoised[i]]), ["xₜ", "D(xₜ)"], names)],
            scene.describe(cell, noisy=True),
        )
        for i, p in enumerate(points)
    ]


def _seen(scene: Scene, points: list[Point]) -> tuple[Tensor, Tensor]:
    """The states, scaled for display, and the denoised states, (K, n, C, H, W) uint8 each."""
    states = torch.stack([scene.pixels(p.x, p.sigma) for p in points])
    return states, torch.stack([scene.pixels(p.x0) for p in points])
