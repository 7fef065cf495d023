"""DPM-Solver, singlestep, orders 1 to 3."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step, intervals, is_infinite, option, runge_kutta
from samplerbench_plugins.exponential import phi


@dataclass(frozen=True)
class DPMSolver(Sampler):
    """DPM-Solver-k, singlestep with noise prediction (Lu et al. 2022a, algorithms 1 and 2).

    With λ = -log σ, h = log(s/t), ε = (x - D)/σ and σ(e^h - 1) = s - t at the end of a step:
    k = 1  x ← x - (s-t) ε(x, s), which is DDIM;
    k = 2  with an intermediate point at the middle in λ (r₁ = 1/2);
    k = 3  with two intermediate points at one and two thirds in λ (r₁ = 1/3, r₂ = 2/3).
    The last interval, to σ = 0 where λ is infinite, has order 1: x ← D. N steps take k(N-1) + 1 evaluations.
    The first interval of a rectified flow from t = 1, where λ is infinite too, is a Runge-Kutta step of order k in t.
    """

    spacing = "logsnr"
    from_infinity = True

    order: int = option(2, "order k, and the number of evaluations per step", ge=1, le=3)

    def nfe(self, steps: int) -> int:
        return self.order * (steps - 1) + 1

    def convergence(self) -> int:
        return self.order

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            x = x0 if t == 0 else singlestep(denoise, x, x0, s, t, self.order)
            yield Step(t, x, x0)


def singlestep(denoise: Denoiser, x: Tensor, x0: Tensor, s: float, t: float, order: int) -> Tensor:
    """One step of DPM-Solver-k, with `order` - 1 evaluations of D.

    From σ = ∞, where the step in λ is infinite, it is a Runge-Kutta step of the same order in the time of the flow.

    Args:
        denoise: the denoiser.
        x: the state at level s, (B, C, H, W).
        x0: D(x, s), (B, C, H, W).
        s: the noise level σ of x.
        t: the next noise level, s > t > 0.
        order: k, from 1 to 3.

    Returns:
        The state at level t, (B, C, H, W).
    """
    if is_infinite(s):
        return runge_kutta(denoise, x, x0, s, t, order)
    first = (x - x0) / s
    if order == 1:
        return x - (s - t) * first
    if order == 2:
        middle = math.sqrt(s * t)
        guess = x - (s - middle) * first
        return x - (s - t) * (guess - denoise(guess, middle)) / middle
    h = math.log(s / t)
    near, far = s * (t / s) ** (1 / 3), s * (t / s) ** (2 / 3)
    guess = x - (s - near) * first
    change = (guess - denoise(guess, near)) / near - first
    guess = x - (s - far) * first - (2 * far * (2 * h / 3) * phi(2, 2 * h / 3)) * change
    change = (guess - denoise(guess, far)) / far - first
    return x - (s - t) * first - (1.5 * t * h * phi(2, h)) * change
