"""The denoiser D(x, σ) = E[x₀ | x]: the interface of a model for samplers and guidance plugins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.process import VARIANCE_PRESERVING, Process

Sigma = float | Tensor
"""A noise level: a float or a 0-d tensor for the whole batch, or a tensor (B,) with one level per sample."""

PredictionType = Literal["epsilon", "v_prediction", "sample"]
"""The prediction type of a network, as in diffusers: the noise ε, the velocity α ε - √(1-α²) x₀, or x₀."""


@dataclass(frozen=True)
class Prediction:
    """The prediction of a model for a noisy state.

    Attributes:
        x0: denoised state D(x, σ), (B, C, H, W).
        variance: interpolation weight between the two log variances, (B, C, H, W): 0 is the small variance, 1 is the
            large variance (Nichol & Dhariwal 2021 eq. 15). None if the model did not learn the variance.
        unconditional: unconditional prediction of x₀ that classifier-free guidance was applied to, (B, C, H, W). None
            if there is no such guidance, or if it did not need this prediction.
    """

    x0: Tensor
    variance: Tensor | None = None
    unconditional: Tensor | None = None


class Denoiser(ABC):
    """The denoiser D(x, σ) of one batch, optionally guided. A sampler accesses a model only through it.

    Attributes:
        levels: noise levels of training, (T,) float64 on the CPU, increasing. For a continuous-time model, a fine grid.
        process: forward process of the model, which defines `alpha`.
        prediction: prediction type of the network, for samplers that combine raw network outputs. It does not
            change D.
        observation: observation y of each sample in an inverse problem, (B, *observed). None without a task.
    """

    levels: Tensor
    process: Process
    prediction: PredictionType = "epsilon"
    observation: Tensor | None = None

    def alpha(self, sigma: float) -> float:
        """The scale α(σ) of the network's coordinates, y = α(σ) x.

        α is 1/√(1+σ²) for VP, 1 for VE and 1/(1+σ) for a rectified flow.
        """
        return self.process.alpha(sigma)

    @property
    def variance_preserving(self) -> bool:
        """Whether the forward process is variance preserving. Deprecated: use `alpha`."""
        return self.process is VARIANCE_PRESERVING

    @abstractmethod
    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        """Predict the denoised state.

        Args:
            x: noisy state, (B, C, H, W).
            sigma: noise level of x.
        """

    def __call__(self, x: Tensor, sigma: Sigma) -> Tensor:
        """Return D(x, σ), (B, C, H, W)."""
        return self.predict(x, sigma).x0

    @abstractmethod
    def rows(self, index: Tensor) -> Denoiser:
        """Return the denoiser for a part of the batch. Solvers with a step size per sample use it.

        Args:
            index: rows of the batch, (k,) int64.
        """


class VectorJacobian(Protocol):
    """The vector-Jacobian product v ↦ vᵀ ∂D/∂x at the state of a `pullback`."""

    def __call__(self, v: Tensor, *, retain_graph: bool = False) -> Tensor:
        """Compute vᵀ ∂D/∂x, (B, C, H, W).

        Args:
            v: vector, (B, C, H, W).
            retain_graph: whether to keep the autograd graph, so that the product can be computed again.
        """


class ConditionalDenoiser(Denoiser):
    """The conditional and unconditional denoiser of one batch, and its derivative. Guidance plugins use it.

    Attributes:
        inputs: labels, prompts and other inputs of the batch.
    """

    inputs: Inputs

    @abstractmethod
    def conditional(self, x: Tensor, sigma: Sigma) -> Prediction:
        """Return the conditional prediction. It takes one network evaluation per sample."""

    @abstractmethod
    def unconditional(self, x: Tensor, sigma: Sigma) -> Prediction:
        """Return the prediction without label or prompt. It takes one network evaluation per sample."""

    @abstractmethod
    def both(self, x: Tensor, sigma: Sigma) -> tuple[Prediction, Prediction]:
        """Return (unconditional, conditional), computed as one batch of 2B: two network evaluations per sample."""

    @abstractmethod
    def pullback(self, x: Tensor, sigma: Sigma, *, conditional: bool = True) -> tuple[Prediction, VectorJacobian]:
        """Return the prediction and the vector-Jacobian product v ↦ vᵀ ∂D/∂x.

        It takes one network evaluation, and one backward pass for each product. The prediction is never clipped, even
        if the model clips x₀. Use `clipped` to clip it.

        Args:
            x: noisy state, (B, C, H, W).
            sigma: noise level of x.
            conditional: whether to use the inputs of the batch.

        Returns:
            The detached prediction, and the function that computes the vector-Jacobian product.
        """

    def clipped(self, prediction: Prediction) -> Prediction:
        """Clip the prediction as `conditional` and `unconditional` do. By default, return it unchanged."""
        return prediction

    @abstractmethod
    def rows(self, index: Tensor) -> ConditionalDenoiser:
        """Return the denoiser for a part of the batch.

        Args:
            index: rows of the batch, (k,) int64.
        """


class ObservedDenoiser(Denoiser):
    """A denoiser with the observations of its samples, for samplers that use them.

    Args:
        inner: the denoiser.
        observation: observations y, (B, *observed).
    """

    def __init__(self, inner: Denoiser, observation: Tensor) -> None:
        self.inner, self.observation, self.y = inner, observation, observation
        self.levels, self.process, self.prediction = inner.levels, inner.process, inner.prediction

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        return self.inner.predict(x, sigma)

    def rows(self, index: Tensor) -> Denoiser:
        return ObservedDenoiser(self.inner.rows(index), self.y[index.to(self.y.device)])


class Clipped(Denoiser):
    """A denoiser with D clamped to [-limit, limit], as `clip_sample` of the diffusers schedulers does."""

    def __init__(self, inner: Denoiser, limit: float = 1.0) -> None:
        self.inner, self.limit = inner, limit
        self.levels, self.process, self.prediction = inner.levels, inner.process, inner.prediction

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        return clamp(self.inner.predict(x, sigma), self.limit)

    def rows(self, index: Tensor) -> Denoiser:
        return Clipped(self.inner.rows(index), self.limit)


class ClippedConditional(ConditionalDenoiser):
    """A conditional denoiser that clamps the predictions before the guidance combines them.

    The guided x₀ is not clamped. guided-diffusion uses this order (Dhariwal & Nichol 2021).
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
    """Return the prediction with x₀ clamped to [-limit, limit]."""
    free = prediction.unconditional
    return Prediction(
        prediction.x0.clamp(-limit, limit), prediction.variance, None if free is None else free.clamp(-limit, limit)
    )


def per_sample(sigma: Sigma, x: Tensor) -> Tensor:
    """Return sigma as (B,) float64 on the device of x, without device synchronisation."""
    if isinstance(sigma, Tensor) and sigma.ndim:
        return sigma.to(device=x.device, dtype=torch.float64)
    return torch.full((len(x),), float(sigma), dtype=torch.float64, device=x.device)


def coefficient(value: Sigma, x: Tensor) -> float | Tensor:
    """Return a coefficient in a form that broadcasts with x: a Python float, or (B, 1, 1, 1) in the dtype of x."""
    if isinstance(value, Tensor) and value.ndim:
        return value.to(device=x.device, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return float(value)
