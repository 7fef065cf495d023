"""The timestep t(σ) of a discrete model, between its noise levels."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor


def timestep_at(levels: Sequence[float], sigma: float) -> float:
    """Compute t(σ) for noise levels σ_0 … σ_{T-1}, with linear interpolation in log σ.

    Args:
        levels: noise levels, T floats, increasing.
        sigma: noise level.

    Returns:
        The timestep, clamped to [0, T-1]. It is an exact integer at a noise level.
    """
    if sigma <= levels[0]:
        return 0.0
    if sigma >= levels[-1]:
        return float(len(levels) - 1)
    above = bisect_left(levels, sigma)
    below = above - 1
    t = below + math.log(sigma / levels[below]) / math.log(levels[above] / levels[below])
    nearest = round(t)
    return float(nearest) if abs(levels[nearest] - sigma) <= 1e-9 * sigma else t


def timesteps_at(log_levels: Tensor, sigma: Tensor) -> Tensor:
    """Compute t(σ) for a batch, without device synchronisation. See `timestep_at`.

    Args:
        log_levels: logarithms of the noise levels, (T,) float64, increasing.
        sigma: noise levels, (B,).

    Returns:
        The timesteps, (B,) float64.
    """
    log_levels, log_sigma = log_levels.to(sigma.device), sigma.double().log()
    upper = torch.searchsorted(log_levels, log_sigma).clamp(1, len(log_levels) - 1)
    low, high = log_levels[upper - 1], log_levels[upper]
    t = (upper - 1) + ((log_sigma - low) / (high - low)).clamp(0, 1)
    near = t.round()
    snap = (log_levels[near.long()] - log_sigma).abs() < 1e-9
    return torch.where(snap, near, t)
