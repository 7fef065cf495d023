"""A model: a network with its noise levels, its prior and its inputs, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

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
    Prediction,
    PredictionType,
    Sigma,
    VectorJacobian,
    coefficient,
    per_sample,
)
from samplerbench.sampling.guidance import Guidance, guide
from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.process import Process
from samplerbench.sampling.view import Estimates

if TYPE_CHECKING:
    from samplerbench.models.latent import Autoencoder

Condition = Mapping[str, Tensor]
"""What a network is told besides the state: named tensors whose first dimension is the batch. Empty: nothing."""


@dataclass
class Model(ABC):
    """Base of all adapters from a checkpoint to the denoiser protocol.

    Attributes:
        network: the innermost module, where evaluations are counted.
        shape: (C, H, W) of the state.
        levels: (T,) float64 on the CPU, increasing: the noise levels.
        process: the forward process.
        device: where the network is.
        dtype: of the network's weights.
        classes: the number of labels, or of prompts of a text model; None without either.
        null: whether the model also predicts without label or prompt.
        clip: whether D is clamped to ±clip_range.
        clip_range: the limit of x₀.
        autoencoder: what decodes its states to images, for a latent model; else None.
        text: whether it is conditioned on prompts.
        learned_variance: whether its output has a learned variance.
        doubled: whether half of its output channels belong to a variance.
        preconditioning: how the network's input and output are scaled.
        classifier_folder: folder of the noise-conditional classifier that comes with it; empty without one.
        data: name of the data set it was trained on, where known.
        features: name of the feature space to measure it in, where known.
        class_counts: images of each class in that data, where known.
        draws: whether `real` draws from the distribution itself, so that the model can be its own reference.
        identity: what the protocol records of it.
        notes: what `samplerbench show` prints besides.
    """

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
    draws: bool = False
    identity: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @abstractmethod
    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The network's output (B, C, H, W) for its own input c_in x (B, C, H, W) at its own times (B,).

        The input has the state's dtype; a network of another one is given a converted copy.
        """

    def times(self, sigma: Sigma, x: Tensor) -> Tensor:
        """What the network gets as its time, (B,), for the level sigma of the states x."""
        if self.preconditioning.time is None:
            raise TypeError(f"{type(self).__name__} has no time of its own; define `times`")
        return torch.as_tensor(self.preconditioning.time(per_sample(sigma, x)), dtype=torch.float64, device=x.device)

    def evaluate(self, x: Tensor, sigma: Sigma, condition: Condition) -> Prediction:
        """The network's prediction, not clipped, for the state x = x₀ + σ z, (B, C, H, W)."""
        output = self.ask(self.preconditioning.input(x, sigma), self.times(sigma, x), condition).to(x.dtype)
        variance = None
        if self.doubled:
            output, fraction = output.chunk(2, dim=1)
            variance = (fraction + 1) / 2 if self.learned_variance else None
        return Prediction(self.preconditioning.denoised(output, x, sigma), variance)

    @property
    def prediction(self) -> PredictionType:
        """What the network predicts, of a variance-preserving model; "epsilon" of any other."""
        names: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
        return next((name for name in names if name == self.preconditioning.name), "epsilon")

    def inputs(self, index: Tensor, inputs: Inputs) -> Inputs:
        """The inputs of the samples `index`, completed by the model. By default, unchanged.

        A model that needs more than labels or prompts, such as an observation, adds it here (`Inputs.extended`) as a
        function of each sample's index.

        Args:
            index: (B,) int64 on the model's device, which samples.
            inputs: their labels or prompts.
        """
        return inputs

    def condition(self, inputs: Inputs) -> Condition:
        """What the network is given for the inputs of a batch."""
        # A label that only a classifier knows is no condition of the network.
        if inputs.labels is None or self.classes is None:
            return self.null_condition(inputs)
        return {"labels": inputs.labels}

    def null_condition(self, inputs: Inputs) -> Condition:
        """What the network is given without label and prompt. Inputs that are neither remain."""
        return {}

    def alpha(self, sigma: float) -> float:
        """α(σ): the scale of the model's own coordinates, y = α(σ) x."""
        return self.process.alpha(sigma)

    def prior(self, z: Tensor, sigma: float) -> Tensor:
        """The start of a run at level sigma from z ~ N(0, I): √(1+σ²) z for VP, σ z for VE, (1+σ) z for a flow."""
        return z * self.process.prior_scale(sigma)

    @property
    def state_dtype(self) -> torch.dtype:
        """The precision of the states: float64 for a float64 network, else float32."""
        return state_dtype(self.dtype)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, which for a model of latents is not the state's."""
        return self.shape if self.autoencoder is None else self.autoencoder.image_shape

    def decode(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] of states at σ = 0."""
        return x if self.autoencoder is None else self.autoencoder.decode(x)

    def encode(self, images: Tensor) -> Tensor:
        """States at σ = 0 of images (B, C, H, W) in [-1, 1]; of an autoencoder, the posterior's mode."""
        return images if self.autoencoder is None else self.autoencoder.encode(images)

    def own_classifier(self) -> LoadedClassifier | None:
        """The noise-conditional classifier that comes with the model; None without one.

        Raises:
            UserError: its folder cannot be loaded.
        """
        if not self.classifier_folder:
            return None
        from samplerbench.models.classifier_guide import load_classifier

        return load_classifier(self.classifier_folder, self)

    def own_image_classifier(self) -> LoadedClassifier | None:
        """The classifier of clean images that comes with the model; None without one."""
        return None

    def real(self, n: int) -> tuple[Tensor, Tensor | None]:
        """n real images as states, (n, C, H, W) float32, and their labels: of the data the model was trained on.

        Raises:
            UserError: the model does not say what that was, or it is not at hand.
        """
        if self.data is None:
            raise UserError("the model does not say what it was trained on, and this needs its data.")
        from samplerbench.data import load_data
        from samplerbench.data.pixels import dequantise

        data = load_data(self.data)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:n]
        return self.encode(dequantise(data.images[order])), None if data.labels is None else data.labels[order]

    def estimates(self, name: str, **settings: str | int | float) -> AbstractContextManager[Estimates]:
        """Numbers estimated from this model, kept in the user's cache under the hash of its weights.

        Args:
            name: of the quantity.
            settings: what the numbers depend on besides the weights and their precision.
        """
        from samplerbench.models.estimates import estimates

        # The same network sees other states through another autoencoder.
        of = {key: value for key, value in self.identity.items() if key in ("weights", "autoencoder weights")}
        return estimates(self.network, name, of | {"dtype": str(self.dtype), "format": 2} | settings)

    def check_inputs(self, inputs: Inputs) -> None:
        """Raise UserError where the labels or prompts are not ones the model knows, or it cannot do without."""
        chosen = inputs.chosen
        if chosen is None:
            if self.classes is not None and not self.null:
                raise UserError(
                    "the model is class-conditional and was trained without a null label; it cannot be sampled with "
                    f"{argument('labels', 'none')}. Use {argument('labels', 'balanced')}, or a label from 0 to "
                    f"{self.classes - 1}."
                )
            return
        known = self.classes
        if known is not None and len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < known:
            raise UserError(f"{argument('labels', int(chosen.max()))}: the model has the labels 0 to {known - 1}.")

    def denoiser(self, inputs: Inputs, guidance: Guidance | None = None) -> Denoiser:
        """The denoiser of one batch: bound to its inputs, guided, and clipped where the guidance's `clip` says.

        Args:
            inputs: of the batch, on the model's device.
            guidance: a guidance bound to this model (`bind_guidance`); None is the model's own D.
        """
        denoise = Bound(self, inputs)
        if guidance is None:
            return Clipped(denoise, self.clip_range) if self.clip else denoise
        if self.clip and guidance.clip == "before":
            return guide(guidance, ClippedConditional(denoise, self.clip_range))
        guided = guide(guidance, denoise)
        return Clipped(guided, self.clip_range) if self.clip else guided


