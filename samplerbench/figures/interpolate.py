"""Spherical interpolation between two x_T, decoded by a deterministic sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from samplerbench.bench.cell import Cell
from samplerbench.figures.panel import Drawing, Panel
from samplerbench.figures.scene import Scene, name_steps
from samplerbench.figures.slerp import slerp


def fractions(points: int) -> list[float]:
    """α = 0, …, 1 in equal steps."""
    return [i / (points - 1) for i in range(points)]


def between(scene: Scene, cell: Cell, points: int) -> Tensor:
    """Interpolated images, (n, points, C, H, W) uint8. Row i is between samples i and n + i, with the label of sample
    i.

    Raises:
        UserError: a sampler that draws noise.
    """
    a, b = scene.z(), scene.z(scene.n)
    z = torch.stack([slerp(a, b, fraction) for fraction in fractions(points)], dim=1)
    labels = None if scene.labels is None else scene.labels.repeat_interleave(points)
    x = scene.model.prior(z.flatten(0, 1), float(cell.sigmas[0]))
    images = scene.pixels(scene.run(cell, x, labels, deterministic=True))
    return images.unflatten(0, (scene.n, points))


def panel(scene: Scene, cell: Cell, images: Tensor) -> Panel:
    """A still figure: rows are pairs of samples, columns are α."""
    title = f"Between two x_T: spherical interpolation, {name_steps(cell.steps)}"
    heads = [f"α = {fraction:.3g}" for fraction in fractions(images.shape[1])]
    return Panel(images, scene.name_rows(scene.labels), heads, title)


def frames(scene: Scene, cell: Cell, images: Tensor) -> list[Drawing]:
    """An animation: one frame per α, forwards and backwards, with the pairs in a row."""
    names, there = scene.name_rows(scene.labels), list(enumerate(fractions(images.shape[1])))
    return [
        Drawing(f"α = {fraction:.2f}", [Panel(images[None, :, i], [""], names)], scene.describe(cell))
        for i, fraction in there + there[-2:0:-1]
    ]
