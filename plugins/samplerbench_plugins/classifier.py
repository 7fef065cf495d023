"""Classifier guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from samplerbench.models import classifier_of
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

LARGE = 1000.0
"""The noise level at which a classifier is evaluated instead of σ = ∞."""


@dataclass(frozen=True)
class ClassifierGuidance(ClassifierBased):
    """Classifier guidance (Dhariwal & Nichol 2021, algorithm 2):  D + g σ² ∇ₓ log p(y | x, σ).

    That is the classifier's score added to the model's, ε̂ = ε - √(1-ᾱ) g ∇ log p, under every sampler. By Bayes' rule
    g = 1 on the unconditional model is the conditional one. One network evaluation, and one forward and one backward
    pass of the classifier, which are counted beside it.

    Algorithm 1, for ancestral sampling, is another method: it adds g v ∇ log p to the mean of the step, v being the
    reverse variance. From level s to t that would be the shift here times (α_t/α_s) v/(s² - t²), α being the model's
    scale and v in these coordinates: for `ddpm` with the large variance on a variance-preserving model α_s/α_t, with
    the small one less. It depends on t and on the sampler's variance, which a guidance, a function of (x, s) alone, is
    not given; so it is not offered. The two agree as the steps grow small, and differ much at 5 steps.

    clip=before is guided-diffusion's order: x₀ is clipped, then guided.
    At t = 1 of a rectified flow, where σ is infinite, the classifier is evaluated at σ = 1000, for the same y.
    """

    weights: str = option("", "folder of the classifier; empty is the one that comes with the model")

    def bind(self, model: ModelView) -> Self:
        return self.with_state(classifier=classifier_of(model, self.weights, self.conditional))

    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        base = denoise.conditional(x, sigma) if self.conditional else denoise.unconditional(x, sigma)
        labels = denoise.inputs.labels
        if self.scale == 0 or labels is None:
            return base
        if not isinstance(sigma, Tensor) and is_infinite(sigma):
            x, sigma = x * (LARGE / sigma), LARGE
        score = self.classifier.score(x, per_sample(sigma, x), labels)
        return Prediction(base.x0 + self.scale * coefficient(sigma, x) ** 2 * score, base.variance)
