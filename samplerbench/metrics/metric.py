"""Metrics as plugins: fed batch by batch, saved and merged, finished once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from samplerbench.errors import RunError, UserError, argument
from samplerbench.metrics.neighbours import Neighbours
from samplerbench.metrics.reference import Reference
from samplerbench.metrics.strata import SINGLE_SHARE, single_images
from samplerbench.options import Configurable, option
from samplerbench.sampling import Denoiser, Guidance, Inputs, ModelView, Sampler

Layer = Literal["fid", "kid", "isc", "prc"]
"""Which of an extractor's layers a metric takes: the one that torch-fidelity's metric of that name takes."""


@dataclass(frozen=True)
class Batch:
    """Images and what is known of them: generated ones, or real ones for a metric of the data.

    Attributes:
        images: (B, C, H, W) uint8.
        features: (B, d), of the layer and the feature space that the metric declares; (B, 0) where it takes none.
        labels: (B,) int64, the labels of the images; None without labels.
        index: (B,) int64, which samples.
        states: (B, C, H, W), the sampler's last states at σ = 0; of real images, their states.
        stochastic: whether the sampler drew noise on the way.
        inputs: what the samples were given besides noise.
        prompts: the B prompts of the samples; None without prompts.
    """

    images: Tensor
    features: Tensor
    labels: Tensor | None
    index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    states: Tensor = field(default_factory=lambda: torch.empty(0))
    stochastic: bool = False
    inputs: Inputs | None = None
    prompts: tuple[str, ...] | None = None

    @property
    def chosen(self) -> Tensor | None:
        """(B,) int64, the label or the prompt of each sample; None where samples have neither."""
        return self.inputs.chosen if self.labels is None and self.inputs is not None else self.labels

    @property
    def truth(self) -> Tensor | None:
        """(B, ...), the truth behind the observation of each sample; None where there is none."""
        return None if self.inputs is None else self.inputs.tensors.get("truth")


@dataclass(frozen=True)
class EvaluatedImages:
    """Images that a metric of the data evaluates in place of the real images of the run (`Metric.evaluated`).

    Attributes:
        name: the data set, as tables show it.
        identity: what identifies the images in the protocol. Other images must have another text.
        n: images in a block. Block b has the images b·n … (b+1)·n - 1.
        labels: (N,) int64, the labels of the images of all blocks; None without labels.
        states: gives the states at σ = 0 of the images (B,), (B, C, H, W).
        source: whatever else the metric needs of them.
    """

    name: str
    identity: str
    n: int
    labels: Tensor | None
    states: Callable[[Tensor], Tensor]
    source: Any = None


class RealSet(Protocol):
    """A data set that a metric names itself (`Metric.data_source`)."""

    def neighbours(self, layer: Layer | None) -> Neighbours:
        """Nearest neighbours among its images: in the metric's feature space, or in pixels if layer is None."""


