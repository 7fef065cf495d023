"""Annealed Langevin dynamics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step, intervals, is_infinite, option


@dataclass(frozen=True)
class Langevin(Sampler):
    """Annealed Langevin dynamics of noise-conditional score networks (Song & Ermon 2019, algorithm 1).

    At each level σ of the grid, T times:  x ← x + r σ² score(x, σ) + √(2r) σ z, with σ² score = D - x and
    r = ε/(2σ_L²) in the paper's notation, so that α_i/2 = r σ_i². The final step is x ← D(x, σ_L), the denoising step
    of Jolicoeur-Martineau et al. 2021. Algorithm 1 does not include it.
    The paper uses ε = 2·10⁻⁵ at σ_L = 0.01, which is r = 0.1, and T = 100. Song & Ermon 2020 use r = 0.06, T = 5 and
    L = 232 levels. With few levels, σ changes more from level to level, and T steps reduce the noise only by (1-r)^T.
    The default r = 0.3 with T = 5 is suitable for about 10 levels or more.
    From t = 1 of a rectified flow, where σ is infinite, the state is drawn anew at the next level: x ← D + t z.
    """

    spacing = "geometric"
    from_infinity = True
    keeps_spacing = True

    T: int = option(5, "Langevin steps at each noise level", ge=1, le=1_000_000)
    r: float = option(0.3, "step size in units of σ²: ε/(2σ_L²)", gt=0.0, lt=1.0)
    denoise: bool = option(True, "add a final denoising step, which takes one evaluation")

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            for _ in range(self.T):
                x0 = denoise(x, s)
                x = x + self.r * (x0 - x) + (math.sqrt(2 * self.r) * s) * noise()
            if is_infinite(s) and t > 0:
                x = x0 + t * noise()
            if t == 0 and self.denoise:
                x = x0 = denoise(x, s)
            yield Step(t, x, x0)

    def nfe(self, steps: int) -> int:
        return steps * self.T + self.denoise
