"""iPNDM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step, intervals, option

_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@dataclass(frozen=True)
class IPNDM(Sampler):
    """Improved pseudo-numerical methods: Adams-Bashforth without a warm-up (Liu et al. 2022; Zhang & Chen 2023).

    x ← x + (t-s) Σ_j b_j ε_j over the last `order` evaluations of ε = (x - D)/σ, with the classical weights b for even
    steps, whatever the grid: (3, -1)/2, (23, -16, 5)/12, (55, -59, 37, -9)/24. So the full order holds on grids even
    in σ; on others it is 2 at most. The last interval, to σ = 0, is x ← D.
    """

    spacing = "karras"
    even_in = "sigma"

    order: int = option(4, "evaluations used: the order of the Adams-Bashforth method", ge=1, le=4)

    def convergence(self) -> int:
        return self.order

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        past: list[Tensor] = []  # ε, the latest first
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            past = [(x - x0) / s, *past[: self.order - 1]]
            weights = _ADAMS_BASHFORTH[len(past) - 1]
            x = x0 if t == 0 else x + (t - s) * sum(b * e for b, e in zip(weights, past, strict=True))
            yield Step(t, x, x0)
