"""Random paths of motion as kernels of a blur."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_STEPS = 4096
"""The largest number of steps of a path."""
SOFT = 0.5
"""Standard deviation of the drawn line in pixels."""


def path(size: int, intensity: float, seed: int) -> Tensor:
    """The points of a random path around its centre of mass, (N, 2) float64, in pixels (Borodenko 2020, motionblur).

    With the diagonal d of the kernel and the intensity i, the length of the path is at most
    L = 0.75 d (u₁ + i² u₂), and its steps are d (1.1 - i) Beta(1, 30), where u is uniform in [0, 1]. The direction of a
    step has an angle of a triangular distribution on [0, a + 0.1] with the mode i a, where a = i π u₃. It changes its
    sign with the probability Beta(2, 20). The whole path is turned by an angle that is uniform in [0, π].

    Args:
        size: side of the kernel in pixels.
        intensity: i, from 0 (a straight line, up to angles of 0.1) to 1.
        seed: random seed.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    diagonal = math.sqrt(2) * size
    u = uniform(4)
    longest = float(0.75 * diagonal * (u[0] + intensity**2 * u[1]))
    largest = float(intensity * math.pi * u[2])
    jitter = float(uniform(21).sort().values[1])  # the second smallest of 21 uniform numbers is Beta(2, 20)
    steps = diagonal * (1.1 - intensity) * (1 - (1 - uniform(MAX_STEPS)) ** (1 / 30))
    steps = steps[steps < longest]
    steps = steps[: int((steps.cumsum(0) < longest).sum()) + 1]
    count = len(steps)
    angles = _triangular(uniform(count), intensity * largest, largest + 0.1)
    signs = torch.where(uniform(count) < jitter, -1.0, 1.0).cumprod(0)
    directions = signs * angles + math.pi * float(u[3])
    points = torch.stack([steps * directions.cos(), steps * directions.sin()], dim=1).cumsum(0)
    points = torch.cat([torch.zeros(1, 2, dtype=torch.float64), points])
    return points - points.mean(0)


def _triangular(u: Tensor, mode: float, most: float) -> Tensor:
    """Numbers of a triangular distribution on [0, most] from uniform ones, by the inverse distribution function."""
    rising = (u * most * mode).sqrt()
    falling = most - ((1 - u) * most * (most - mode)).sqrt()
    return torch.where(u < mode / most, rising, falling)


def trajectory_kernel(size: int, intensity: float, seed: int) -> Tensor:
    """The kernel of a random path, drawn as a soft line, (size, size) float64.

    Args:
        size: side of the kernel in pixels, odd. Parts of the path outside of it are lost.
        intensity: as `path`.
        seed: as `path`.
    """
    points = path(size, intensity, seed)
    line = points
    if len(points) > 1:
        # Points at equal distances along the path, so that each part of it has a weight proportional to its length.
        lengths = (points[1:] - points[:-1]).norm(dim=1)
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        at = (torch.arange(16 * size, dtype=torch.float64) + 0.5) / (16 * size) * ends[-1]
        part = torch.searchsorted(ends[1:-1].contiguous(), at)
        share = (at - ends[part]) / lengths[part].clamp(min=1e-12)
        line = points[part] + share[:, None] * (points[part + 1] - points[part])
    across, down = (_soft(line[:, axis], size) for axis in (0, 1))
    return down.T @ across


def _soft(at: Tensor, size: int) -> Tensor:
    """The weights of pixels around points (N,), (N, size): a Gaussian with the sum 1 over all pixels of the plane."""
    pixels = torch.arange(-size, 2 * size, dtype=torch.float64) - size // 2
    weights = (-0.5 * ((pixels - at[:, None]) / SOFT) ** 2).exp()
    return (weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-12))[:, size : 2 * size]
