"""Samples beside the training images that are nearest to them: whether a model copies its training data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samplerbench.bench.setup import named_data
from samplerbench.figures.panel import Drawing, Panel
from samplerbench.figures.scene import Scene
from samplerbench.metrics.memorisation import as_points
from samplerbench.metrics.neighbours import Neighbours

MOST = 3
"""Neighbours that are shown at most."""


@dataclass(frozen=True)
class Beside:
    """Samples and their nearest real images, by distance in pixels.

    Attributes:
        samples: (n, C, H, W) uint8.
        neighbours: (n, k, C, H, W) uint8, the nearest first.
        distances: (n, k), Euclidean distances of images with values in [0, 1].
        own: (n,), distance from the nearest real image to the nearest other one.
        label: of the data set.
    """

    samples: Tensor
    neighbours: Tensor
    distances: Tensor
    own: Tensor
    label: str


def beside(scene: Scene, k: int) -> Beside:
    """Sample the one cell of the scene, and find the k nearest real images of each sample.

    The real images are those that the scene names, or else the training images of the model.

    Raises:
        UserError: there is no such data set, or the model does not say what it was trained on.
    """
    (cell,) = scene.cells
    real = named_data(scene.model, scene.data or "")
    neighbours = Neighbours(as_points(real.images))  # before the samples, because it checks the number of images
    samples = scene.pixels(scene.run(cell, scene.start(cell), scene.labels))
    distances, index = neighbours.nearest(as_points(samples), k)
    return Beside(samples, real.images[index], distances, neighbours.own[index[:, 0]], real.label)


def still(scene: Scene, found: Beside) -> Drawing:
    """A still figure: one row per sample; the sample, then its nearest real images."""
    images = torch.cat([found.samples[:, None], found.neighbours], dim=1)
    ratio = found.distances[:, 0] / found.distances[:, 1]
    names = [
        f"{name}\n{float(d):.2f}, ratio {float(r):.2f}"
        for name, d, r in zip(scene.name_rows(scene.labels), found.distances[:, 0], ratio, strict=True)
    ]
    heads = ["sample", "nearest", "second", "third"][: images.shape[1]]
    authentic = float((found.distances[:, 0] > found.own).double().mean())
    note = f"distance in pixels to {found.label} · authenticity {authentic:.0%} of {len(images)} · "
    return Drawing(
        "Samples and their nearest training images",
        [Panel(images, names, heads)],
        note + scene.describe(scene.cells[0]),
    )
