"""DPM-Solver, singlestep, orders 1 to 3."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step, intervals, option


@dataclass(frozen=True)
class DPMSolver(Sampler):
    """DPM-Solver-k, singlestep with noise prediction (Lu et al. 2022a, algorithms 1 and 2).

    With λ = -log σ, h = log(s/t), ε = (x - D)/σ and σ(e^h - 1) = s - t at the end of a step:
    k = 1  x ← x - (s-t) ε(x, s), which is DDIM;
    k = 2  through the middle in λ (r₁ = 1/2);  k = 3  through the thirds (r₁ = 1/3, r₂ = 2/3).
    The last interval, to σ = 0, where λ is infinite, is of order 1: x ← D. So N steps cost k(N-1) + 1 evaluations.
    """

    spacing = "logsnr"

    order: int = option(2, "k, and the evaluations per step", ge=1, le=3)

    def nfe(self, steps: int) -> int:
        return self.order * (steps - 1) + 1

    def convergence(self) -> int:
        return self.order

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            first = (x - x0) / s
            if t == 0:
                x = x0
            elif self.order == 1:
                x = x - (s - t) * first
            elif self.order == 2:
                middle = math.sqrt(s * t)
                guess = x - (s - middle) * first
                x = x - (s - t) * (guess - denoise(guess, middle)) / middle
            else:
                h = math.log(s / t)
                near, far = s * (t / s) ** (1 / 3), s * (t / s) ** (2 / 3)
                guess = x - (s - near) * first
                change = (guess - denoise(guess, near)) / near - first
                weight = far * 2 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1)
                guess = x - (s - far) * first - weight * change
                change = (guess - denoise(guess, far)) / far - first
                x = x - (s - t) * first - (1.5 * t * (math.expm1(h) / h - 1)) * change
            yield Step(t, x, x0)
