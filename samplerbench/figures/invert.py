"""Inversion: solve the probability-flow ODE from an image to the x_T that a deterministic sampler decodes to it."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from samplerbench.errors import RunError
from samplerbench.sampling import Denoiser

Method = Literal["euler", "heun"]


def upward(levels: Tensor, sigmas: Tensor) -> list[float]:
    """The levels of an inversion, increasing: those of a sampler's grid, from its own end or the model's smallest.

    A grid that ends above 0 is walked as it is. One that ends at 0, where (x - D)/σ has no value, is begun at the
    model's smallest level (or the grid's, if that is lower still), where the clean image stands for the state: the
    ODE moves it by O(σ²) between the two.

    Args:
        levels: (T,) float64, increasing: the model's. sigmas: (N+1,) float64, decreasing: the sampler's grid.
    """
    grid = sigmas.tolist()
    if grid[-1] > 0:
        return grid[::-1]
    inner = grid[-2::-1]
    lowest = float(levels[0])
    return [lowest, *inner] if lowest < inner[0] else inner


@torch.no_grad()
def encode(denoise: Denoiser, x0: Tensor, sigmas: Tensor, method: Method = "euler", z: Tensor | None = None) -> Tensor:
    """The state x_T at level sigmas[0] that the probability-flow ODE joins to the clean states x0.

    dx/dσ = (x - D(x, σ))/σ from the smallest level up (see `upward`). Euler's step from s to t is DDIM inversion,
    x ← x + (t - s)(x - D)/s, one evaluation; Heun's is the explicit trapezoid, two.

    Args:
        x0: (B, C, H, W), states at σ = 0 (images, or an autoencoder's latents). sigmas: (N+1,) float64, decreasing,
            the grid of the run that is to be undone. z: (B, C, H, W) ~ N(0, I): begin at x0 + σ z, σ the smallest
            level, as p(x, σ) draws it, and not at the clean x0. Data that fills no volume (pixels that are the same in
            all images, or few grey levels) has no density at σ = 0, so nothing there can grow into the prior's unit
            variance; then a clean start gives an x_T shorter than any that the prior draws.

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
        raise RunError("the inversion left the finite numbers; try more steps, another spacing, or --dtype fp32.")
    return x
