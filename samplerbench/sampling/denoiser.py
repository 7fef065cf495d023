"""The denoiser D(x, σ) = E[x₀ | x]: the one thing a sampler asks of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from samplerbench.sampling.process import VARIANCE_PRESERVING, Process

Sigma = float | Tensor
"""A noise level: one for the whole batch (a float or a 0-d tensor), or one per sample (B,)."""

PredictionType = Literal["epsilon", "v_prediction", "sample"]
"""What a network was trained to predict, in diffusers' words: the noise, the velocity α ε - √(1-α²) x₀, or x₀."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of a noisy state.

    x0: the denoised state D(x, σ), (B, C, H, W). variance: for a model that learned it, the network's output that
    interpolates between the two log variances, (B, C, H, W): 0 is the small one, 1 the large one
    (Nichol & Dhariwal 2021 eq. 15); else None.
    """

    x0: Tensor
    variance: Tensor | None = None


class Denoiser(ABC):
    """A model bound to the labels (or prompts) of one batch, perhaps guided.

    Attributes:
        levels: (T,) float64 on the CPU, increasing: the noise levels the model was trained at (for a continuous
            model, a fine grid in its own time).
        process: the model's forward process, which says how its own coordinates y = α(σ) x are scaled.
        prediction: what the network predicts, for a sampler that combines the network's own outputs. D is the same.
    """

    levels: Tensor
    process: Process
    prediction: PredictionType = "epsilon"

    def alpha(self, sigma: float) -> float:
        """α(σ): the scale of the model's own coordinates, y = α(σ) x. VP 1/√(1+σ²), VE 1, rectified flow 1/(1+σ)."""
        return self.process.alpha(sigma)

    @property
    def variance_preserving(self) -> bool:
        """Whether the forward process keeps the variance. Deprecated: `alpha` says what a method needs."""
        return self.process is VARIANCE_PRESERVING

    @abstractmethod
    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        """The prediction for the state x (B, C, H, W) at noise level sigma."""

    def __call__(self, x: Tensor, sigma: Sigma) -> Tensor:
        """D(x, σ), (B, C, H, W)."""
        return self.predict(x, sigma).x0

    @abstractmethod
    def rows(self, index: Tensor) -> Denoiser:
        """The same denoiser for a part of the batch: index (k,) int64. For solvers that step each sample alone."""

    # What a guidance may ask for. A denoiser that is no model (one that is guided already) has none of them.

    def conditional(self, x: Tensor, sigma: Sigma) -> Prediction:
        """The prediction given the labels: one network evaluation."""
        raise NotImplementedError

    def unconditional(self, x: Tensor, sigma: Sigma) -> Prediction:
        """The prediction given no labels: one network evaluation."""
        raise NotImplementedError

    def both(self, x: Tensor, sigma: Sigma) -> tuple[Prediction, Prediction]:
        """(unconditional, conditional) as one batch of 2B: two network evaluations per sample."""
        raise NotImplementedError

    def classifier_score(self, x: Tensor, sigma: Sigma, weights: str = "") -> Tensor:
        """∇ₓ log p(y | x, σ) of a noise-conditional classifier, (B, C, H, W): one forward and one backward pass.

        weights: a classifier's folder; empty is the classifier that comes with the model.
        """
        raise NotImplementedError

    def denoised_score(
        self, x: Tensor, sigma: Sigma, conditional: bool = False, weights: str = ""
    ) -> tuple[Prediction, Tensor]:
        """The prediction, and ∇ₓ log p(y | D(x, σ)) (B, C, H, W) of a classifier of clean images.

        One network evaluation for both, which is differentiated; one forward and one backward pass of the classifier.
        weights: the classifier's folder.
        """
        raise NotImplementedError

    def posterior_variance(self, sigma: float) -> float:
        """κ(σ) = E tr Cov[x₀ | x]/d = σ²(1 - σ² E‖score‖²/d), for a sampler that `needs` it."""
        raise NotImplementedError

    def scale_latents(self, z: Tensor) -> Tensor:
        """The states of the autoencoder's own latents z (B, C, H, W), for a sampler that `needs` an autoencoder."""
        raise NotImplementedError


class Clipped(Denoiser):
    """A denoiser whose D is clamped to [-limit, limit], as `clip_sample` in a scheduler's configuration asks.

    Around a guided denoiser the guided D is clamped, as by diffusers' schedulers. Around the model that a guidance is
    given, what it guides is clamped and the result is not, as by guided-diffusion (Dhariwal & Nichol 2021); a
    classifier's gradient is the same in both.
    """

    def __init__(self, inner: Denoiser, limit: float = 1.0) -> None:
        self.inner, self.limit = inner, limit
        self.levels, self.process, self.prediction = inner.levels, inner.process, inner.prediction

    def _clip(self, prediction: Prediction) -> Prediction:
        return Prediction(prediction.x0.clamp(-self.limit, self.limit), prediction.variance)

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        return self._clip(self.inner.predict(x, sigma))

    def conditional(self, x: Tensor, sigma: Sigma) -> Prediction:
        return self._clip(self.inner.conditional(x, sigma))

    def unconditional(self, x: Tensor, sigma: Sigma) -> Prediction:
        return self._clip(self.inner.unconditional(x, sigma))

    def both(self, x: Tensor, sigma: Sigma) -> tuple[Prediction, Prediction]:
        free, given = self.inner.both(x, sigma)
        return self._clip(free), self._clip(given)

    def classifier_score(self, x: Tensor, sigma: Sigma, weights: str = "") -> Tensor:
        return self.inner.classifier_score(x, sigma, weights)

    def denoised_score(
        self, x: Tensor, sigma: Sigma, conditional: bool = False, weights: str = ""
    ) -> tuple[Prediction, Tensor]:
        prediction, score = self.inner.denoised_score(x, sigma, conditional, weights)
        return self._clip(prediction), score

    def rows(self, index: Tensor) -> Denoiser:
        return Clipped(self.inner.rows(index), self.limit)

    def posterior_variance(self, sigma: float) -> float:
        return self.inner.posterior_variance(sigma)

    def scale_latents(self, z: Tensor) -> Tensor:
        return self.inner.scale_latents(z)


def per_sample(sigma: Sigma, x: Tensor) -> Tensor:
    """sigma as (B,) float64 on x's device, without waiting for the device."""
    if isinstance(sigma, Tensor) and sigma.ndim:
        return sigma.to(device=x.device, dtype=torch.float64)
    return torch.full((len(x),), float(sigma), dtype=torch.float64, device=x.device)


def coefficient(value: Sigma, x: Tensor) -> float | Tensor:
    """A float64 coefficient ready to multiply x: a Python float, or (B, 1, 1, 1) in x's dtype."""
    if isinstance(value, Tensor) and value.ndim:
        return value.to(device=x.device, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return float(value)
