"""The interface of a model for the `bind` methods of plugins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from samplerbench.options import Configurable
from samplerbench.sampling.denoiser import Denoiser
from samplerbench.sampling.flow import FlowSchedule
from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.task import Observation

if TYPE_CHECKING:
    from samplerbench.sampling.sampler import Sampler


class Estimates(Protocol):
    """Numbers estimated from a model and cached under the hash of its weights.

    Attributes:
        evaluations: network evaluations (rows) to estimate the values returned so far. Cached values count too.
    """

    @property
    def evaluations(self) -> int:
        """Network evaluations (rows) to estimate the values returned so far."""

    def get(self, name: str, compute: Callable[[], float]) -> float:
        """Return a value from the cache, or compute it, count its evaluations and cache it.

        Args:
            name: name of the value, unique within these estimates.
            compute: function that computes the value, finite and non-negative.
        """


class ModelView(Protocol):
    """The model passed to `Sampler.bind`, `Spacing.bind`, `Guidance.bind` and `Generator.bind`.

    Attributes:
        shape: shape (C, H, W) of the state.
        levels: noise levels, (T,) float64 on the CPU, increasing.
        device: device of the network.
        dtype: dtype of the network's weights.
        classes: number of classes. None for a model without labels.
        flow: time steps of a rectified flow. None for other processes.
        observation: observations of an inverse problem. None without a task.
    """

    shape: tuple[int, int, int]
    levels: Tensor
    device: torch.device
    dtype: torch.dtype
    classes: int | None
    flow: FlowSchedule | None
    observation: Observation | None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the images."""

    def alpha(self, sigma: float) -> float:
        """The scale α(σ) of the network's coordinates, y = α(σ) x."""

    def denoiser(self, inputs: Inputs) -> Denoiser:
        """Return the denoiser for the inputs of a batch, without guidance. It is clipped if the model clips x₀."""

    def decode(self, x: Tensor) -> Tensor:
        """Decode states at σ = 0, (B, *shape), to images in [-1, 1], (B, C, H, W)."""

    def real(self, n: int) -> tuple[Tensor, Tensor | None]:
        """Return real images as states.

        Args:
            n: number of images.

        Returns:
            States, (n, *shape), and labels, (n,) or None.

        Raises:
            UserError: if the training data is not available.
        """

    def estimates(self, name: str, **settings: str | int | float) -> AbstractContextManager[Estimates]:
        """Open the cached estimates of a quantity for this model, as a context manager.

        New values are saved when the context exits.

        Args:
            name: name of the quantity, of letters, digits and hyphens, for example `posterior-variance`.
            settings: other settings that the values depend on, besides the weights and their precision.
        """


class RunView(ABC):
    """A model as a run uses it: also with the guidance and the labels or prompts of the run.

    It is a `ModelView`. A run passes it to `Spacing.bind`, so that a spacing can learn its levels for what is sampled.
    The noise is from a stream that no run draws from: the images of a run are unseen.
    """

    shape: tuple[int, int, int]
    levels: Tensor
    device: torch.device
    dtype: torch.dtype
    classes: int | None
    flow: FlowSchedule | None

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """See `ModelView`."""

    @abstractmethod
    def alpha(self, sigma: float) -> float:
        """See `ModelView`."""

    @abstractmethod
    def denoiser(self, inputs: Inputs) -> Denoiser:
        """See `ModelView`. It has no guidance."""

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """See `ModelView`."""

    @abstractmethod
    def real(self, n: int) -> tuple[Tensor, Tensor | None]:
        """See `ModelView`."""

    @abstractmethod
    def estimates(self, name: str, **settings: str | int | float) -> AbstractContextManager[Estimates]:
        """See `ModelView`. The cache also distinguishes the noise levels, the guidance and the labels or prompts."""

    @abstractmethod
    def describe(self, plugin: Configurable) -> str:
        """Describe a plugin with all that its results depend on: name, parameters and hash of its source.

        Args:
            plugin: the plugin, for example the sampler that a schedule is learned for.
        """

    @abstractmethod
    def run_denoiser(self, index: Tensor) -> Denoiser:
        """Return the denoiser of the run, with its guidance.

        Args:
            index: indices of training samples, (B,) int64. Sample i has the label or the prompt of image i of a run.
        """

    @abstractmethod
    def start(self, index: Tensor, sigma: float, seed: int) -> Tensor:
        """Return initial states for learning, (B, *shape).

        Args:
            index: indices of training samples, (B,) int64.
            sigma: initial noise level.
            seed: random seed.
        """

    @abstractmethod
    def sample(self, sampler: Sampler, sigmas: Tensor, index: Tensor, seed: int) -> Tensor:
        """Run a deterministic sampler from `start` and return the final states, (B, *shape). NaN if one is not finite.

        Args:
            sampler: the sampler.
            sigmas: noise levels, (N+1,) float64 on the CPU, strictly decreasing, ending at 0.
            index: indices of training samples, (B,) int64.
            seed: random seed.

        Raises:
            UserError: if the sampler draws noise.
            RunError: if the sampler fails.
        """