class Bound(ConditionalDenoiser):
    """A model bound to the inputs of one batch."""

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
    """Raise UserError where the model or its inputs lack what a bound guidance needs."""
    if guidance is None:
        return
    name = f"guidance {guidance.label()}"
    if guidance.needs_unconditional and (model.classes is None or not model.null):
        raise UserError(
            f"{name} needs a class-conditional model that was also trained without labels (with label dropout); "
            f"this one {'has no classes' if model.classes is None else 'has no null label'}."
        )
    missing = (guidance.needs_condition and inputs.chosen is None) or (guidance.needs_labels and inputs.labels is None)
    if missing:
        raise UserError(
            f"{name} needs labels to steer towards, but there are none: use {argument('labels', 'balanced')} or a "
            "label."
        )
    if guidance.classes is not None and inputs.labels is not None and len(inputs):
        largest = int(inputs.labels.max())
        if largest >= guidance.classes:
            raise UserError(
                f"{argument('labels', largest)}: the classifier has the labels 0 to {guidance.classes - 1}."
            )


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of the states for a network of this precision: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class ModelSource(Configurable, ABC):
    """Base of model plugins: a name that makes a model, with parameters."""

    kind: ClassVar[str] = "model"

    @abstractmethod
    def load(self, device: torch.device, dtype: torch.dtype) -> Model:
        """The model on a device; `dtype` is the network's, the state is float32 (float64 for a float64 network)."""


__all__ = ["Bound", "Condition", "Model", "ModelSource", "check_guidance", "coefficient", "state_dtype"]