class PromptEncoder(Protocol):
    """Encodes prompts into the feature space of a metric (`Context.prompts`)."""

    scale: float
    """exp(logit_scale) of the model."""

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, d) of B prompts, float32 on the CPU."""


@dataclass
class Context:
    """What a metric measures against.

    Attributes:
        reference: statistics of the real images.
        real: gives the features of the real images in a layer, (N, d). They are computed when first asked for.
        solve: (index (B,), sampler) → the states (B, ...) that another sampler, one that chooses its own steps, reaches
            from the same x_T with the same inputs and guidance; for metrics of the discretisation error. None outside a
            run.
        n: images in a block. Sample i of the run is number i mod n of its block. 0 outside a run.
        stratified: whether the number of generated images of each label is fixed (balanced labels), so that the images
            are independent draws within each label and not as a whole.
        strata: gives the labels of the real images, (N,) int64, where the generated images have the same proportions;
            else None.
        denoiser: gives the denoiser of a batch for its inputs, guided and clipped as in the run; for metrics of the
            data. None outside a run.
        sampler: the sampler of the cell, bound to the model; None for a generator and outside a run.
        sigmas: (N+1,) float64, the grid of the cell; empty outside a run.
        real_set: the data set that the metric names in `data_source`; None without one, and outside a run.
        prompts: encodes prompts into the feature space of the metric; None for a space of images alone.
        solve_images: as `solve`, but gives the decoded images (B, C, H, W) uint8 of these states, on the CPU. None
            outside a run.
        model: the model of the run, whose `observation` has the task. None outside a run.
        evaluated: what `Metric.evaluated` returned for the run; None where it returned None, and outside a run.
        seed: seed of the run.
    """

    reference: Reference
    real: Callable[[Layer], Tensor] | None = None
    solve: Callable[[Tensor, Sampler], Tensor] | None = None
    n: int = 0
    stratified: bool = False
    strata: Callable[[], Tensor | None] | None = None
    denoiser: Callable[[Inputs], Denoiser] | None = None
    sampler: Sampler | None = None
    sigmas: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    real_set: RealSet | None = None
    prompts: PromptEncoder | None = None
    solve_images: Callable[[Tensor, Sampler], Tensor] | None = None
    model: ModelView | None = None
    evaluated: EvaluatedImages | None = None
    seed: int = 0

    def real_features(self, layer: Layer) -> Tensor:
        """Features of the real images, (N, d). Raises UserError where only their statistics are at hand."""
        if self.real is None:
            raise UserError(
                f"this metric needs the real images, not their statistics alone: give them with {argument('data')}."
            )
        return self.real(layer)


class Accumulator(ABC):
    """The state of one metric over one block of images."""

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Take in a batch."""

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """`{"value": …}` and other numbers that belong to it; `{}` where the metric is not applicable to these images.

        Values are real numbers, or tensors of one number. A table shows an empty cell for `{}`.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All it knows, as tensors: for checkpoints and for other processes."""

    @abstractmethod
    def merge(self, state: dict[str, Tensor]) -> None:
        """Take in what another accumulator of the same metric knows."""


class FeatureStore(Accumulator):
    """An accumulator that keeps all features: memory n·d."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def update(self, batch: Batch) -> None:
        self.parts.append(batch.features.cpu())

    def features(self) -> Tensor:
        """All features seen, (n, d). Raises RunError where they are not finite."""
        features = torch.cat(self.parts)
        if not bool(features.isfinite().all()):
            raise RunError(f"the features of the generated images are not finite; try {argument('dtype', 'fp32')}.")
        return features

    def state(self) -> dict[str, Tensor]:
        return {"features": torch.cat(self.parts)} if self.parts else {}

    def merge(self, state: dict[str, Tensor]) -> None:
        if "features" in state:
            self.parts.append(state["features"])


class LabelledStore(FeatureStore):
    """A FeatureStore that keeps the labels too, where the number of images of each label is fixed."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context
        self.label_parts: list[Tensor] = []

    def update(self, batch: Batch) -> None:
        super().update(batch)
        if self.context.stratified:
            if batch.chosen is None:
                raise RunError("the images are said to be stratified by their labels, and have none.")
            self.label_parts.append(batch.chosen.cpu())

    def labels(self) -> Tensor | None:
        """The labels of all images seen, (n,) int64; None where the images are independent draws."""
        return torch.cat(self.label_parts) if self.context.stratified else None

    def state(self) -> dict[str, Tensor]:
        return super().state() | ({"labels": torch.cat(self.label_parts)} if self.label_parts else {})

    def merge(self, state: dict[str, Tensor]) -> None:
        super().merge(state)
        if "labels" in state:
            self.label_parts.append(state["labels"])


_RENAMED = {"fewest": "min_images", "fewest_per_feature": "min_images_per_feature", "fewest_real": "min_real_images"}


