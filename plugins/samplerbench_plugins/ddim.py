"""DDIM sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step, intervals, option


@dataclass(frozen=True)
class DDIM(Sampler):
    """Denoising diffusion implicit models (Song, Meng & Ermon 2021, eq. 12 and 16).

    From level s to t, with u = η t √(1 - t²/s²):  x ← D + (√(t²-u²)/s)(x - D) + u z.
    η = 0 is Euler's method on the probability-flow ODE. η = 1 is DDPM with the small variance.
    The default spacing is the linear spacing of the paper. The paper's CIFAR-10 tables use `quadratic`.
    """

    spacing = "leading"
    from_infinity = True

    eta: float = option(0.0, "0 is deterministic, 1 is ancestral", ge=0.0, le=1.0)

    def convergence(self) -> int | None:
        return 1 if self.eta == 0 else None

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            u = self.eta * t * math.sqrt(1 - (t / s) ** 2)
            x = x0 + (math.sqrt(t**2 - u**2) / s) * (x - x0)
            if u > 0:
                x = x + u * noise()
            yield Step(t, x, x0)
