"""Classifier-free guidance with rescaling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from samplerbench.sampling import ConditionalDenoiser, Guidance, Prediction, Sigma, coefficient, option


@dataclass(frozen=True)
class RescaledClassifierFree(Guidance):
    """Classifier-free guidance with rescaling (Lin et al. 2023, eq. 14-16):  F = φ F_g std(F_c)/std(F_g) + (1-φ) F_g.

    F_g = F_u + g (F_c - F_u) is the guided output of the network, in its prediction type: ε, v, x₀, or the velocity of
    a rectified flow. The standard deviations are over all values of a sample, as in `rescale_noise_cfg` of diffusers,
    where φ is `guidance_rescale`. The paper recommends φ = 0.7. Two evaluations per image, except for g = 1.
    """

    needs_condition: ClassVar[bool] = True
    needs_unconditional: ClassVar[bool] = True

    scale: float = option(7.5, "g: 1 is the conditional model, more is nearer to the prompt", ge=0.0)
    phi: float = option(0.7, "φ: 0 is classifier-free guidance, 1 is full rescaling", ge=0.0, le=1.0)
    clip: Literal["after", "before"] = option(
        "after", "whether a model that clips x₀ clips the guided one, or the one that is guided"
    )

    @property
    def evaluations(self) -> int:
        return 1 if self.scale == 1 else 2

    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        if self.scale == 1:
            return denoise.conditional(x, sigma)
        free, given = denoise.both(x, sigma)
        # F is a positive or negative multiple of base - D, where base depends on the prediction type. The multiple
        # has no effect on the ratio.
        base = _base(denoise, x, sigma)
        conditional = base - given.x0
        guided = base - (free.x0 + self.scale * (given.x0 - free.x0))
        ratio = _deviation(conditional) / _deviation(guided)
        return Prediction(base - guided * (self.phi * ratio + (1 - self.phi)), given.variance, free.x0)


def _base(denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Tensor:
    """The tensor b for which b - D is proportional to the output of the network."""
    if denoise.process.ends:  # (1-t) x - D = t v
        return x * coefficient(1 / (1 + sigma), x)
    if denoise.prediction == "epsilon":  # x - D = σ ε
        return x
    if denoise.prediction == "v_prediction":  # x/(1+σ²) - D = σ/√(1+σ²) v
        return x * coefficient(1 / (1 + sigma**2), x)
    return x * 0.0


def _deviation(output: Tensor) -> Tensor:
    """The standard deviation of each sample, (B, 1, 1, 1)."""
    return output.std(dim=tuple(range(1, output.ndim)), keepdim=True)
