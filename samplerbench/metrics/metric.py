"""Metrics as plugins: fed batch by batch, saved and merged, finished once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from samplerbench.errors import RunError, UserError, argument
from samplerbench.metrics.reference import Reference
from samplerbench.metrics.strata import SINGLE_SHARE, single_images
from samplerbench.options import Configurable
from samplerbench.sampling import Sampler

Layer = Literal["fid", "kid", "isc", "prc"]
"""Which of an extractor's layers a metric takes: the one that torch-fidelity's metric of that name takes."""


@dataclass(frozen=True)
class Batch:
    """Generated images and what is known of them.

    images: (B, C, H, W) uint8. features: (B, d), of the layer the metric asks for. labels: (B,) int64 that were asked
    for, or None. index: (B,) int64, which samples. states: (B, C, H, W), the sampler's last state at σ = 0.
    stochastic: whether the sampler drew noise on the way.
    """

    images: Tensor
    features: Tensor
    labels: Tensor | None
    index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    states: Tensor = field(default_factory=lambda: torch.empty(0))
    stochastic: bool = False


@dataclass
class Context:
    """What a metric measures against.

    reference: statistics of the real images. real: their features in a layer, (N, d), loaded when asked for.
    solve: (index (B,), labels, sampler) → the states (B, ...) that another sampler, one that chooses its own steps,
    reaches from the same x_T under the same guidance; for metrics of the discretisation error. None outside a run.
    n: images in a block; sample i of the run is number i mod n of its block. 0 outside a run.
    stratified: whether the number of generated images of each label is fixed (balanced labels), so that the images are
    independent draws within each label and not as a whole. strata: the labels of the real images, (N,) int64, where the
    generated images have the same proportions; else None.
    """

    reference: Reference
    real: Callable[[Layer], Tensor] | None = None
    solve: Callable[[Tensor, Tensor | None, Sampler], Tensor] | None = None
    n: int = 0
    stratified: bool = False
    strata: Callable[[], Tensor | None] | None = None

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
            if batch.labels is None:
                raise RunError("the images are said to be stratified by their labels, and have none.")
            self.label_parts.append(batch.labels.cpu())

    def labels(self) -> Tensor | None:
        """The labels of all images seen, (n,) int64; None where the images are independent draws."""
        return torch.cat(self.label_parts) if self.context.stratified else None

    def state(self) -> dict[str, Tensor]:
        return super().state() | ({"labels": torch.cat(self.label_parts)} if self.label_parts else {})

    def merge(self, state: dict[str, Tensor]) -> None:
        super().merge(state)
        if "labels" in state:
            self.label_parts.append(state["labels"])


@dataclass(frozen=True)
class Metric(Configurable, ABC):
    """Base of metric plugins.

    What a metric needs is declared here, so that it is checked before anything is sampled (`check_requirements`).
    """

    kind: ClassVar[str] = "metric"
    better: ClassVar[Literal["lower", "higher"]] = "lower"
    fewest: ClassVar[int] = 1
    """The fewest images the metric has a value for."""
    fewest_per_feature: ClassVar[int] = 0
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
    fewest_real: ClassVar[int] = 1
    """The fewest real images the metric has a value for, where it needs real images."""
    needs_labels: ClassVar[bool] = False
    """Whether each generated image must have a label."""
    needs_class_pairs: ClassVar[bool] = False
    """Whether the metric averages over pairs of images of one class, where the labels are balanced."""

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

    def estimator(self, stratified: bool) -> str | None:
        """The name of the estimator for the protocol, where it is not the metric's first one; else None.

        A metric whose formula changes returns another name, so that old and new values never share a table.

        Args:
            stratified: as `Context.stratified`.
        """
        return None


def check_requirements(
    metric: Metric,
    *,
    n: int | None = None,
    dimension: int | None = None,
    has_labels: bool | None = None,
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
        labels: (n,) int64, where the number of images of each label is fixed (`Context.stratified`).
        has_real_images: whether the real images are available, and not only their statistics.
        real_images: how many real images there are.

    Raises:
        UserError: with the metric's name, and what it needs.
    """
    name = metric.label()
    if n is not None and n < metric.fewest:
        raise UserError(f"{argument('n', n)}: the metric {name} needs at least {metric.fewest} images.")
    if n is not None and dimension is not None and n < metric.fewest_per_feature * dimension:
        raise UserError(
            f"{argument('n', n)}: the metric {name} needs at least {metric.fewest_per_feature} images per feature, "
            f"{metric.fewest_per_feature * dimension} for these {dimension} features."
        )
    if metric.needs_labels and has_labels is False:
        raise UserError(f"the metric {name} needs labels: use {argument('labels', 'balanced')} or a label.")
    if metric.needs_real_images and has_real_images is False:
        raise UserError(
            f"the metric {name} needs the real images, and there are only their statistics: name the images with "
            f"{argument('data')}."
        )
    if metric.needs_real_images and real_images is not None and real_images < metric.fewest_real:
        raise UserError(f"the metric {name} needs at least {metric.fewest_real} real images; there are {real_images}.")
    if metric.needs_class_pairs and labels is not None:
        single = single_images(labels)
        if single > SINGLE_SHARE * len(labels):
            raise UserError(
                f"{argument('n', len(labels))}: under {argument('labels', 'balanced')}, the metric {name} needs at "
                f"least 2 images of each class, and {single} of {len(labels)} images are the only one of their class; "
                f"use a larger {argument('n')}, about twice the number of classes."
            )
