"""EDM's stochastic Heun sampler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step, intervals, option


@dataclass(frozen=True)
class Heun(Sampler):
    """Heun's method with churn (Karras et al. 2022, algorithm 2).

    ŝ = s + γ s with γ = min(S_churn/N, √2 - 1) where S_min ≤ s ≤ S_max, else 0;  x̂ = x + S_noise √(ŝ² - s²) z;
    d = (x̂ - D(x̂, ŝ))/ŝ;  x ← x̂ + (t - ŝ) d. For t > 0 the step is repeated with the mean of d and
    d' = (x - D(x, t))/t. S_churn = 0 is the deterministic second-order method.
    """

    spacing = "karras"

    S_churn: float = option(0.0, "total amount of noise added and removed, over all steps", ge=0.0)
    S_min: float = option(0.0, "smallest noise level at which noise is added", ge=0.0)
    S_max: float | None = option(None, "largest noise level at which noise is added; none: no limit", gt=0.0)
    S_noise: float = option(1.0, "standard deviation of the added noise", gt=0.0)

    def nfe(self, steps: int) -> int:
        return 2 * steps - 1

    def convergence(self) -> int | None:
        return 2 if self.S_churn == 0 else None

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        churn = min(self.S_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
        for s, t in intervals(sigmas):
            if churn > 0 and self.S_min <= s <= (math.inf if self.S_max is None else self.S_max):
                raised = s * (1 + churn)
                x, s = x + self.S_noise * math.sqrt(raised**2 - s**2) * noise(), raised
            x0 = denoise(x, s)
            slope = (x - x0) / s
            following = x + (t - s) * slope
            if t > 0:
                again = (following - denoise(following, t)) / t
                following = x + ((t - s) / 2) * (slope + again)
            x = following
            yield Step(t, x, x0)
