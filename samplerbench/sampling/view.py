"""What a plugin may ask of a model when it is bound to it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from samplerbench.sampling.denoiser import Denoiser
from samplerbench.sampling.inputs import Inputs


class Estimates(Protocol):
    """Numbers estimated from a model, kept in the user's cache under the hash of its weights.

    Attributes:
        evaluations: network evaluations (rows) that the numbers returned so far took, now or when they were first
            estimated.
    """

    @property
    def evaluations(self) -> int:
        """Network evaluations (rows) that the numbers returned so far took."""

    def get(self, name: str, compute: Callable[[], float]) -> float:
        """The number of that name: from the cache, or computed, counted and kept.

        Args:
            name: of the number, among those of these estimates.
            compute: gives the number, finite and at least 0.
        """


class ModelView(Protocol):
    """A model as `Sampler.bind`, `Spacing.bind`, `Guidance.bind` and `Generator.bind` see it.

    Attributes:
        shape: (C, H, W) of the state.
        levels: (T,) float64 on the CPU, increasing: the noise levels.
        device: where the network is.
        dtype: of the network's weights.
        classes: the number of labels; None for a model without labels.
    """

    shape: tuple[int, int, int]
    levels: Tensor
    device: torch.device
    dtype: torch.dtype
    classes: int | None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""

    def alpha(self, sigma: float) -> float:
        """α(σ): the scale of the model's own coordinates, y = α(σ) x."""

    def denoiser(self, inputs: Inputs) -> Denoiser:
        """The model's denoiser for the inputs of a batch: not guided, and clipped where the model clips x₀."""

    def decode(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] of states at σ = 0."""

    def real(self, n: int) -> tuple[Tensor, Tensor | None]:
        """n real images as states, (n, *shape), and their labels (n,) or None. Raises UserError without data."""

    def estimates(self, name: str, **settings: str | int | float) -> AbstractContextManager[Estimates]:
        """The estimates of that name for this model: entered to read and to add, kept when it is left.

        Args:
            name: of the quantity, `posterior-variance` for example: letters, digits and hyphens.
            settings: what the numbers depend on besides the weights and their precision.
        """
