"""The model interface: a network with its noise levels, prior and inputs."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from samplerbench.errors import UserError, argument
from samplerbench.models.classifier import LoadedClassifier
from samplerbench.models.preconditioning import DENOISED, Preconditioning
from samplerbench.options import Configurable
from samplerbench.sampling.denoiser import (
    Clipped,
    ClippedConditional,
    ConditionalDenoiser,
    Denoiser,
    ObservedDenoiser,
    Prediction,
    PredictionType,
    Sigma,
    VectorJacobian,
    coefficient,
    per_sample,
)
from samplerbench.sampling.flow import FlowSchedule
from samplerbench.sampling.guidance import Guidance, guide
from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.process import Process
from samplerbench.sampling.task import Observation, Task, operator_of
from samplerbench.sampling.view import Estimates
from samplerbench.text import printable
from samplerbench.untrusted import shorten

if TYPE_CHECKING:
    from samplerbench.models.latent import Autoencoder

Condition = Mapping[str, Tensor]
"""Named condition tensors of a network. Their first dimension is the batch. Empty for no condition."""


@dataclass
class Model(ABC):
    """Base class of the adapters from a checkpoint to the denoiser interface.

    Attributes:
        network: innermost module. Its evaluations are counted.
        shape: shape (C, H, W) of the state.
        levels: noise levels, (T,) float64 on the CPU, increasing.
        process: forward process.
        device: device of the network.
        dtype: dtype of the network's weights.
        classes: number of labels, or of prompts for a text-to-image model. None without labels and prompts.
        null: whether the model supports unconditional prediction.
        clip: whether to clamp D to ±clip_range.
        clip_range: maximum absolute value of x₀.
        autoencoder: autoencoder of a latent model. None for a pixel-space model.
        text: whether the model is conditioned on prompts.
        learned_variance: whether the output contains a learned variance.
        doubled: whether the second half of the output channels is a variance.
        preconditioning: scalings of the network's input and output.
        classifier_folder: folder of the included noise-conditional classifier. Empty if there is none.
        data: name of the training data set. None if unknown.
        features: name of the default feature space for metrics. None if unknown.
        class_counts: number of training images per class. None if unknown.
        class_names: name of each class, "" for a class without a name. Several names of one class are separated by
            commas, as in "tench, Tinca tinca". Empty if unknown.
        default_n: number of images per block where none is set. None: the number of real images.
        flow: time steps of a rectified flow. None for other processes.
        spacing: default spacing for samplers that do not keep their own. None: the default of the sampler.
        rows_per_evaluation: network evaluations (rows) per image and evaluation of D without a guidance plugin. Above 1
            for a pipeline with a guidance of its own.
        observation: observations of an inverse problem, which `inputs` adds. None without a task.
        draws: whether `real` draws from the exact distribution, so that the model can be its own reference.
        identity: protocol fields of the model.
        notes: additional lines for `samplerbench show`.
    """

    by_own_call: ClassVar[bool] = False
    """Whether a pipeline of diffusers makes the images by its own call (`diffusers/pipeline_model.py`), so that there
    is no denoiser."""

    network: nn.Module
    shape: tuple[int, int, int]
    levels: Tensor
    process: Process
    device: torch.device
    dtype: torch.dtype
    classes: int | None = None
    null: bool = False
    clip: bool = False
    clip_range: float = 1.0
    autoencoder: Autoencoder | None = None
    text: bool = False
    learned_variance: bool = False
    doubled: bool = False
    preconditioning: Preconditioning = DENOISED
    classifier_folder: str = ""
    data: str | None = None
    features: str | None = None
    class_counts: list[int] | None = None
    class_names: tuple[str, ...] = ()
    default_n: int | None = None
    flow: FlowSchedule | None = None
    spacing: str | None = None
    rows_per_evaluation: int = 1
    draws: bool = False
    observation: Observation | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # `@dataclass` writes a __repr__ with every weight of the network, unless the class has one already.
        cls.__repr__ = cls.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        """Describe the model in five lines: source, state, noise levels, conditions and data."""
        size = sum(p.numel() for p in self.network.parameters())
        precision = str(self.dtype).removeprefix("torch.")
        latent = "" if self.autoencoder is None else f", decoded to images {tuple(self.image_shape)}"
        least, most = float(self.levels.min()), float(self.levels.max())
        condition = "none"
        if self.classes is not None:
            known = f"{self.classes} {'prompts' if self.text else 'labels'}"
            condition = f"{known}, {'with' if self.null else 'without'} an unconditional prediction"
        lines = [
            f"{type(self).__name__}: {self.identity.get('source', 'unknown source')}, {size:,} parameters",
            f"  state: {tuple(self.shape)}, {precision} on {self.device}{latent}",
            f"  noise levels: {len(self.levels):,}, σ from {least:.4g} to {most:.4g}, {self.process.name}",
            f"  conditions: {condition}",
            f"  training data: {self.data or 'unknown'}; feature space: {self.features or 'unknown'}",
        ]
        return "\n".join(shorten(printable(line), 120) for line in lines)

    @abstractmethod
    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Evaluate the network.

        Args:
            x: scaled input c_in x, (B, C, H, W), in the dtype of the state. Convert it to the dtype of the network if
                they differ.
            time: time input of the network, (B,).
            condition: condition tensors.

        Returns:
            The output of the network, (B, C, H, W).
        """

    def times(self, sigma: Sigma, x: Tensor) -> Tensor:
        """Compute the time input of the network.

        Args:
            sigma: noise level of x.
            x: noisy states, (B, C, H, W).

        Returns:
            Times, (B,).
        """
        if self.preconditioning.time is None:
            raise TypeError(f"the preconditioning of {type(self).__name__} defines no time; override `times`")
        return torch.as_tensor(self.preconditioning.time(per_sample(sigma, x)), dtype=torch.float64, device=x.device)

    def evaluate(self, x: Tensor, sigma: Sigma, condition: Condition) -> Prediction:
        """Compute the prediction, without clipping.

        Args:
            x: noisy states x₀ + σ z, (B, C, H, W).
            sigma: noise level of x.
            condition: condition tensors of the network.
        """
        output = self.ask(self.preconditioning.input(x, sigma), self.times(sigma, x), condition).to(x.dtype)
        variance = None
        if self.doubled:
            output, fraction = output.chunk(2, dim=1)
            variance = (fraction + 1) / 2 if self.learned_variance else None
        return Prediction(self.preconditioning.denoised(output, x, sigma), variance)

    @property
    def prediction(self) -> PredictionType:
        """The prediction type of a variance-preserving model. "epsilon" for other models."""
        names: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
        return next((name for name in names if name == self.preconditioning.name), "epsilon")

    def inputs(self, index: Tensor, inputs: Inputs) -> Inputs:
        """Add model-specific inputs, such as an observation, with `Inputs.extended`.

        The inputs of a sample must be a function of its index. By default, this adds those of a task
        (`Observation.extend`), and nothing without a task.

        Args:
            index: sample indices, (B,) int64 on the device of the model.
            inputs: labels or prompts of the samples.
        """
        return inputs if self.observation is None else self.observation.extend(index, inputs)

    @property
    def adds_inputs(self) -> bool:
        """Whether `inputs` adds something."""
        return self.observation is not None or type(self).inputs is not Model.inputs

    def observed(self, task: Task, images: Tensor, seed: int = 0) -> Self:
        """Return a copy whose samples have observations of a task.

        The copy shares the network.

        Args:
            task: the task.
            images: real images, (N, *shape). Sample i observes image i mod N.
            seed: seed of the noise.

        Raises:
            UserError: if the model is not in pixel space, has inputs of its own, or does not fit the task.
            RunError: if the plugin fails.
        """
        if self.autoencoder is not None or self.by_own_call:
            raise UserError(f"{argument('task', task.spec)}: tasks require a model in pixel space.")
        if type(self).inputs is not Model.inputs:
            raise UserError(f"{argument('task', task.spec)}: this model defines its own observations.")
        operator = operator_of(task, self.shape)
        made = copy.copy(self)
        made.observation = Observation(task, operator, images.to(self.device, self.state_dtype), seed)
        return made

    def condition(self, inputs: Inputs) -> Condition:
        """Return the condition tensors for the inputs of a batch."""
        # For a model without labels, the labels are used only by a classifier.
        if inputs.labels is None or self.classes is None:
            return self.null_condition(inputs)
        return {"labels": inputs.labels}

    def null_condition(self, inputs: Inputs) -> Condition:
        """Return the condition tensors without label and prompt. Other inputs are kept."""
        return {}

    def encode_prompts(self, inputs: Inputs, unconditional: bool = False) -> Tensor | None:
        """Encode the prompts of a batch again, to measure the time of the text encoder.

        Sampling uses the embeddings that were computed when the model was loaded.

        Args:
            inputs: prompts of the batch, B rows.
            unconditional: whether to encode the negative prompt too.

        Returns:
            Embeddings of the B prompts, followed by that of the negative prompt. None for a model without text encoder.
        """
        return None

    def alpha(self, sigma: float) -> float:
        """The scale α(σ) of the network's coordinates, y = α(σ) x."""
        return self.process.alpha(sigma)

    def prior(self, z: Tensor, sigma: float) -> Tensor:
        """Compute the initial state: √(1+σ²) z for VP, σ z for VE, (1+σ) z for a rectified flow.

        Args:
            z: noise z ~ N(0, I), (B, *shape).
            sigma: initial noise level.
        """
        return z * self.process.prior_scale(sigma)

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of the states: float64 for a float64 network, otherwise float32."""
        return state_dtype(self.dtype)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the images. For a latent model it differs from the shape of the state."""
        return self.shape if self.autoencoder is None else self.autoencoder.image_shape

    def decode(self, x: Tensor) -> Tensor:
        """Decode states at σ = 0, (B, *shape), to images in [-1, 1], (B, C, H, W)."""
        return x if self.autoencoder is None else self.autoencoder.decode(x)

    def encode(self, images: Tensor) -> Tensor:
        """Encode images in [-1, 1], (B, C, H, W), to states at σ = 0. An autoencoder uses the posterior mode."""
        return images if self.autoencoder is None else self.autoencoder.encode(images)

    def own_classifier(self) -> LoadedClassifier | None:
        """Load the noise-conditional classifier included with the model. Return None if there is none.

        Raises:
            UserError: if its folder cannot be loaded.
        """
        if not self.classifier_folder:
            return None
        from samplerbench.models.classifier_guide import load_classifier

        return load_classifier(self.classifier_folder, self)

    def own_image_classifier(self) -> LoadedClassifier | None:
        """Load the classifier of clean images included with the model. Return None if there is none."""
        return None

    def real(self, n: int) -> tuple[Tensor, Tensor | None]:
        """Return training images as states.

        Args:
            n: number of images.

        Returns:
            States, (n, C, H, W) float32, and labels, (n,) or None.

        Raises:
            UserError: if the training data is unknown or not available.
        """
        if self.data is None:
            raise UserError("the training data of the model is required, but it is unknown.")
        from samplerbench.data import load_data
        from samplerbench.data.pixels import dequantise

        data = load_data(self.data)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:n]
        return self.encode(dequantise(data.images[order])), None if data.labels is None else data.labels[order]

    def estimates(self, name: str, **settings: str | int | float) -> AbstractContextManager[Estimates]:
        """Open cached estimates of a quantity for this model, as a context manager. The key includes the weights' hash.

        Args:
            name: name of the quantity.
            settings: other settings that the values depend on, besides the weights and their precision.
        """
        from samplerbench.models.estimates import estimates

        # The distribution of the states also depends on the autoencoder.
        of = {key: value for key, value in self.identity.items() if key in ("weights", "autoencoder weights")}
        return estimates(self.network, name, of | {"dtype": str(self.dtype), "format": 2} | settings)

    def check_inputs(self, inputs: Inputs) -> None:
        """Check the labels or prompts of a batch.

        Args:
            inputs: inputs of the batch.

        Raises:
            UserError: if they are out of range, or missing for a model without unconditional prediction.
        """
        chosen = inputs.chosen
        if chosen is None:
            if self.classes is not None and not self.null:
                raise UserError(
                    "the model is class-conditional and has no unconditional prediction; it does not support "
                    f"{argument('labels', 'none')}. Use {argument('labels', 'balanced')}, or a label from 0 to "
                    f"{self.classes - 1}."
                )
            return
        known = self.classes
        if known is not None and len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < known:
            raise UserError(f"{argument('labels', int(chosen.max()))}: the model has the labels 0 to {known - 1}.")

    def denoiser(self, inputs: Inputs, guidance: Guidance | None = None) -> Denoiser:
        """Create the denoiser of one batch, with guidance and clipping, and with the observations of the batch.

        Args:
            inputs: inputs of the batch, on the device of the model.
            guidance: guidance bound to this model by `bind_guidance`. None for no guidance. Its `clip` determines when
                to clip.
        """
        denoise = self._guided(inputs, guidance)
        y = inputs.tensors.get("observation")
        return denoise if y is None else ObservedDenoiser(denoise, y)

    def _guided(self, inputs: Inputs, guidance: Guidance | None) -> Denoiser:
        """The denoiser with guidance and clipping."""
        denoise = Bound(self, inputs)
        if guidance is None:
            return Clipped(denoise, self.clip_range) if self.clip else denoise
        if self.clip and guidance.clip == "before":
            return guide(guidance, ClippedConditional(denoise, self.clip_range))
        guided = guide(guidance, denoise)
        return Clipped(guided, self.clip_range) if self.clip else guided


