"""Base class of networks trained at discrete timesteps of a variance-preserving process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from samplerbench.models.model import Model
from samplerbench.models.timesteps import timestep_at, timesteps_at
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
            t = timesteps_at(self._log_levels, sigma)
            return t.round() if self.rounding == "nearest" else t
        t_scalar = timestep_at(self._levels, float(sigma))
        return float(round(t_scalar)) if self.rounding == "nearest" else t_scalar

    def times(self, sigma: Sigma, x: Tensor) -> Tensor:
        t = self.timestep(sigma)
        return t.to(x.device).float() if isinstance(t, Tensor) else torch.full((len(x),), t, device=x.device)
