"""A model: a network with its noise levels, its prior and its labels, met through one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
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
    Denoiser,
    Prediction,
    PredictionType,
    Sigma,
    coefficient,
    per_sample,
)
from samplerbench.sampling.guidance import Guidance, guide
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.process import Process
from samplerbench.sampling.sampler import Sampler

if TYPE_CHECKING:
    from samplerbench.models.latent import Autoencoder

Condition = Mapping[str, Tensor]
"""What a network is told besides the state: named tensors whose first dimension is the batch. Empty: nothing."""


@dataclass
class Model(ABC):
    """Base of all adapters from a checkpoint to the denoiser protocol.

    network: the innermost module, where evaluations are counted. shape: (C, H, W) of the state. classes: number of
    labels, or None. null: whether it can be asked without a label. clip: whether D is clamped to ±clip_range.
    process: the forward process. preconditioning: what the
    network's input and output are. doubled: whether half of its output channels are about the variance.
    autoencoder: what makes images of its states, where those are latents. text: whether its labels are prompts.
    default_classifier: folder of the classifier that comes with it. data, features: names of the data set it was
    trained on and of the feature space to measure it in, where known. class_counts: images of each class in that
    data. draws: whether `real` draws from the distribution itself, so that it can be its own reference.
    precision: in which the network multiplies, as `dtype` says it. compiled: whether the network is. graphs: whether
    whole batches are replayed as CUDA graphs. identity: what the protocol says of it. notes: what `show` says besides.
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
    default_classifier: str = ""
    data: str | None = None
    features: str | None = None
    class_counts: list[int] | None = None
    draws: bool = False
    precision: str = ""
    compiled: bool = False
    graphs: bool = False
    identity: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    replays: dict[Any, Any] = field(default_factory=dict, repr=False)
    """The captured run of the cell at work, kept by `samplerbench.bench.generate`."""
    _classifiers: dict[str, LoadedClassifier] = field(default_factory=dict, repr=False)
    _image_classifiers: dict[str, LoadedClassifier] = field(default_factory=dict, repr=False)
    _variances: dict[float, float] = field(default_factory=dict, repr=False)

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

    def condition(self, labels: Tensor | None) -> Condition:
        """What the network is told for these labels (B,) int64; None: no label."""
        if labels is None:
            return {}
        return {"labels": labels}

    def null_condition(self, batch: int) -> Condition:
        """What the network is told when it is asked without labels."""
        return {}

    def prior(self, z: Tensor, sigma: float) -> Tensor:
        """The start of a run at level sigma from z ~ N(0, I): √(1+σ²) z for VP, σ z for VE, (1+σ) z for a flow."""
        return z * self.process.prior_scale(sigma)

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

    def scale_latents(self, z: Tensor) -> Tensor:
        """States of the autoencoder's own latents z, both (B, *shape): (z - shift)·scale.

        Raises:
            UserError: the model has no autoencoder.
        """
        if self.autoencoder is None:
            raise UserError("the model is one of pixels: it has no autoencoder.")
        return (z - self.autoencoder.shift) * self.autoencoder.scale

    def classifier(self, weights: str = "") -> LoadedClassifier:
        """The classifier in the folder `weights`, or the one that comes with the model; loaded once.

        Raises:
            UserError: there is none, or it is of other images or classes.
        """
        weights = weights or self.default_classifier
        if not weights:
            raise UserError(
                "the model comes without a classifier; name one with weights=FOLDER in the guidance's spec."
            )
        if weights not in self._classifiers:
            from samplerbench.models.classifier_guide import load_classifier

            self._classifiers[weights] = load_classifier(weights, self)
        return self._classifiers[weights]

    def image_classifier(self, weights: str = "") -> LoadedClassifier:
        """The transformers classifier of clean images in the folder `weights`; loaded once.

        Raises:
            UserError: there is none, or it is of other images or classes.
        """
        if not weights:
            raise UserError("guidance by an image classifier needs its folder: name it with weights=FOLDER.")
        if weights not in self._image_classifiers:
            from samplerbench.models.image_classifier import load_image_classifier

            self._image_classifiers[weights] = load_image_classifier(weights, self)
        return self._image_classifiers[weights]

    def guide_classifier(self, guidance: Guidance) -> LoadedClassifier | None:
        """The classifier that a guidance needs; None where it needs none. Raises UserError."""
        weights = str(guidance.parameters.get("weights", ""))
        if "classifier" in guidance.needs:
            return self.classifier(weights)
        if "image classifier" in guidance.needs:
            return self.image_classifier(weights)
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

    def posterior_variance(self, sigma: float) -> float:
        """κ(σ), estimated by `estimate_posterior_variances` before."""
        return self._variances[sigma]

    def estimate_posterior_variances(self, sigmas: Tensor, images: int = 1000) -> None:
        """Estimate κ(σ) = E‖x₀ - D(x, σ)‖²/d at the levels that are not known yet, from noised real images.

        The figures are kept in the user's cache, under the hash of the weights. These evaluations are no sampling,
        so call it outside the meter.
        """
        from samplerbench.cache import cached_json

        # The same network sees other states through another autoencoder.
        of = {key: value for key, value in self.identity.items() if key in ("weights", "autoencoder weights")}
        identity = of | {"dtype": str(self.dtype), "images": images}
        with cached_json("posterior-variance", identity) as known:
            wanted = [s for s in sigmas.tolist() if s > 0 and s not in self._variances]
            missing = [s for s in wanted if repr(s) not in known]
            if missing:
                x0, labels = self.real(images)
                known |= {repr(s): self._denoising_error(s, x0, labels) for s in missing}
            self._variances |= {s: known[repr(s)] for s in wanted}

    @torch.no_grad()
    def _denoising_error(self, sigma: float, x0: Tensor, labels: Tensor | None) -> float:
        total = 0.0
        for first in range(0, len(x0), 250):
            part = x0[first : first + 250].to(self.device)
            index = torch.arange(first, first + len(part), device=self.device)
            z = normal(0, Purpose.ESTIMATE, index, 0, self.shape).to(part.dtype)
            given = labels[first : first + 250].to(self.device) if labels is not None and self.classes else None
            denoised = self.denoiser(given, len(part))(part + sigma * z, sigma)
            total += float((part - denoised).double().square().sum())
        return total / x0.numel()

    @property
    def classifiers(self) -> list[nn.Module]:
        """The classifiers loaded so far: what the meter counts beside the network."""
        return [c.module for c in (*self._classifiers.values(), *self._image_classifiers.values())]

    def check_labels(self, labels: Tensor | None) -> None:
        """Raise UserError where the labels are not ones the model knows, or it cannot do without."""
        if labels is None:
            if self.classes is not None and not self.null:
                raise UserError(
                    "the model is class-conditional and was trained without a null label; it cannot be sampled with "
                    f"{argument('labels', 'none')}. Use {argument('labels', 'balanced')}, or a label from 0 to "
                    f"{self.classes - 1}."
                )
            return
        known = self.classes
        if known is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < known:
            raise UserError(f"{argument('labels', int(labels.max()))}: the model has the labels 0 to {known - 1}.")

    def denoiser(self, labels: Tensor | None, batch: int, guidance: Guidance | None = None) -> Denoiser:
        """The denoiser of one batch: bound to its labels, guided, and clipped where the guidance's `clip` says."""
        denoise: Denoiser = Bound(self, labels, batch)
        if guidance is None:
            return Clipped(denoise, self.clip_range) if self.clip else denoise
        if self.clip and guidance.clip == "before":
            return guide(guidance, Clipped(denoise, self.clip_range))
        guided = guide(guidance, denoise)
        return Clipped(guided, self.clip_range) if self.clip else guided