class Bound(ConditionalDenoiser):
    """The denoiser of a model for the inputs of one batch.

    Args:
        model: the model.
        inputs: inputs of the batch.
        condition: condition tensors of the network. If None, they are computed from the inputs.
    """

    def __init__(self, model: Model, inputs: Inputs, condition: Condition | None = None) -> None:
        self.model, self.inputs = model, inputs
        self.levels, self.process, self.prediction = model.levels, model.process, model.prediction
        self.given = model.condition(inputs) if condition is None else condition

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        return self.model.evaluate(x, sigma, self.given)

    conditional = predict

    def unconditional(self, x: Tensor, sigma: Sigma) -> Prediction:
        return self.model.evaluate(x, sigma, self.model.null_condition(self.inputs))

    def both(self, x: Tensor, sigma: Sigma) -> tuple[Prediction, Prediction]:
        null = self.model.null_condition(self.inputs)
        joint = {key: torch.cat([null[key], value]) for key, value in self.given.items()}
        doubled = torch.cat([sigma, sigma]) if isinstance(sigma, Tensor) and sigma.ndim else sigma
        out = self.model.evaluate(torch.cat([x, x]), doubled, joint)
        parts = zip(out.x0.chunk(2), out.variance.chunk(2) if out.variance is not None else (None, None), strict=True)
        first, second = (Prediction(x0, variance) for x0, variance in parts)
        return first, second

    def pullback(self, x: Tensor, sigma: Sigma, *, conditional: bool = True) -> tuple[Prediction, VectorJacobian]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            found = (self.conditional if conditional else self.unconditional)(leaf, sigma)

        def multiply(v: Tensor, *, retain_graph: bool = False) -> Tensor:
            (product,) = torch.autograd.grad(found.x0, leaf, v, retain_graph=retain_graph)
            return product

        variance = None if found.variance is None else found.variance.detach()
        return Prediction(found.x0.detach(), variance), multiply

    def rows(self, index: Tensor) -> ConditionalDenoiser:
        part = {key: value[index] for key, value in self.given.items()}
        return Bound(self.model, self.inputs.rows(index), part)


