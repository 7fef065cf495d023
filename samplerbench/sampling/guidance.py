"""Guidance: a function denoiser → denoiser. A plugin; it composes with every sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from samplerbench.boundary import plugin_call, shown
from samplerbench.errors import RunError
from samplerbench.limits import MAX_INTEGER
from samplerbench.options import Configurable
from samplerbench.sampling.denoiser import ConditionalDenoiser, Denoiser, Prediction, Sigma
from samplerbench.sampling.view import ModelView


@dataclass(frozen=True)
class Guidance(Configurable, ABC):
    """Base of guidance plugins: one method, `predict`.

    What a guidance needs of a model is declared here. A model that lacks it is refused before anything runs.
    """

    kind: ClassVar[str] = "guidance"
    needs_condition: ClassVar[bool] = False
    """Whether each sample must have a label or a prompt."""
    needs_labels: ClassVar[bool] = False
    """Whether each sample must have a class label."""
    needs_unconditional: ClassVar[bool] = False
    """Whether the model must also predict without label or prompt."""
    differentiates: ClassVar[bool] = False
    """Whether `predict` computes gradients, so that a run cannot be captured as a CUDA graph."""
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

    def bind(self, model: ModelView) -> Guidance:
        """The guidance prepared for a model: with its classifier loaded, for example. By default, itself.

        Args:
            model: the model that will be guided.

        Returns:
            A copy made by `with_state`. The instance itself is shared between models and must not change.

        Raises:
            UserError: the model lacks what the guidance needs.
        """
        return self

    @property
    def classes(self) -> int | None:
        """The number of labels that a bound guidance knows, for a model without labels; None where it knows none."""
        return None

    @property
    def identity(self) -> dict[str, str]:
        """What the protocol records of a bound guidance besides its parameters, as the hash of a classifier."""
        return {}

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The networks of a bound guidance, whose forward and backward passes are counted beside the model's."""
        return ()

    @abstractmethod
    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        """The guided prediction.

        Args:
            denoise: the model: `conditional`, `unconditional`, `both`, `pullback`, and the `inputs` of the batch.
            x: (B, C, H, W), the state.
            sigma: its noise level.
        """

    def guide(self, denoise: ConditionalDenoiser) -> Denoiser:
        """The guided denoiser."""
        return _Guided(self, denoise)


def guide(guidance: Guidance, denoise: ConditionalDenoiser) -> Denoiser:
    """`guidance.guide(denoise)`, checked.

    Raises:
        RunError: the plugin raised, or returned something else than a Denoiser.
    """
    with plugin_call(guidance, "in guide"):
        found = guidance.guide(denoise)
    if not isinstance(found, Denoiser):
        raise RunError(f"guidance {guidance.label()}: guide returned a {type(found).__name__}; it must be a Denoiser.")
    return found


def bind_guidance(guidance: Guidance | None, model: ModelView) -> Guidance | None:
    """`guidance.bind(model)`, checked; None for None.

    Raises:
        UserError: the model lacks what the guidance needs.
        RunError: the plugin raised, or returned something else than a guidance of the same spec.
    """
    if guidance is None or getattr(guidance, "bound_to", None) is model:
        return guidance
    with plugin_call(guidance, "in bind"):
        bound = guidance.bind(model)
    if not isinstance(bound, Guidance) or bound != guidance:
        raise RunError(
            f"guidance {guidance.label()}: bind returned {shown(bound)}; it must be a guidance with the same "
            "parameters."
        )
    return bound.with_state(bound_to=model)


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
    def __init__(self, guidance: Guidance, inner: ConditionalDenoiser) -> None:
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
