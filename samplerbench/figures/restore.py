"""Restorations of observed images by several methods, and how much several samples of one observation differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samplerbench.bench.cell import Cell
from samplerbench.data.pixels import dequantise, quantise
from samplerbench.errors import UserError, argument
from samplerbench.figures.panel import Drawing, Panel
from samplerbench.figures.scene import Scene, name_steps
from samplerbench.sampling import Inputs, Observation


@dataclass(frozen=True)
class Restored:
    """Restorations of n images by M methods.

    Attributes:
        truth: the observed images, (n, C, H, W) uint8.
        observed: their observations in the space of images (`Observation.picture`), (n, C, H, W) uint8.
        images: the first sample of each observation, (M, n, C, H, W) uint8.
        spread: standard deviation of each pixel over the samples of an observation, averaged over the channels,
            (M, n, H, W), for images in [-1, 1]. None if each observation has one sample.
        samples: number of samples of each observation.
    """

    truth: Tensor
    observed: Tensor
    images: Tensor
    spread: Tensor | None
    samples: int


def restorations(scene: Scene, samples: int) -> Restored:
    """Restore images with each run of the scene.

    Sample i is that of `samplerbench run` with the same seed and `images` of the task equal to the number of images.

    Args:
        scene: the scene. Its model has observations of n images, and it has n · samples samples.
        samples: number of samples of each observation.

    Raises:
        UserError: if the number of images of the task is not n.
        RunError: if a sampler or a guidance fails.
    """
    observation = scene.model.observation
    assert observation is not None
    n = scene.n // samples
    check_images(observation, n)
    given = scene.model.inputs(torch.arange(n, device=scene.model.device), Inputs(n)).tensors
    made = torch.stack([scene.pixels(scene.run(c, scene.start(c), scene.labels)) for c in scene.cells])
    groups = made.unflatten(1, (samples, n))
    spread = dequantise(groups).std(dim=1).mean(dim=2) if samples > 1 else None
    observed = quantise(observation.picture(given["observation"])).cpu()
    return Restored(quantise(given["truth"]).cpu(), observed, groups[:, 0], spread, samples)


def check_images(observation: Observation, n: int) -> None:
    """Raise UserError if the images of the task are not the n images of the figure."""
    task = observation.task
    if task.images not in (0, n):
        raise UserError(
            f"{argument('task', task.spec)}: the figure has {n} images; remove images from the task, and set the "
            f"number of rows with {argument('n')}."
        )
    if (count := len(observation.images)) < n:
        raise UserError(f"{argument('n', n)}: there are only {count:,} real images; use a smaller number.")


def still(scene: Scene, restored: Restored) -> Drawing:
    """A still figure: one row per image; truth, observation, restorations by method, and spreads by method."""
    names = _names(scene.cells)
    columns = [restored.truth, restored.observed, *restored.images]
    heads = ["truth", "observation", *names]
    cell, task = scene.cells[0], scene.prepared.tasks[0]
    words = [task.spec, scene.name]
    words += [cell.sampler.spec] if len({c.sampler for c in scene.cells}) == 1 else []
    words += [f"spacing {cell.spacing.spec}"] if cell.spacing is not None else []
    words += [name_steps(cell.steps), f"seed {scene.seed}"]
    note = " · ".join(words)
    if restored.spread is not None:
        largest = float(restored.spread.max())
        shade = (restored.spread / (largest or 1.0) * 255).round().to(torch.uint8)
        channels = restored.truth.shape[1]
        columns += [one[:, None].expand(-1, channels, -1, -1) for one in shade]
        heads += [f"spread\n{name}" for name in names]
        note += f"\nspread: standard deviation over {restored.samples} samples, white is {largest:.2g} in [-1, 1]"
    rows = [f"image {i}" for i in range(len(restored.truth))]
    return Drawing("Restorations", [Panel(torch.stack(columns, dim=1), rows, heads)], note)


def _names(cells: list[Cell]) -> list[str]:
    """The heading of each cell: its guidance, with the sampler if there are several."""
    several = len({cell.sampler for cell in cells}) > 1
    names = ["none" if cell.guidance is None else cell.guidance.spec for cell in cells]
    return [f"{c.sampler.spec}\n{name}" if several else name for c, name in zip(cells, names, strict=True)]