class Bound(Denoiser):
    """A model bound to the labels of one batch."""

    def __init__(self, model: Model, labels: Tensor | None, batch: int) -> None:
        self.model, self.labels, self.batch = model, labels, batch
        self.levels, self.process, self.prediction = model.levels, model.process, model.prediction
        # A label that only a classifier knows is no condition of the network.
        self.given = model.condition(labels if model.classes is not None else None)
        if labels is None:
            self.given = model.null_condition(batch)

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        return self.model.evaluate(x, sigma, self.given)

    conditional = predict

    def unconditional(self, x: Tensor, sigma: Sigma) -> Prediction:
        return self.model.evaluate(x, sigma, self.model.null_condition(len(x)))

    def both(self, x: Tensor, sigma: Sigma) -> tuple[Prediction, Prediction]:
        null = self.model.null_condition(len(x))
        joint = {key: torch.cat([null[key], value]) for key, value in self.given.items()}
        doubled = torch.cat([sigma, sigma]) if isinstance(sigma, Tensor) and sigma.ndim else sigma
        out = self.model.evaluate(torch.cat([x, x]), doubled, joint)
        parts = zip(out.x0.chunk(2), out.variance.chunk(2) if out.variance is not None else (None, None), strict=True)
        first, second = (Prediction(x0, variance) for x0, variance in parts)
        return first, second

    def classifier_score(self, x: Tensor, sigma: Sigma, weights: str = "") -> Tensor:
        if self.labels is None:
            raise UserError(
                f"classifier guidance needs labels to steer towards: use {argument('labels', 'balanced')} or a label."
            )
        classifier = self.model.classifier(weights)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            log_p = classifier.logits(leaf, per_sample(sigma, x)).log_softmax(dim=1)
            chosen = log_p[torch.arange(len(x), device=x.device), self.labels].sum()
            (score,) = torch.autograd.grad(chosen, leaf)
        return score

    def denoised_score(
        self, x: Tensor, sigma: Sigma, conditional: bool = False, weights: str = ""
    ) -> tuple[Prediction, Tensor]:
        if self.labels is None:
            raise UserError(
                f"classifier guidance needs labels to steer towards: use {argument('labels', 'balanced')} or a label."
            )
        classifier = self.model.image_classifier(weights)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            base = (self.conditional if conditional else self.unconditional)(leaf, sigma)
            log_p = classifier.logits(self.model.decode(base.x0), per_sample(0.0, x)).log_softmax(dim=1)
            chosen = log_p[torch.arange(len(x), device=x.device), self.labels].sum()
            (score,) = torch.autograd.grad(chosen, leaf)
        variance = None if base.variance is None else base.variance.detach()
        return Prediction(base.x0.detach(), variance), score

    def posterior_variance(self, sigma: float) -> float:
        return self.model.posterior_variance(sigma)

    def scale_latents(self, z: Tensor) -> Tensor:
        return self.model.scale_latents(z)

    def rows(self, index: Tensor) -> Denoiser:
        part = Bound(self.model, None if self.labels is None else self.labels[index], len(index))
        part.given = {key: value[index] for key, value in self.given.items()}
        return part


