"""Inversion: solve the probability-flow ODE from an image to the x_T that a deterministic sampler decodes to it."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from samplerbench.errors import RunError, argument
from samplerbench.sampling import Denoiser

Method = Literal["euler", "heun"]


def upward(levels: Tensor, sigmas: Tensor) -> list[float]:
    """The increasing noise levels of an inversion: the grid of a sampler, reversed.

    At 0 the slope (x - D)/σ is undefined. A grid that ends at 0 is therefore replaced by one that starts at the
    smallest level of the model, or of the grid if that is lower. There the clean image is used as the state; the ODE
    changes it by only O(σ²) below this level.

    Args:
        levels: (T,) float64, increasing noise levels of the model.
        sigmas: (N+1,) float64, decreasing grid of the sampler.
    """
    grid = sigmas.tolist()
    if grid[-1] > 0:
        return grid[::-1]
    inner = grid[-2::-1]
    lowest = float(levels[0])
    return [lowest, *inner] if lowest < inner[0] else inner


@torch.no_grad()
def encode(denoise: Denoiser, x0: Tensor, sigmas: Tensor, method: Method = "euler", z: Tensor | None = None) -> Tensor:
    """Solve the probability-flow ODE from clean states x0 to x_T at level sigmas[0].

    dx/dσ = (x - D(x, σ))/σ, from the smallest level upwards (see `upward`). A step of Euler's method from s to t is
    DDIM inversion, x ← x + (t - s)(x - D)/s, with one evaluation. Heun's method takes two.

    Args:
        denoise: the denoiser.
        x0: states at σ = 0 (images or latents), (B, C, H, W).
        sigmas: (N+1,) float64, decreasing grid of the run to invert.
        method: "euler" or "heun".
        z: (B, C, H, W) ~ N(0, I), to start at x0 + σ z at the smallest level instead of x0. Data without a density,
            such as pixels that are equal in all images, cannot reach the variance of the prior from a clean start: x_T
            is then shorter than samples of the prior.

    Returns:
        (B, C, H, W), at level sigmas[0].

    Raises:
        RunError: a state that is not finite.

    Source: Song, Meng & Ermon 2021, eq. 13-14 and section 5.4; Heun's step Karras et al. 2022, algorithm 1.
    """
    path = upward(denoise.levels, sigmas)
    x = x0 if z is None else x0 + path[0] * z
    for s, t in pairwise(path):
        slope = (x - denoise(x, s)) / s
        if method == "heun":
            guess = x + (t - s) * slope
            slope = (slope + (guess - denoise(guess, t)) / t) / 2
        x = x + (t - s) * slope
        if x.device.type == "cpu" and not bool(x.isfinite().all()):
            break
    if not bool(x.isfinite().all()):
        raise RunError(
            f"the inversion left the finite numbers; try more steps, another spacing, or {argument('dtype', 'fp32')}."
        )
    return x
