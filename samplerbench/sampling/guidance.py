"""Guidance: plugins that map a denoiser to a guided denoiser. They work with every sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from samplerbench.boundary import plugin_call, shown
from samplerbench.errors import RunError, UserError, argument
from samplerbench.limits import MAX_INTEGER
from samplerbench.registry import parse
from samplerbench.sampling.bound import Bindable
from samplerbench.sampling.denoiser import ConditionalDenoiser, Denoiser, Prediction, Sigma
from samplerbench.sampling.task import Regime
from samplerbench.sampling.view import ModelView


@dataclass(frozen=True)
class Guidance(Bindable, ABC):
    """Base class of guidance plugins. A subclass implements `predict`.

    The class attributes declare the requirements on the model. They are checked before sampling starts.
    """

    kind: ClassVar[str] = "guidance"
    needs_condition: ClassVar[bool] = False
    """Whether each sample requires a label or a prompt."""
    needs_labels: ClassVar[bool] = False
    """Whether each sample requires a class label."""
    needs_unconditional: ClassVar[bool] = False
    """Whether the model must support unconditional prediction."""
    needs_task: ClassVar[bool] = False
    """Whether the model must have a task (`ModelView.observation`)."""
    differentiates: ClassVar[bool] = False
    """Whether `predict` computes gradients. If so, CUDA graphs are not available."""
    bayes: ClassVar[bool] = True
    """Whether scale 1 gives the conditional model by Bayes' rule, for an exact model and an exact classifier."""

    @property
    def clip(self) -> Literal["after", "before"]:
        """When to clip, for a model that clips x₀: the guided x₀ ("after") or the input predictions ("before").

        A plugin can define it as a parameter: `clip: Literal["after", "before"] = option("after", "...")`.
        """
        return "after"

    @property
    def evaluations(self) -> int:
        """Planned network evaluations per prediction, for NFE budgets: the maximum over the noise levels.

        Reported NFE are measured.
        """
        return 1

    @staticmethod
    def from_spec(spec: str) -> Guidance:
        """Create a guidance from its spec, for a guidance that contains another one.

        Args:
            spec: spec of a guidance, for example `cfg:scale=3`.

        Raises:
            UserError: an unknown name or parameter, or an invalid value.
        """
        guidance: Guidance = parse("guidance", spec)
        return guidance

    def bind(self, model: ModelView) -> Guidance:
        """Prepare the guidance for a model, for example load a classifier. By default, return the instance itself.

        Args:
            model: model to guide.

        Returns:
            A copy made by `with_state`. Do not modify the instance itself, because models share it.

        Raises:
            UserError: if the model does not meet the requirements of the guidance.
        """
        return self

    def posterior_regime(self) -> Regime | None:
        """Where the prediction is E[x₀ | x, y], for a guidance that needs a task.

        By default, None: there is no claim. `samplerbench check` tests a claim.
        """
        return None

    @property
    def classes(self) -> int | None:
        """The number of classes of a bound guidance, for a model without labels. None if it has no classes."""
        return None

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The networks of a bound guidance. Their forward and backward passes are counted."""
        return ()

    @abstractmethod
    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        """Return the guided prediction.

        Args:
            denoise: denoiser of the model, with `conditional`, `unconditional`, `both`, `pullback` and the `inputs`
                of the batch.
            x: noisy state, (B, C, H, W).
            sigma: noise level of x.
        """

    def guide(self, denoise: ConditionalDenoiser) -> Denoiser:
        """Return the guided denoiser of one run of a sampler.

        A guidance with a state per trajectory, such as a momentum, overrides this method and keeps the state in the
        returned denoiser: it is called once for each batch and each solution of it.

        Args:
            denoise: denoiser of the model for the batch.
        """
        return _Guided(self, denoise)


def guide(guidance: Guidance, denoise: ConditionalDenoiser) -> Denoiser:
    """Call `guidance.guide(denoise)` and check the result.

    Raises:
        RunError: if the plugin raises an error, or does not return a Denoiser.
    """
    with plugin_call(guidance, "in guide"):
        found = guidance.guide(denoise)
    if not isinstance(found, Denoiser):
        raise RunError(f"guidance {guidance.label()}: guide returned a {type(found).__name__}; it must be a Denoiser.")
    return found


def bind_guidance(guidance: Guidance | None, model: ModelView) -> Guidance | None:
    """Call `guidance.bind(model)` and check the result. If guidance is None, return None.

    Raises:
        UserError: if the model does not meet the requirements of the guidance.
        RunError: if the plugin raises an error, or does not return a guidance with the same parameters.
    """
    if guidance is None or guidance.bound_to is model:
        return guidance
    if guidance.needs_task and model.observation is None:
        raise UserError(f"guidance {guidance.label()} requires a task, such as {argument('task', 'inpaint')}.")
    with plugin_call(guidance, "in bind"):
        bound = guidance.bind(model)
    name = f"guidance {guidance.label()}"
    if not isinstance(bound, Guidance) or bound != guidance:
        raise RunError(f"{name}: bind returned {shown(bound)}; it must be a guidance with the same parameters.")
    with plugin_call(guidance, "in classes"):
        classes = bound.classes
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 1):
        raise RunError(f"{name}: classes is {shown(classes)}; it must be a positive integer or None.")
    with plugin_call(guidance, "in networks"):
        networks = bound.networks
    if not isinstance(networks, tuple | list) or not all(isinstance(network, nn.Module) for network in networks):
        raise RunError(f"{name}: networks is {shown(networks)}; it must be a tuple of torch.nn.Module.")
    return bound.bound_with(model)


def evaluations_of(guidance: Guidance | None) -> int:
    """Return `guidance.evaluations` after a check; 1 without guidance.

    Raises:
        RunError: if the plugin raises an error, or does not return a positive integer.
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
