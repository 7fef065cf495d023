"""Guidance by a classifier of clean images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from samplerbench.models import image_classifier_of
from samplerbench.sampling import (
    ConditionalDenoiser,
    ModelView,
    Prediction,
    Sigma,
    coefficient,
    is_infinite,
    option,
    per_sample,
)
from samplerbench_plugins.classifier_based import ClassifierBased


@dataclass(frozen=True)
class ImageClassifierGuidance(ClassifierBased):
    """Guidance by a classifier of clean images (Bansal et al. 2023, forward guidance):  D + g σ² ∇ₓ log p(y | D).

    D is D(x, σ). Any transformers image classifier serves, none that knows noise is needed; the gradient goes through
    the denoiser, and of a latent model through the decoder, whose passes are not counted. p(y | D) is not p(y | x, σ),
    so g = 1 is not Bayes' rule. The network runs once, which gives D too, and is differentiated once: its backward pass
    is counted beside the classifier's. At t = 1 of a rectified flow, where D does not depend on x, nothing is added.
    """

    model: ClassVar[ModelView]
    bayes: ClassVar[bool] = False

    weights: str = option("", "folder of a transformers image classifier; empty: the exact problems' own")

    def bind(self, model: ModelView) -> Self:
        return self.with_state(classifier=image_classifier_of(model, self.weights, self.conditional), model=model)

    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        labels = denoise.inputs.labels
        at_end = not isinstance(sigma, Tensor) and is_infinite(sigma)
        if self.scale == 0 or labels is None or at_end:
            return denoise.conditional(x, sigma) if self.conditional else denoise.unconditional(x, sigma)
        base, pull = denoise.pullback(x, sigma, conditional=self.conditional)
        with torch.enable_grad():
            x0 = base.x0.requires_grad_(True)
            log_p = self.classifier.logits(self.model.decode(x0), per_sample(0.0, x)).log_softmax(dim=1)
            (slope,) = torch.autograd.grad(log_p[torch.arange(len(x), device=x.device), labels].sum(), x0)
        shift = self.scale * coefficient(sigma, x) ** 2 * pull(slope)
        return Prediction(denoise.clipped(base).x0.detach() + shift, base.variance)