def check_sampler(model: Model, sampler: Sampler) -> None:
    """Raise UserError where the model lacks what the sampler needs."""
    if "autoencoder" in sampler.needs and model.autoencoder is None:
        raise UserError(
            f"sampler {sampler.label()} draws from an autoencoder's prior, and this model is one of pixels; name a "
            f"latent model with {argument('model')}, or leave the sampler out."
        )


def check_guidance(model: Model, guidance: Guidance | None, labels: Tensor | None) -> None:
    """Raise UserError where the model lacks what the guidance needs."""
    if guidance is None:
        return
    name = f"guidance {guidance.label()}"
    if "null" in guidance.needs and (model.classes is None or not model.null):
        raise UserError(
            f"{name} needs a class-conditional model that was also trained without labels (with label dropout); "
            f"this one {'has no classes' if model.classes is None else 'has no null label'}."
        )
    if "labels" in guidance.needs and labels is None:
        raise UserError(
            f"{name} needs labels to steer towards, but there are none: use {argument('labels', 'balanced')} or a "
            "label."
        )
    if guidance.needs & {"classifier", "image classifier"}:
        if model.classes is not None and not model.null and not guidance.parameters.get("conditional", False):
            raise UserError(
                f"{name} guides the model without labels, and this one cannot do without; use conditional=true."
            )
        loaded = model.guide_classifier(guidance)
        if loaded is not None and labels is not None and int(labels.max()) >= loaded.classes:
            raise UserError(
                f"{argument('labels', int(labels.max()))}: the classifier has the labels 0 to {loaded.classes - 1}."
            )


@dataclass(frozen=True)
class ModelSource(Configurable, ABC):
    """Base of model plugins: a name that makes a model, with parameters."""

    kind: ClassVar[str] = "model"

    @abstractmethod
    def load(self, device: torch.device, dtype: torch.dtype) -> Model:
        """The model on a device; `dtype` is the network's, the state is float32 (float64 for a float64 network)."""


__all__ = ["Bound", "Condition", "Model", "ModelSource", "check_guidance", "check_sampler", "coefficient"]
