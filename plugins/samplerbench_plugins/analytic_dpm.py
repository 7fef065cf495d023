"""Analytic-DPM."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from torch import Tensor

from samplerbench.models import posterior_variances
from samplerbench.sampling import (
    Chain,
    Denoiser,
    ModelView,
    Noise,
    Prediction,
    Sampler,
    Step,
    intervals,
    markov_variance,
    option,
)


@dataclass(frozen=True)
class AnalyticDPM(Sampler):
    """DDPM or DDIM with the optimal reverse variance (Bao et al. 2022, theorem 1 and eq. 8).

    From level s to t:  x ← D + c (x - D) + √v z with c = √(t²-u²)/s, where u² is t²(1 - t²/s²) (form ddpm) or 0 (ddim),
    and  v = u² + (1-c)² κ,  κ(s) = s² (1 - s² Γ(s)),  Γ(σ) = E‖score‖²/d: what x leaves unknown about x₀, on average.
    κ is estimated once per model and level, and kept: as the mean squared error of D on noised data, which is the
    same number for a perfect D, is optimal for an imperfect one too (Bao et al. 2022b, theorem 1), and does not lose
    itself in s²(1 - s²Γ) at large s. No noise in the last step, whose variance as a decoder is κ; in the one before, √v
    is bounded so that the noise E|√v z| is at most y grey levels, as in the paper's section 4.4.
    """

    spacing = "leading"
    from_infinity = True
    variances: ClassVar[Mapping[float, float]]

    form: Literal["ddpm", "ddim"] = option("ddpm", "the process whose reverse variance is optimal")
    y: float | None = option(
        2.0, "bound on the noise of the last step but one, in grey levels; none is no bound", gt=0.0
    )
    images: int = option(1000, "number of training images whose mean error is κ", ge=1, le=1_000_000)

    def bind(self, model: ModelView, sigmas: Tensor) -> Self:
        """With κ of the grid's levels."""
        variances, evaluations = posterior_variances(model, sigmas, self.images)
        return self.with_state(variances=variances, bound_evaluations=evaluations)

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        chain = Chain.of(denoise, sigmas)
        for s, t in intervals(sigmas):
            prediction = denoise.predict(x, s)
            x, variance = self.transition(x, prediction, s, t, chain)
            if t > 0:
                x = x + math.sqrt(variance) * noise()
            yield Step(t, x, prediction.x0)

    def transition(self, x: Tensor, prediction: Prediction, s: float, t: float, chain: Chain) -> tuple[Tensor, float]:
        x0 = prediction.x0
        if t == 0:
            return x0, self.variances[s]
        u2 = self.forward_variance(s, t)
        c = math.sqrt(t**2 - u2) / s
        variance = u2 + (1 - c) ** 2 * self.variances[s]
        if self.y is not None and chain.is_last_but_one(t):
            variance = min(variance, (self.y * (2 / 255) * math.sqrt(math.pi / 2)) ** 2)
        return x0 + c * (x - x0), variance

    def forward_variance(self, s: float, t: float) -> float:
        """The variance of q(x_t | x_s, x₀): of the Markov process for form=ddpm, 0 for form=ddim."""
        return markov_variance(s, t) if self.form == "ddpm" else 0.0
