"""Metrics as plugins: fed batch by batch, merged across processes, finished once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from samplerbench.metrics.reference import Reference
from samplerbench.options import Configurable


@dataclass(frozen=True)
class Batch:
    """Generated images and what is known of them.

    images: (B, C, H, W) uint8. features: (B, d), the extractor's. labels: (B,) int64 that were asked for, or None.
    """

    images: Tensor
    features: Tensor
    labels: Tensor | None


class Accumulator(ABC):
    """The state of one metric over one cell."""

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Take in a batch."""

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """`{"value": …}` and whatever else belongs to the number."""


@dataclass(frozen=True)
class Metric(Configurable, ABC):
    """Base of metric plugins."""

    kind: ClassVar[str] = "metric"
    better: ClassVar[Literal["lower", "higher"]] = "lower"
    fewest: ClassVar[int] = 1
    """The fewest images the metric has a value for."""

    @abstractmethod
    def start(self, reference: Reference) -> Accumulator:
        """A fresh accumulator that measures against the reference."""
