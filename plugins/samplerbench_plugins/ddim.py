"""DDIM sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from samplerbench.sampling import (
    Chain,
    Denoiser,
    Noise,
    Prediction,
    Sampler,
    Step,
    UserError,
    argument,
    intervals,
    option,
)


@dataclass(frozen=True)
class DDIM(Sampler):
    """Denoising diffusion implicit models (Song, Meng & Ermon 2021, eq. 12 and 16).

    From level s to t, with u = η t √(1 - t²/s²):  x ← D + (√(t²-u²)/s)(x - D) + u z.
    η = 0 is Euler's method on the probability-flow ODE. η = 1 is DDPM with the small variance.
    The default spacing is the linear spacing of the paper. The paper's CIFAR-10 tables use `quadratic`.
    With cfg_pp=true it is CFG++ (Chung et al. 2024, algorithm 2):  x ← D + (√(t²-u²)/s)(x - D_u) + u z, where
    D = D_u + λ (D_c - D_u) is the guidance `cfg` with the scale λ < 1. For η = 0 a step is that of DDIM with the scale
    λ s/(s-t).
    """

    spacing = "leading"
    from_infinity = True

    eta: float = option(0.0, "0 is deterministic, 1 is ancestral", ge=0.0, le=1.0)
    cfg_pp: bool = option(
        False, "CFG++: add the noise of the unconditional prediction; for guidance cfg with scale < 1"
    )

    def convergence(self) -> int | None:
        return 1 if self.eta == 0 and not self.cfg_pp else None

    def exact_for(self) -> Literal["denoiser", "consistency function"] | None:
        return None if self.cfg_pp else "denoiser"

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        chain = Chain.of(denoise, sigmas)
        for s, t in intervals(sigmas):
            prediction = denoise.predict(x, s)
            x, variance = self.transition(x, prediction, s, t, chain)
            if t > 0 and variance > 0:
                x = x + math.sqrt(variance) * noise()
            yield Step(t, x, prediction.x0)

    def transition(self, x: Tensor, prediction: Prediction, s: float, t: float, chain: Chain) -> tuple[Tensor, float]:
        u = self._deviation(s, t)
        mean = prediction.x0 + (math.sqrt(t**2 - u**2) / s) * (x - self._noise_from(prediction))
        if t > 0:
            return mean, u**2
        # The decoder has the variance of the step before, as in DDPM.
        before = s if chain.last_noisy is None else self._deviation(*chain.last_noisy)
        scale = self.eta if chain.last_noisy is None else 1.0
        return mean, (scale * chain.alpha(s) * before) ** 2

    def _noise_from(self, prediction: Prediction) -> Tensor:
        """The prediction of x₀ that defines the noise ε = (x - x₀)/s."""
        if not self.cfg_pp:
            return prediction.x0
        if prediction.unconditional is None:
            raise UserError(
                f"sampler ddim: cfg_pp=true requires {argument('guidance', 'cfg:scale=0.6')}; the scale must not be 1."
            )
        return prediction.unconditional

    def forward_variance(self, s: float, t: float) -> float:
        """The variance u² of q(x_t | x_s, x₀) of the non-Markov forward process (eq. 7)."""
        return self._deviation(s, t) ** 2

    def _deviation(self, s: float, t: float) -> float:
        return self.eta * t * math.sqrt(1 - (t / s) ** 2)
