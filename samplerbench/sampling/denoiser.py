"""The denoiser D(x, σ) = E[x₀ | x]: what a sampler sees of a model, and what a guidance sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.process import VARIANCE_PRESERVING, Process

Sigma = float | Tensor
"""A noise level: one for the whole batch (a float or a 0-d tensor), or one per sample (B,)."""

PredictionType = Literal["epsilon", "v_prediction", "sample"]
"""What a network was trained to predict, in diffusers' words: the noise, the velocity α ε - √(1-α²) x₀, or x₀."""


@dataclass(frozen=True)
class Prediction:
    """What a model predicts for a noisy state.

    Attributes:
        x0: (B, C, H, W), the denoised state D(x, σ).
        variance: (B, C, H, W), for a model that learned the variance: the network's output that interpolates between
            the two log variances, 0 for the small one and 1 for the large one (Nichol & Dhariwal 2021 eq. 15); None
            for other models.
    """

    x0: Tensor
    variance: Tensor | None = None


class Denoiser(ABC):
    """D(x, σ) of one batch, perhaps guided: all that a sampler sees of a model.

    Attributes:
        levels: (T,) float64 on the CPU, increasing: the noise levels the model was trained at. For a continuous
            model, a fine grid in its own time.
        process: the model's forward process, which defines `alpha`.
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
        """Whether the forward process keeps the variance. Deprecated: use `alpha`."""
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


class VectorJacobian(Protocol):
    """v ↦ vᵀ ∂D/∂x at the state of a `pullback`, (B, C, H, W) → (B, C, H, W)."""

    def __call__(self, v: Tensor, *, retain_graph: bool = False) -> Tensor:
        """The product with v (B, C, H, W). Unless `retain_graph` is set, it can be called once."""


class ConditionalDenoiser(Denoiser):
    """D with and without the inputs of a batch, and its derivative: what a guidance is given.

    Attributes:
        inputs: the labels, prompts and other inputs of the batch.
    """

    inputs: Inputs

    @abstractmethod
    def conditional(self, x: Tensor, sigma: Sigma) -> Prediction:
        """The prediction given the inputs: one network evaluation."""

    @abstractmethod
    def unconditional(self, x: Tensor, sigma: Sigma) -> Prediction:
        """The prediction without label or prompt: one network evaluation."""

    @abstractmethod
    def both(self, x: Tensor, sigma: Sigma) -> tuple[Prediction, Prediction]:
        """(unconditional, conditional) as one batch of 2B: two network evaluations per sample."""

    @abstractmethod
    def pullback(self, x: Tensor, sigma: Sigma, *, conditional: bool = True) -> tuple[Prediction, VectorJacobian]:
        """The prediction, and v ↦ vᵀ ∂D/∂x: one network evaluation, and one backward pass for each product.

        D is differentiated as the network gives it. Where the model clips x₀, the prediction here is not clipped:
        `clipped` clips it.

        Args:
            x: (B, C, H, W), the state.
            sigma: its noise level.
            conditional: whether the inputs are used.

        Returns:
            The prediction, detached, and the function that multiplies with the Jacobian.
        """

    def clipped(self, prediction: Prediction) -> Prediction:
        """The prediction with x₀ clipped where `conditional` and `unconditional` clip it; unchanged elsewhere."""
        return prediction

    @abstractmethod
    def rows(self, index: Tensor) -> ConditionalDenoiser:
        """The same denoiser for a part of the batch: index (k,) int64."""


class Clipped(Denoiser):
    """A denoiser whose D is clamped to [-limit, limit], as by diffusers' schedulers under `clip_sample`."""

    def __init__(self, inner: Denoiser, limit: float = 1.0) -> None:
        self.inner, self.limit = inner, limit
        self.levels, self.process, self.prediction = inner.levels, inner.process, inner.prediction

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        return clamp(self.inner.predict(x, sigma), self.limit)

    def rows(self, index: Tensor) -> Denoiser:
        return Clipped(self.inner.rows(index), self.limit)


class ClippedConditional(ConditionalDenoiser):
    """A model's denoiser whose predictions are clamped before a guidance combines them.

    The guided x₀ is not clamped. That is the order of guided-diffusion (Dhariwal & Nichol 2021).
    """

    def __init__(self, inner: ConditionalDenoiser, limit: float = 1.0) -> None:
        self.inner, self.limit, self.inputs = inner, limit, inner.inputs
        self.levels, self.process, self.prediction = inner.levels, inner.process, inner.prediction

    def clipped(self, prediction: Prediction) -> Prediction:
        return clamp(prediction, self.limit)

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        return self.clipped(self.inner.predict(x, sigma))

    def conditional(self, x: Tensor, sigma: Sigma) -> Prediction:
        return self.clipped(self.inner.conditional(x, sigma))

    def unconditional(self, x: Tensor, sigma: Sigma) -> Prediction:
        return self.clipped(self.inner.unconditional(x, sigma))

    def both(self, x: Tensor, sigma: Sigma) -> tuple[Prediction, Prediction]:
        free, given = self.inner.both(x, sigma)
        return self.clipped(free), self.clipped(given)

    def pullback(self, x: Tensor, sigma: Sigma, *, conditional: bool = True) -> tuple[Prediction, VectorJacobian]:
        return self.inner.pullback(x, sigma, conditional=conditional)

    def rows(self, index: Tensor) -> ConditionalDenoiser:
        return ClippedConditional(self.inner.rows(index), self.limit)


def clamp(prediction: Prediction, limit: float) -> Prediction:
    """The prediction with x₀ clamped to [-limit, limit]."""
    return Prediction(prediction.x0.clamp(-limit, limit), prediction.variance)


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
