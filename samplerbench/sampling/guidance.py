"""Guidance: a function denoiser → denoiser. A plugin; it composes with every sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from samplerbench.options import Configurable
from samplerbench.sampling.denoiser import Denoiser, Prediction, Sigma


@dataclass(frozen=True)
class Guidance(Configurable, ABC):
    """Base of guidance plugins: one method, `predict`.

    `needs` says what a model must offer: "labels" (what to steer towards), "null" (the same network without labels),
    "classifier" (p(y | x, σ)), "image classifier" (p(y | image)). A model that lacks one is refused before anything
    runs.
    """

    kind: ClassVar[str] = "guidance"
    needs: ClassVar[frozenset[str]] = frozenset()
    bayes: ClassVar[bool] = True
    """Whether scale 1 is the conditional model where the model and its classifier are exact: Bayes' rule."""

    @property
    def clip(self) -> Literal["after", "before"]:
        """Where a model that clips x₀ is clipped: the guided x₀ (after), or the predictions that are guided (before).

        A plugin may make it a parameter: `clip: Literal["after", "before"] = option("after", "...")`.
        """
        return "after"

    @property
    def evaluations(self) -> int:
        """Network evaluations per prediction: for planning a budget. What is reported is counted."""
        return 1

    @abstractmethod
    def predict(self, denoise: Denoiser, x: Tensor, sigma: Sigma) -> Prediction:
        """The guided prediction, built from `denoise.conditional`, `.unconditional`, `.both`, `.classifier_score`."""

    def guide(self, denoise: Denoiser) -> Denoiser:
        """The guided denoiser."""
        return _Guided(self, denoise)


class _Guided(Denoiser):
    def __init__(self, guidance: Guidance, inner: Denoiser) -> None:
        self.guidance, self.inner = guidance, inner
        self.levels, self.variance_preserving = inner.levels, inner.variance_preserving
        self.prediction = inner.prediction

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        return self.guidance.predict(self.inner, x, sigma)

    def rows(self, index: Tensor) -> Denoiser:
        return _Guided(self.guidance, self.inner.rows(index))

    def posterior_variance(self, sigma: float) -> float:
        return self.inner.posterior_variance(sigma)

    def scale_latents(self, z: Tensor) -> Tensor:
        return self.inner.scale_latents(z)
