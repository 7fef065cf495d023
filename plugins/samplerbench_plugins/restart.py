"""Restart sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step, UserError, intervals, option
from samplerbench_plugins.heun import heun_step


@dataclass(frozen=True)
class Restart(Sampler):
    """Restart sampling (Xu, Deng, Cheng, Tian, Liu & Jaakkola 2023, algorithm 1).

    Heun's method on the probability-flow ODE. At t, the level of the grid nearest to t_min, it restarts K times:
    x ← x + S_noise √(t_max² - t²) z is a state at t_max, followed by Heun's method back to t over the levels
    σ_j = (t_max^(1/ρ) + j/(N_restart-1) (t^(1/ρ) - t_max^(1/ρ)))^ρ,  j = 0 … N_restart-1.
    The noise reduces the errors made above t_max, and the short ODE adds only small new ones. K = 0 is Heun's method.
    If no level of the grid after the first lies between 0 and t_max, there is no restart. The defaults are the paper's
    for CIFAR-10 with 18 steps. A restart takes 2 (N_restart - 1) evaluations.
    """

    spacing = "karras"
    from_infinity = True

    t_min: float = option(0.06, "noise level of a restart; the nearest level of the grid is used", gt=0.0)
    t_max: float = option(0.3, "noise level up to which a restart adds noise", gt=0.0)
    K: int = option(2, "number of restarts", ge=0, le=1_000_000)
    N_restart: int = option(3, "number of levels of the restart grid, including t_max and t_min", ge=2, le=1_000_000)
    S_noise: float = option(1.0, "standard deviation of the added noise", gt=0.0)
    rho: float = option(7.0, "ρ of the restart grid", gt=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_min >= self.t_max:
            raise UserError(f"sampler restart: t_min = {self.t_min:g} is not below t_max = {self.t_max:g}.")

    def nfe(self, steps: int) -> int:
        # With one step there is no level for a restart.
        return 2 * steps - 1 + (2 * self.K * (self.N_restart - 1) if steps > 1 else 0)

    def convergence(self) -> int | None:
        return 2 if self.K == 0 else None

    def convergence_from_infinity(self) -> int | None:
        return self.convergence()

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        bottom = self.bottom(sigmas)
        for s, t in intervals(sigmas):
            x, x0 = heun_step(denoise, x, s, t)
            if t == bottom:
                for _ in range(self.K):
                    x, x0 = self.restart(denoise, x, t, noise)
            yield Step(t, x, x0)

    def bottom(self, sigmas: Tensor) -> float | None:
        """The level of the grid for restarts; None if no level after the first lies between 0 and t_max."""
        inner = [t for t in sigmas[1:].tolist() if 0 < t < self.t_max]
        return min(inner, key=lambda t: abs(t - self.t_min), default=None)

    def restart(self, denoise: Denoiser, x: Tensor, t: float, noise: Noise) -> tuple[Tensor, Tensor]:
        """One restart from x at level t. Returns the new state at t, and the denoised state of the last step."""
        x = x + (self.S_noise * math.sqrt(self.t_max**2 - t**2)) * noise()
        x0 = x
        for a, b in pairwise(self.levels(t)):
            x, x0 = heun_step(denoise, x, a, b)
        return x, x0

    def levels(self, t: float) -> list[float]:
        """The N_restart levels of a restart, from t_max to t."""
        last = self.N_restart - 1
        high, low = self.t_max ** (1 / self.rho), t ** (1 / self.rho)
        inner = [(high + j / last * (low - high)) ** self.rho for j in range(1, last)]
        return [self.t_max, *inner, t]
