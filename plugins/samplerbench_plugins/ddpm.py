"""DDPM ancestral sampling."""

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
    intervals,
    markov_variance,
    option,
)


@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling of denoising diffusion probabilistic models (Ho et al. 2020, algorithm 2).

    From level s to t:  x ← D + (t²/s²)(x - D) + √v z, the mean of q(x_t | x_s, x₀ = D) plus noise of variance v:
    small    v = t²(1 - t²/s²), the variance of the posterior (β̃, eq. 7);
    large    v = (α_s/α_t)² (s²-t²), the variance of the forward step (β, section 3.2), in coordinates y = α x;
    learned  log v interpolated between the two by the network's output (Nichol & Dhariwal 2021, eq. 15).
    The last step (t = 0) adds no noise. As a decoder, it has the small variance of the step before (the authors' code).
    The default spacing is that of the paper's code and of the DDIM tables.
    """

    spacing = "leading"
    from_infinity = True

    variance: Literal["small", "large", "learned"] = option("small", "variance of the reverse step")

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        chain = Chain.of(denoise, sigmas)
        for s, t in intervals(sigmas):
            prediction = denoise.predict(x, s)
            x, variance = self.transition(x, prediction, s, t, chain)
            if t > 0:
                deviation = variance.sqrt() if isinstance(variance, Tensor) else math.sqrt(variance)
                x = x + deviation * noise()
            yield Step(t, x, prediction.x0)

    def transition(
        self, x: Tensor, prediction: Prediction, s: float, t: float, chain: Chain
    ) -> tuple[Tensor, float | Tensor]:
        mean = prediction.x0 + (t / s) ** 2 * (x - prediction.x0)
        small = markov_variance(s, t) if t > 0 else _decoder_variance(chain, s)
        large = (chain.alpha(s) / chain.alpha(t)) ** 2 * (s**2 - t**2)
        if self.variance == "small" or (self.variance == "large" and t == 0):
            return mean, small
        if self.variance == "large":
            return mean, large
        if prediction.variance is None:
            raise UserError("sampler ddpm: the model learned no variance; use variance=small or variance=large.")
        # The square root of a square is exact.
        deviation = (0.5 * (math.log(small) + prediction.variance * math.log(large / small))).exp()
        return mean, deviation.square()


def _decoder_variance(chain: Chain, s: float) -> float:
    """The variance of the decoder p(x₀ | x_s): the small variance of the step before, in coordinates y = α x.

    The authors' code has this variance for both choices, because the formulas of the other steps give 0 or a large
    variance at t = 0. For a chain of one step, which has no step before, it is the large variance (α_s s)².
    """
    if chain.last_noisy is None:
        return (chain.alpha(s) * s) ** 2
    return chain.alpha(s) ** 2 * markov_variance(*chain.last_noisy)
