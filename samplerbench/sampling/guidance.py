"""Guidance: a function denoiser → denoiser. A plugin; it composes with every sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from samplerbench.boundary import plugin_call, shown
from samplerbench.errors import RunError
from samplerbench.limits import MAX_INTEGER
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


def guide(guidance: Guidance, denoise: Denoiser) -> Denoiser:
    """`guidance.guide(denoise)`, checked.

    Raises:
        RunError: the plugin raised, or returned something else than a Denoiser.
    """
    with plugin_call(guidance, "in guide"):
        found = guidance.guide(denoise)
    if not isinstance(found, Denoiser):
        raise RunError(f"guidance {guidance.label()}: guide returned a {type(found).__name__}; it must be a Denoiser.")
    return found


def evaluations_of(guidance: Guidance | None) -> int:
    """Network evaluations per prediction, `guidance.evaluations` checked; 1 without a guidance.

    Raises:
        RunError: the plugin raised, or gave something else than a whole number of at least 1.
    """
    if guidance is None:
        return 1
    with plugin_call(guidance, "in evaluations"):
        found = guidance.evaluations
    if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= MAX_INTEGER:
        raise RunError(
            f"guidance {guidance.label()}: evaluations is {shown(found)}; it must be a whole number, at least 1 and "
            "below 2**63."
        )
    return found


class _Guided(Denoiser):
    def __init__(self, guidance: Guidance, inner: Denoiser) -> None:
        self.guidance, self.inner = guidance, inner
        self.levels, self.process, self.prediction = inner.levels, inner.process, inner.prediction

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        with plugin_call(self.guidance, "in predict"):
            found = self.guidance.predict(self.inner, x, sigma)
        if not isinstance(found, Prediction) or not isinstance(found.x0, Tensor) or found.x0.shape != x.shape:
            given = found.x0 if isinstance(found, Prediction) else found
            what = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"type {type(given).__name__}"
            raise RunError(
                f"guidance {self.guidance.label()}: predict returned a value of {what}; it must be a Prediction whose "
                f"x0 is a tensor of the batch's shape {tuple(x.shape)}."
            )
        return found

    def rows(self, index: Tensor) -> Denoiser:
        return _Guided(self.guidance, self.inner.rows(index))

    def posterior_variance(self, sigma: float) -> float:
        return self.inner.posterior_variance(sigma)

    def scale_latents(self, z: Tensor) -> Tensor:
        return self.inner.scale_latents(z)
