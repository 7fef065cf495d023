"""Guidance by a classifier of clean images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from samplerbench.sampling import Denoiser, Guidance, Prediction, Sigma, coefficient, option


@dataclass(frozen=True)
class ImageClassifierGuidance(Guidance):
    """Guidance by a classifier of clean images (Bansal et al. 2023, forward guidance):  D + g σ² ∇ₓ log p(y | D).

    D is D(x, σ). Any transformers image classifier serves, none that knows noise is needed; the gradient goes through
    the denoiser, and of a latent model through the decoder, whose passes are not counted. p(y | D) is not p(y | x, σ),
    so g = 1 is not Bayes' rule. The network runs once, which gives D too, and is differentiated once: its backward pass
    is counted beside the classifier's.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"labels", "image classifier"})
    bayes: ClassVar[bool] = False

    scale: float = option(1.0, "g: how much of the classifier's gradient is added", ge=0.0)
    conditional: bool = option(False, "guide the class-conditional prediction instead of the unconditional one")
    weights: str = option("", "folder of a transformers image classifier; empty: the exact problems' own")
    clip: Literal["after", "before"] = option(
        "after", "whether a model that clips x₀ clips the guided one, or the one that is guided"
    )

    def predict(self, denoise: Denoiser, x: Tensor, sigma: Sigma) -> Prediction:
        if self.scale == 0:
            return denoise.conditional(x, sigma) if self.conditional else denoise.unconditional(x, sigma)
        base, score = denoise.denoised_score(x, sigma, self.conditional, self.weights)
        return Prediction(base.x0 + self.scale * coefficient(sigma, x) ** 2 * score, base.variance)
