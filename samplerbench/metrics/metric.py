"""Metrics as plugins: fed batch by batch, saved and merged, finished once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.metrics.reference import Reference
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
    """

    reference: Reference
    real: Callable[[Layer], Tensor] | None = None
    solve: Callable[[Tensor, Tensor | None, Sampler], Tensor] | None = None
    n: int = 0

    def real_features(self, layer: Layer) -> Tensor:
        """Features of the real images, (N, d). Raises UserError where only their statistics are at hand."""
        if self.real is None:
            raise UserError("this metric needs the real images, not their statistics alone: give them with --data.")
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
        """All features seen, (n, d)."""
        return torch.cat(self.parts)

    def state(self) -> dict[str, Tensor]:
        return {"features": self.features()} if self.parts else {}

    def merge(self, state: dict[str, Tensor]) -> None:
        if "features" in state:
            self.parts.append(state["features"])


@dataclass(frozen=True)
class Metric(Configurable, ABC):
    """Base of metric plugins."""

    kind: ClassVar[str] = "metric"
    better: ClassVar[Literal["lower", "higher"]] = "lower"
    fewest: ClassVar[int] = 1
    """The fewest images the metric has a value for."""
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
