"""The forward process: real images with increasing noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samplerbench.errors import UserError, argument
from samplerbench.figures.panel import Drawing, Panel
from samplerbench.figures.scene import Scene, name_sigma, spread
from samplerbench.sampling.process import VARIANCE_PRESERVING


@dataclass(frozen=True)
class Level:
    """A noise level, and its timestep for a discrete-time model."""

    sigma: float
    timestep: int | None

    @property
    def head(self) -> str:
        """The heading of its column."""
        if self.sigma == 0:
            return "x₀"
        return name_sigma(self.sigma) + (f"\nt = {self.timestep}" if self.timestep is not None else "")


def pick_levels(
    scene: Scene, columns: int, timesteps: list[int] | None = None, sigmas: list[float] | None = None
) -> list[Level]:
    """The noise levels of a figure: the given ones, or 0 and `columns` - 1 levels evenly spaced in the model's time.

    Variance-preserving checkpoints are discrete: timestep t is the level at index t. Continuous models have no
    timesteps.

    Args:
        scene: the model and the samples.
        columns: the number of levels.
        timesteps: timesteps to show, or None.
        sigmas: noise levels to show, or None.

    Raises:
        UserError: timesteps that the model does not have.
    """
    levels = scene.model.levels.tolist()
    discrete = scene.model.process is VARIANCE_PRESERVING
    if sigmas is not None:
        return [Level(s, None) for s in sorted(sigmas)]
    if timesteps is not None:
        if not discrete:
            raise UserError(
                f"{argument('timesteps')}: the model's noise levels are continuous; choose with {argument('sigmas')}."
            )
        if max(timesteps) >= len(levels):
            raise UserError(
                f"{argument('timesteps', max(timesteps))}: the model has the timesteps 0 to {len(levels) - 1}."
            )
        return [Level(0.0, None), *(Level(levels[t], t) for t in sorted(timesteps))]
    # The first of `columns` marks is the clean image, which is not a timestep.
    marks = spread(len(levels), columns)[1:]
    return [Level(0.0, None), *(Level(levels[t], t if discrete else None) for t in marks)]


def noised(x0: Tensor, z: Tensor, sigma: float) -> Tensor:
    """A sample of q(x_t | x₀) in variance-exploding coordinates: x₀ + σ z, (B, C, H, W).

    In the scale of a variance-preserving model, x/√(1+σ²), it is √ᾱ x₀ + √(1-ᾱ) z (Ho et al. 2020, eq. 4).
    """
    return x0 + sigma * z


def noising(scene: Scene, levels: list[Level]) -> tuple[Tensor, Tensor | None]:
    """The real images at every level, (K, n, C, H, W) uint8, and their labels. All levels use the same z."""
    x0, labels = scene.real(scene.n)
    z = scene.z()
    return torch.stack([scene.pixels(noised(x0, z, level.sigma), level.sigma) for level in levels]), labels


def still(scene: Scene, levels: list[Level], seen: Tensor, labels: Tensor | None) -> Drawing:
    """A still figure: rows are images, columns are levels."""
    panel = Panel(seen.transpose(0, 1), scene.name_rows(labels, "image"), [level.head for level in levels])
    return Drawing("The forward process q(xₜ | x₀)", [panel], scene.describe(noisy=True))


def frames(scene: Scene, levels: list[Level], seen: Tensor, labels: Tensor | None) -> list[Drawing]:
    """An animation: one frame per level, with the images in a row."""
    names = scene.name_rows(labels, "image")
    return [
        Drawing(
            f"q(xₜ | x₀)    {level.head}".replace("\n", ", "),
            [Panel(images[None], [""], names)],
            scene.describe(noisy=True),
        )
        for level, images in zip(levels, seen, strict=True)
    ]
