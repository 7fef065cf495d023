"""UniPC sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step, intervals, is_infinite, option
from samplerbench_plugins.dpm_solver import singlestep
from samplerbench_plugins.exponential import phi


@dataclass(frozen=True)
class UniPC(Sampler):
    """Unified predictor-corrector, multistep with data prediction (Zhao et al. 2023, algorithms 5 and 6).

    With hh = -log(s/t), r_i = (λ_i - λ_s)/h of the earlier levels and Δ_i = (D_i - D_s)/r_i:
    x ← (t/s) x - (e^{hh} - 1) D_s - B Σ ρ_i Δ_i, where ρ solves the paper's eq. 11 for order p. UniP uses p - 1 earlier
    evaluations. UniC also uses D at the new point, at no cost, because the next step needs this evaluation too.
    B(h) is hh (variant B1) or e^{hh} - 1 (B2). UniP-p has order p, UniPC-p has order p + 1.
    The first steps, and the last steps before σ = 0, have lower order. The last interval is x ← D. The orders above
    hold if sampling starts at a large σ, where D hardly changes. If it starts at a σ of the size of the data, UniPC-3
    has order 3 and UniP-3 has order 2. With start=singlestep the first step is DPM-Solver-3 (or -2 for UniP), which
    takes two more evaluations (or one), and the orders hold from any start.
    In the first step of a rectified flow from t = 1, where hh is infinite, B1 is replaced by B2.
    """

    spacing = "logsnr"
    from_infinity = True

    order: int = option(3, "order p of UniP", ge=1, le=3)
    variant: Literal["B1", "B2"] = option("B2", "the function B(h)")
    corrector: bool = option(True, "apply UniC after each step")
    start: Literal["lower-order", "singlestep"] = option(
        "lower-order", "first step for order=3: lower-order, or singlestep with more evaluations"
    )

    @property
    def _start_order(self) -> int:
        """The order of the singlestep method of the first step; 0 if the first step is UniP-1."""
        return 2 + self.corrector if self.start == "singlestep" and self.order == 3 else 0

    def nfe(self, steps: int) -> int:
        return steps + (self._start_order - 1 if self._start_order and steps > 1 else 0)

    def convergence(self) -> int:
        return self.order + self.corrector

    def convergence_from_any_start(self) -> int:
        return self.convergence() if self._start_order else min(self.order, 2) + self.corrector

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        past: list[tuple[float, Tensor]] = []  # (λ, D), latest first
        n, ends_at_zero = len(sigmas) - 1, float(sigmas[-1]) == 0
        start, order, level = x, 0, 0.0  # of the last step: the corrected state at its start, its order, its level
        for i, (s, t) in enumerate(intervals(sigmas)):
            x0 = denoise(x, s)
            if self.corrector and order:
                x = self._move(start, level, s, past, order, x0)
            # D at σ = ∞ has no weight in later steps: its λ is infinite.
            past = [(-math.log(s), x0), *([] if is_infinite(level) else past[: self.order - 1])]
            order = min(self.order, len(past), n - i if ends_at_zero else self.order)
            start, level = x, s
            if t == 0:
                x = x0
            elif i == 0 and self._start_order:
                x, order = singlestep(denoise, x, x0, s, t, self._start_order), 0  # not corrected by UniC
            else:
                x = self._move(start, s, t, past, order, None)
            yield Step(t, x, x0)

    def _move(
        self, x: Tensor, s: float, t: float, past: list[tuple[float, Tensor]], order: int, arrived: Tensor | None
    ) -> Tensor:
        """Step from s to t with UniP, or with UniC if D at t is given (`arrived`)."""
        h = math.log(s / t)
        now, x0 = past[0]
        ratios = [(level - now) / h for level, _ in past[1:order]]
        changes = [(d - x0) / r for (_, d), r in zip(past[1:order], ratios, strict=True)]
        if arrived is not None:
            ratios.append(1.0)
            changes.append(arrived - x0)
        total = (t / s) * x - math.expm1(-h) * x0
        scale = -h if self.variant == "B1" and not is_infinite(s) else math.expm1(-h)
        for weight, change in zip(_weights(ratios, -h, scale), changes, strict=True):
            total = total - (scale * weight) * change
        return total


def _weights(ratios: list[float], hh: float, scale: float) -> list[float]:
    """The weights ρ of eq. 11: Σ ρ_i r_i^{k-1} = k! φ_{k+1}(hh) hh / B for k = 1 … len(ratios).

    For a single weight the paper uses ρ = 1/2, which gives the same order.
    """
    if len(ratios) <= 1:
        return [0.5] * len(ratios)
    right = [math.factorial(k) * phi(k + 1, hh) * hh / scale for k in range(1, len(ratios) + 1)]
    powers = [[r**k for r in ratios] for k in range(len(ratios))]
    return np.linalg.solve(np.array(powers), np.array(right)).tolist()
