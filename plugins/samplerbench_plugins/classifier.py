"""Classifier guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from samplerbench.sampling import Denoiser, Guidance, Prediction, Sigma, coefficient, option


@dataclass(frozen=True)
class ClassifierGuidance(Guidance):
    """Classifier guidance (Dhariwal & Nichol 2021, algorithms 1 and 2):  D + g σ² ∇ₓ log p(y | x, σ).

    By Bayes' rule g = 1 on the unconditional model is the conditional one. One network evaluation, and one forward
    and one backward pass of the classifier, which are counted beside it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"labels", "classifier"})

    scale: float = option(1.0, "g: how much of the classifier's gradient is added", ge=0.0)
    conditional: bool = option(False, "guide the class-conditional prediction instead of the unconditional one")
    weights: str = option("", "folder of the classifier; empty is the one that comes with the model")

    def predict(self, denoise: Denoiser, x: Tensor, sigma: Sigma) -> Prediction:
        base = denoise.conditional(x, sigma) if self.conditional else denoise.unconditional(x, sigma)
        if self.scale == 0:
            return base
        shift = self.scale * coefficient(sigma, x) ** 2 * denoise.classifier_score(x, sigma, self.weights)
        return Prediction(base.x0 + shift, base.variance)