@dataclass(frozen=True)
class Metric(Configurable, ABC):
    """Base of metric plugins.

    What a metric is of and what it needs is declared here, so that it is checked before anything is sampled
    (`check_requirements`), and a run loads what its metrics need and nothing else.
    """

    kind: ClassVar[str] = "metric"
    better: ClassVar[Literal["lower", "higher"]] = "lower"
    of: ClassVar[Literal["samples", "data"]] = "samples"
    """What the metric is computed from: generated images, or the real images (a likelihood, for example)."""
    min_images: ClassVar[int] = 1
    """The fewest images the metric has a value for."""
    min_images_per_feature: ClassVar[int] = 0
    """The fewest images for each of the d features, for a metric whose value is wrong with fewer."""
    layer: ClassVar[Layer] = "fid"
    needs_features: ClassVar[bool] = True
    """Whether the metric takes features. One that does not is given `Batch.features` of shape (B, 0)."""
    needs_reference: ClassVar[bool] = True
    """Whether the metric takes the statistics of the real images (`Context.reference`), which need features too. A run
    whose metrics need none asks for no real images."""
    needs_real_images: ClassVar[bool] = False
    """Whether the metric takes the features of the real images (`Context.real_features`), not their statistics."""
    ordered: ClassVar[bool] = False
    """Whether the value is of the images in their order (of consecutive parts, or of subsets by a fixed seed), so that
    another order gives a slightly other one. A run always has the order of the samples' numbers."""
    min_real_images: ClassVar[int] = 1
    """The fewest real images the metric has a value for, where it needs real images."""
    needs_labels: ClassVar[bool] = False
    """Whether each generated image must have a label."""
    needs_prompts: ClassVar[bool] = False
    """Whether each generated image must have a prompt (`Batch.prompts`)."""
    needs_truth: ClassVar[bool] = False
    """Whether the truth behind each sample must be known (`Batch.truth`)."""
    prefers_real_images: ClassVar[bool] = True
    """Whether real images have a better value than noise. A metric of memorisation does not: noise copies nothing."""
    needs_class_pairs: ClassVar[bool] = False
    """Whether the metric averages over pairs of images of one class, where the labels are balanced."""
    unit: ClassVar[str] = ""
    """The unit of the value for the headings of tables, such as `bits/dim`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Accept the attribute names of version 0.1 (`fewest`, `fewest_per_feature`, `fewest_real`)."""
        super().__init_subclass__(**kwargs)
        for old, new in _RENAMED.items():
            if old in vars(cls) and new not in vars(cls):
                setattr(cls, new, vars(cls)[old])

    @property
    def feature_space(self) -> str:
        """The feature space of the metric, by name; empty is that of the run. Metrics may use different ones."""
        return ""

    @property
    def data_source(self) -> str | None:
        """A data set that the metric compares with, besides the reference of the run (`Context.real_set`).

        A name or a path as of `load_data`; empty is the training data of the model; None if the metric needs none.
        """
        return None

    @abstractmethod
    def start(self, context: Context) -> Accumulator:
        """A fresh accumulator that measures against the context's reference."""

    def solution(self, n: int) -> tuple[Sampler, int] | None:
        """What the metric computes by `Context.solve`, for planning: the sampler, and how many images of each block.

        Args:
            n: images in a block.

        Returns:
            None where it computes no such solution.
        """
        return None

    def evaluated(self, model: ModelView, n: int | None, blocks: int) -> EvaluatedImages | None:
        """The images that a metric of the data evaluates, if they are not the real images of the run.

        Args:
            model: the model of the run.
            n: images in a block of the run; None if the user did not set a number.
            blocks: number of blocks.

        Returns:
            The images of all blocks. None for the real images of the run.

        Raises:
            UserError: if the metric has no value for this model, or the images are not available.
        """
        return None

    def inapplicable(self, sampler: Sampler, guidance: Guidance | None, model: ModelView) -> str | None:
        """Why the metric has no value for a sampler, in one sentence without a full stop; None if it has one.

        Such a cell of a table has no value, with this reason below the table. A run in which a metric has no value for
        any sampler is refused before it starts.

        Args:
            sampler: the sampler of a cell, not bound to the model.
            guidance: the guidance of the cell; None without guidance.
            model: the model of the run.
        """
        return None

    def evaluations(self, sampler: Sampler, sigmas: Tensor, context: Context) -> tuple[float, float]:
        """Network evaluations and backward passes that the metric takes for each image, for estimates of a run.

        Only called for metrics with images of their own (`evaluated`).

        Args:
            sampler: the sampler of a cell, not bound to the model.
            sigmas: (N+1,) float64, the grid of the cell.
            context: the model, its denoiser and the images; the rest is empty.
        """
        return 0.0, 0.0

    def estimator(self, stratified: bool) -> str | None:
        """The name of the estimator for the protocol, where it is not the metric's first one; else None.

        A metric whose formula changes returns another name, so that old and new values never share a table.

        Args:
            stratified: as `Context.stratified`.
        """
        return None


