"""iPNDM sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Ode, Sampler, Step, intervals, option, runge_kutta
from samplerbench_plugins.dpm_solver import singlestep

_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@dataclass(frozen=True)
class IPNDM(Sampler):
    """Improved pseudo-numerical method: Adams-Bashforth without warm-up (Liu et al. 2022; Zhang & Chen 2023).

    x ← x + (t-s) Σ_j b_j ε_j over the last `order` evaluations of ε = (x - D)/σ. The weights b are the classical ones
    for even steps, on every grid: (3, -1)/2, (23, -16, 5)/12, (55, -59, 37, -9)/24. The full order therefore holds
    only on grids that are even in σ. On smooth grids, such as EDM's, the order is at most 2. If long and short steps
    alternate, it is 1. The last interval, to σ = 0, is x ← D.
    The first steps have lower order, so the order is at most 2 if D changes much in them. With start=singlestep the
    first order-2 steps are DPM-Solver steps, each with order-2 more evaluations, and the order is not reduced.
    For a rectified flow the method integrates the velocity v = (y - D)/t in the model's time t instead of ε in σ, with
    y = (1-t) x, and the first steps of start=singlestep are Runge-Kutta steps in t.
    """

    spacing = "karras"
    from_infinity = True
    even_in = "sigma"
    uniform_steps_only = True

    order: int = option(4, "order of the Adams-Bashforth method: the number of evaluations used", ge=1, le=4)
    start: Literal["lower-order", "singlestep"] = option(
        "lower-order", "first steps for order=3 and 4: lower-order, or singlestep with more evaluations"
    )

    @property
    def _starts(self) -> int:
        """The number of singlestep steps, and of additional evaluations in each of them."""
        return max(0, self.order - 2) if self.start == "singlestep" else 0

    def nfe(self, steps: int) -> int:
        return steps + self._starts * min(self._starts, steps - 1)

    def convergence(self) -> int:
        return self.order

    def convergence_from_any_start(self) -> int:
        return self.order if self._starts else min(2, self.order)

    def convergence_from_infinity(self) -> int:
        return self.convergence_from_any_start()

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        past: list[Tensor] = []  # ε, or v of a rectified flow, latest first
        ode = Ode(denoise)
        start = runge_kutta if denoise.process.ends else singlestep
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            y, now = ode.state(x, s), ode.time(s)
            past = [(y - x0) / now, *past[: self.order - 1]]
            if t == 0:
                x = x0
            elif len(past) <= self._starts:
                x = start(denoise, x, x0, s, t, self.order - 1)
            else:
                weights, after = _ADAMS_BASHFORTH[len(past) - 1], ode.time(t)
                y = y + (after - now) * sum(b * e for b, e in zip(weights, past, strict=True))
                x = ode.back(y, after)
            yield Step(t, x, x0)
