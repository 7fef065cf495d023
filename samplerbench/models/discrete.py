"""Networks trained at discrete timesteps of a variance-preserving process: what all of them have in common."""

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
    """A discrete variance-preserving network seen in variance-exploding coordinates.

    The network sees x/√(1+σ²) at timestep t(σ); the preconditioning says what its output is.

    rounding: how a σ between two timesteps is met: "fractional" interpolates linearly in log σ, "nearest" rounds.
    """

    rounding: Literal["fractional", "nearest"] = "fractional"

    def __post_init__(self) -> None:
        self._levels = self.levels.tolist()
        self._log_levels = self.levels.log()

    def timestep(self, sigma: Sigma) -> float | Tensor:
        """t(σ): exactly the integer where σ is one of the model's levels; a float, or (B,) float64 for a (B,) σ."""
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
    """t(σ) among increasing levels σ_0 … σ_{T-1}: linear in log σ, exactly an integer at a level, 0 and T-1 outside."""
    if sigma <= levels[0]:
        return 0.0
    if sigma >= levels[-1]:
        return float(len(levels) - 1)
    above = bisect_left(levels, sigma)
    below = above - 1
    t = below + math.log(sigma / levels[below]) / math.log(levels[above] / levels[below])
    nearest = round(t)
    return float(nearest) if abs(levels[nearest] - sigma) <= 1e-9 * sigma else t