def check_guidance(model: Model, guidance: Guidance | None, inputs: Inputs) -> None:
    """Check the requirements of a guidance.

    Args:
        model: model to guide.
        guidance: guidance bound to the model. None for no guidance.
        inputs: inputs of the batch.

    Raises:
        UserError: if the model or its inputs do not meet the requirements.
    """
    if guidance is None:
        return
    name = f"guidance {guidance.label()}"
    if guidance.needs_unconditional and (model.classes is None or not model.null):
        raise UserError(
            f"{name} requires a class-conditional model with an unconditional prediction (trained with label dropout); "
            f"this model {'has no classes' if model.classes is None else 'has no null label'}."
        )
    missing = (guidance.needs_condition and inputs.chosen is None) or (guidance.needs_labels and inputs.labels is None)
    if missing:
        raise UserError(f"{name} requires labels, but there are none: use {argument('labels', 'balanced')} or a label.")
    if guidance.classes is not None and inputs.labels is not None and len(inputs):
        largest = int(inputs.labels.max())
        if largest >= guidance.classes:
            raise UserError(
                f"{argument('labels', largest)}: the classifier has the labels 0 to {guidance.classes - 1}."
            )


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the states for a network dtype: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class ModelSource(Configurable, ABC):
    """Base class of model plugins. The fields are its parameters, and `load` creates the model."""

    kind: ClassVar[str] = "model"

    @abstractmethod
    def load(self, device: torch.device, dtype: torch.dtype) -> Model:
        """Load the model.

        Args:
            device: device of the network.
            dtype: dtype of the network. The state is float64 for a float64 network, otherwise float32.
        """


__all__ = ["Bound", "Condition", "Model", "ModelSource", "check_guidance", "coefficient", "state_dtype"]
