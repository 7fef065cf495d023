"""EDM's stochastic Heun sampler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Ode, Sampler, Step, intervals, is_infinite, option


@dataclass(frozen=True)
class Heun(Sampler):
    """Heun's method with churn (Karras et al. 2022, algorithm 2).

    ŝ = s + γ s with γ = min(S_churn/N, √2 - 1) where S_min ≤ s ≤ S_max, else 0;  x̂ = x + S_noise √(ŝ² - s²) z;
    d = (x̂ - D(x̂, ŝ))/ŝ;  x ← x̂ + (t - ŝ) d. For t > 0 the step is repeated with the mean of d and
    d' = (x - D(x, t))/t. S_churn = 0 is the deterministic second-order method.
    For a rectified flow, the step after the churn is made in y = (1-t) x and the time t. No noise is added at t = 1.
    """

    spacing = "karras"
    from_infinity = True

    S_churn: float = option(0.0, "total amount of noise added and removed, over all steps", ge=0.0)
    S_min: float = option(0.0, "smallest noise level at which noise is added", ge=0.0)
    S_max: float | None = option(None, "largest noise level at which noise is added; none: no limit", gt=0.0)
    S_noise: float = option(1.0, "standard deviation of the added noise", gt=0.0)

    def nfe(self, steps: int) -> int:
        return 2 * steps - 1

    def convergence(self) -> int | None:
        return 2 if self.S_churn == 0 else None

    def convergence_from_infinity(self) -> int | None:
        return self.convergence()

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        churn = min(self.S_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
        for s, t in intervals(sigmas):
            if churn > 0 and not is_infinite(s) and self.S_min <= s <= (math.inf if self.S_max is None else self.S_max):
                raised = s * (1 + churn)
                x, s = x + self.S_noise * math.sqrt(raised**2 - s**2) * noise(), raised
            x, x0 = heun_step(denoise, x, s, t)
            yield Step(t, x, x0)


def heun_step(denoise: Denoiser, x: Tensor, s: float, t: float) -> tuple[Tensor, Tensor]:
    """One step of Heun's method from level s to t on `Ode`, or x ← D for t = 0.

    Args:
        denoise: denoiser D(x, σ).
        x: state at level s, (B, C, H, W).
        s: noise level of x. It may be infinite for a rectified flow.
        t: next noise level, s > t ≥ 0.

    Returns:
        The state at level t and D(x, s).
    """
    x0 = denoise(x, s)
    if t == 0:
        return x0, x0
    ode = Ode(denoise)
    now, after = ode.time(s), ode.time(t)
    y = ode.state(x, s)
    slope = (y - x0) / now
    again = ode.slope(y + (after - now) * slope, after)
    return ode.back(y + ((after - now) / 2) * (slope + again), after), x0