@dataclass(frozen=True)
class FeatureMetric(Metric, ABC):
    """Base of metrics of features, which may name a feature space of their own: `fid:features=dinov2-vit-b-14`."""

    _: KW_ONLY
    features: str = option("", "feature space of this metric; empty is that of the run")

    @property
    def feature_space(self) -> str:
        return self.features


def names_of(metrics: Sequence[Metric]) -> list[str]:
    """Return the names of metrics in records and tables: the label, or the spec if several have the same label.

    Args:
        metrics: all metrics of a run.
    """
    labels = [metric.label() for metric in metrics]
    return [m.spec if labels.count(m.label()) > 1 else m.label() for m in metrics]


def need_samples(metrics: Sequence[Metric]) -> bool:
    """Return whether a run with these metrics samples images. It does not if all metrics measure the data.

    Args:
        metrics: all metrics of a run.
    """
    return not metrics or any(metric.of == "samples" for metric in metrics)


def check_requirements(
    metric: Metric,
    *,
    n: int | None = None,
    dimension: int | None = None,
    has_labels: bool | None = None,
    has_classes: bool | None = None,
    has_prompts: bool | None = None,
    has_truth: bool | None = None,
    labels: Tensor | None = None,
    has_real_images: bool | None = None,
    real_images: int | None = None,
) -> None:
    """Check that a run has what a metric needs, before anything is sampled.

    What is None is not known yet, and not checked.

    Args:
        metric: the metric.
        n: generated images in a block.
        dimension: d, the number of features.
        has_labels: whether the generated images have labels.
        has_classes: whether the model or its guidance has classes, so that they could have labels.
        has_prompts: whether they have prompts.
        has_truth: whether the truth behind each of them is known.
        labels: (n,) int64, where the number of images of each label is fixed (`Context.stratified`).
        has_real_images: whether the real images are available, and not only their statistics.
        real_images: how many real images there are.

    Raises:
        UserError: with the metric's name, and what it needs.
    """
    name = metric.label()
    if n is not None and n < metric.min_images:
        raise UserError(f"{argument('n', n)}: the metric {name} needs at least {metric.min_images} images.")
    if n is not None and dimension is not None and n < metric.min_images_per_feature * dimension:
        raise UserError(
            f"{argument('n', n)}: the metric {name} needs at least {metric.min_images_per_feature} images per feature, "
            f"{metric.min_images_per_feature * dimension} for these {dimension} features."
        )
    if metric.needs_labels and has_labels is False and has_classes is False:
        raise UserError(f"the metric {name} needs labels, and this model has no classes; omit the metric.")
    if metric.needs_labels and has_labels is False:
        raise UserError(f"the metric {name} needs labels: use {argument('labels', 'balanced')} or a label.")
    if metric.needs_prompts and has_prompts is False:
        raise UserError(f"the metric {name} needs prompts: use a text-to-image model.")
    if metric.needs_truth and has_truth is False:
        raise UserError(
            f"the metric {name} needs the truth behind each sample, and this model has no such input; name a task."
        )
    if metric.needs_real_images and has_real_images is False:
        raise UserError(
            f"the metric {name} needs the real images, and there are only their statistics: name the images with "
            f"{argument('data')}."
        )
    if metric.needs_real_images and real_images is not None and real_images < metric.min_real_images:
        raise UserError(
            f"the metric {name} needs at least {metric.min_real_images} real images; there are {real_images}."
        )
    if metric.needs_class_pairs and labels is not None:
        single = single_images(labels)
        if single > SINGLE_SHARE * len(labels):
            raise UserError(
                f"{argument('n', len(labels))}: under {argument('labels', 'balanced')}, the metric {name} needs at "
                f"least 2 images of each class, and {single} of {len(labels)} images are the only one of their class; "
                f"use a larger {argument('n')}, about twice the number of classes."
            )
