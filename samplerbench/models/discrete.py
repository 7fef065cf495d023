"""Networks trained at discrete timesteps of a variance-preserving process: what all of them have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from samplerbench.models.model import Condition, Model
from samplerbench.models.schedule import PredictionType
from samplerbench.sampling.denoiser import Prediction, Sigma, coefficient


@dataclass
class DiscreteVP(Model):
    """A discrete variance-preserving network seen in variance-exploding coordinates.

    The network sees x/√(1+σ²) at timestep t(σ), and `denoised` makes D of its output.

    rounding: how a σ between two timesteps is met: "fractional" interpolates linearly in log σ, "nearest" rounds.
    doubled: whether half of the network's output channels are about the variance.
    """

    rounding: Literal["fractional", "nearest"] = "fractional"
    doubled: bool = False

    def __post_init__(self) -> None:
        self._levels = self.levels.tolist()
        self._log_levels = self.levels.log()

    @abstractmethod
    def ask(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output for x (B, C, H, W), scaled by √ᾱ, at timesteps t (B,)."""

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

    def evaluate(self, x: Tensor, sigma: Sigma, condition: Condition) -> Prediction:
        s = sigma.to(x.device).double() if isinstance(sigma, Tensor) and sigma.ndim else float(sigma)
        power = 1 + s**2
        t = self.timestep(sigma)
        times = t.to(x.device).float() if isinstance(t, Tensor) else torch.full((len(x),), t, device=x.device)
        output = self.ask((x * coefficient(power**-0.5, x)).to(self.dtype), times, condition).to(x.dtype)
        variance = None
        if self.doubled:
            output, fraction = output.chunk(2, dim=1)
            variance = (fraction + 1) / 2 if self.learned_variance else None
        return Prediction(denoised(self.prediction, output, x, s), variance)


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


def denoised(prediction: PredictionType, output: Tensor, x: Tensor, sigma: Sigma) -> Tensor:
    """D(x, σ) from a network's output at x/√(1+σ²), all (B, C, H, W).

    ε-prediction: D = x - σ ε. v-prediction: D = x/(1+σ²) - σ/√(1+σ²) v. Sample prediction: D is the output
    (Salimans & Ho 2022 appendix D, in σ).
    """
    power = 1 + sigma**2
    if prediction == "epsilon":
        return x - coefficient(sigma, x) * output
    if prediction == "v_prediction":
        return x * coefficient(1 / power, x) - coefficient(sigma * power**-0.5, x) * output
    return output
