"""The refined exponential solver."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step, intervals, is_infinite, option, runge_kutta
from samplerbench_plugins.exponential import adams_weights


@dataclass(frozen=True)
class RES(Sampler):
    """The refined exponential solver (RES) of order 2, with data prediction (Zhang et al. 2023, algorithms 1 and 2).

    With h = log(s/t) and φ_k = φ_k(-h):  x ← e^{-h} x + h (b₁ D + b₂ D₂),  b₂ = φ₂/c, b₁ = φ₁ - b₂.
    multistep  D₂ is D of the previous step and c = -h₁/h, where h₁ is its length;
    singlestep  D₂ = D(x₂, s e^{-ch}) with x₂ = e^{-ch} x + (1 - e^{-ch}) D: two evaluations per step.
    These weights satisfy all order conditions of exponential Runge-Kutta methods up to order 2, those of DPM-Solver++
    only approximately. The first multistep step is DDIM, and the last interval is x ← D.
    From t = 1 of a rectified flow, where h is infinite, the first singlestep step is the midpoint rule in t.
    """

    spacing = "logsnr"
    from_infinity = True

    method: Literal["multistep", "singlestep"] = option(
        "multistep", "use the previous evaluation (multistep), or an intermediate one (singlestep)"
    )
    c: float = option(0.5, "place of the intermediate evaluation of a singlestep step, in log σ", gt=0.0, le=1.0)

    def nfe(self, steps: int) -> int:
        return 2 * steps - 1 if self.method == "singlestep" else steps

    def convergence(self) -> int:
        return 2

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        before: tuple[float, Tensor] | None = None  # level and D of the previous step
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            if t == 0:
                x = x0
            elif self.method == "singlestep":
                x = self._singlestep(denoise, x, x0, s, t)
            elif before is None or is_infinite(before[0]):  # D at σ = ∞ has no weight
                x = (t / s) * x + (1 - t / s) * x0
            else:
                level, x1 = before
                b1, b2 = adams_weights([0.0, math.log(s / level)], math.log(s / t))
                x = (t / s) * x + b1 * x0 + b2 * x1
            before = (s, x0)
            yield Step(t, x, x0)

    def _singlestep(self, denoise: Denoiser, x: Tensor, x0: Tensor, s: float, t: float) -> Tensor:
        if is_infinite(s):
            return runge_kutta(denoise, x, x0, s, t, 2)
        h = math.log(s / t)
        kept = math.exp(-self.c * h)
        x2 = denoise(kept * x + (1 - kept) * x0, s * kept)
        b1, b2 = adams_weights([0.0, self.c * h], h)
        return (t / s) * x + b1 * x0 + b2 * x2
