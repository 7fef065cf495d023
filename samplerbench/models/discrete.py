"""Base class of networks trained at discrete timesteps of a variance-preserving process."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from samplerbench.models.model import Model
from samplerbench.sampling.denoiser import Sigma


@dataclass
class DiscreteVP(Model):
    """A discrete variance-preserving network in variance-exploding coordinates.

    The input of the network is x/√(1+σ²) at timestep t(σ). The preconditioning converts its output to D.

    Attributes:
        rounding: mapping from a σ between two timesteps to t(σ). "fractional" interpolates linearly in log σ, "nearest"
            rounds to the nearest timestep.
    """

    rounding: Literal["fractional", "nearest"] = "fractional"

    def __post_init__(self) -> None:
        self._levels = self.levels.tolist()
        self._log_levels = self.levels.log()

    def timestep(self, sigma: Sigma) -> float | Tensor:
        """Compute the timestep t(σ). It is an exact integer if σ is a noise level of the model.

        Args:
            sigma: noise level, a scalar or (B,).

        Returns:
            A float for a scalar σ, or a float64 tensor (B,).
        """
        if isinstance(sigma, Tensor) and sigma.ndim:
            log_levels = self._log_levels.to(sigma.device)
            log_sigma = sigma.double().log()
            upper = torch.searchsorted(log_levels, log_sigma).clamp(1, len(log_levels) - 1)
            low, high = log_levels[upper - 1], log_levels[upper]
            t = (upper - 1) + ((log_sigma - low) / (high - low)).clamp(0, 1)
            near = t.round()
            snap = (log_levels[near.long()] - log_sigma).abs() < 1e-9
            return near if self.rounding == "nearest" else torch.where(snap, near, t)
        t_scalar = timestep_at(self._levels, float(sigma))
        return float(round(t_scalar)) if self.rounding == "nearest" else t_scalar

    def times(self, sigma: Sigma, x: Tensor) -> Tensor:
        t = self.timestep(sigma)
        return t.to(x.device).float() if isinstance(t, Tensor) else torch.full((len(x),), t, device=x.device)


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
