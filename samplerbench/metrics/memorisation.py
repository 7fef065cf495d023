"""Metrics of memorisation: whether samples copy training images."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from samplerbench.errors import RunError, UserError
from samplerbench.metrics.metric import Accumulator, Batch, Context, Metric
from samplerbench.options import option

MEMORISED = 1 / 3
"""The ratio of distances below which a sample counts as a copy (Yoon et al. 2023)."""


@dataclass(frozen=True)
class _Memorisation(Metric, ABC):
    better: ClassVar[Literal["lower", "higher"]] = "higher"
    needs_reference: ClassVar[bool] = False
    prefers_real_images: ClassVar[bool] = False

    data: str = option("", "real images to compare with, such as `digits:split=held-out`; empty: the training images")
    space: Literal["pixels", "features"] = option("pixels", "where distances are measured")
    features: str = option("", "feature space of this metric; empty is that of the run")

    @property
    def needs_features(self) -> bool:  # type: ignore[override]
        """Pixels need none."""
        return self.space == "features"

    @property
    def feature_space(self) -> str:
        return self.features

    @property
    def data_source(self) -> str:
        return self.data

    def start(self, context: Context) -> Accumulator:
        return _Mean(self, context)

    @abstractmethod
    def measure(self, nearest: Tensor, second: Tensor, own: Tensor) -> Tensor:
        """What is averaged over samples, (B,) float64.

        Args:
            nearest: (B,), distance from each sample to the nearest real image.
            second: (B,), distance from each sample to the second nearest real image.
            own: (B,), distance from that nearest real image to the nearest other real image.
        """


@dataclass(frozen=True)
class Authenticity(_Memorisation):
    """Share of samples that are farther from their nearest real image than that one is from its own (Alaa et al. 2022).

    A model that generalises reaches about what real images that were not in the training set reach, which is near one
    half. A model that copies its training images is near 0. A large value alone is no sign of quality: noise
    has the value 1.
    """

    def measure(self, nearest: Tensor, second: Tensor, own: Tensor) -> Tensor:
        return (nearest > own).double()


@dataclass(frozen=True)
class Nearest(_Memorisation):
    """Mean ratio of the distances from a sample to its nearest and its second nearest real image (Yoon et al. 2023).

    A copy has a ratio near 0, an image between real ones a ratio near 1. `memorised` is the share of samples whose
    ratio is below 1/3, the threshold of Yoon et al. 2023.
    """

    def measure(self, nearest: Tensor, second: Tensor, own: Tensor) -> Tensor:
        # Two real images may be equal: a sample that equals both is a copy.
        ratio = torch.where(second > 0, nearest / second, torch.zeros_like(nearest))
        return ratio.double()


class _Mean(Accumulator):
    """Sums over samples of what the metric measures."""

    def __init__(self, metric: _Memorisation, context: Context) -> None:
        if context.real_set is None:
            raise UserError(f"the metric {metric.label()} needs the training images; it has a value only within a run.")
        self.metric, self.real = metric, context.real_set
        self.sums = torch.zeros(4, dtype=torch.float64)
        """Number of samples, Σ values, Σ values², number of copies."""

    def update(self, batch: Batch) -> None:
        in_features = self.metric.space == "features"
        neighbours = self.real.neighbours(self.metric.layer if in_features else None)
        points = batch.features if in_features else as_points(batch.images)
        if not bool(points.isfinite().all()):
            raise RunError("the features of the generated images are not finite.")
        distances, indices = neighbours.nearest(points)
        nearest, second = distances.unbind(dim=1)
        values = self.metric.measure(nearest, second, neighbours.own[indices[:, 0]])
        copies = (nearest <= MEMORISED * second).double()
        self.sums = self.sums + torch.stack(
            [torch.tensor(len(values)).double(), values.sum(), values.square().sum(), copies.sum()]
        )

    def state(self) -> dict[str, Tensor]:
        return {"sums": self.sums}

    def merge(self, state: dict[str, Tensor]) -> None:
        self.sums = self.sums + state["sums"]

    def result(self) -> dict[str, Any]:
        n, total, squares, copies = self.sums.tolist()
        mean = total / n
        error = math.sqrt(max(0.0, squares / n - mean**2) / max(1.0, n - 1))
        return {"value": mean, "standard_error": error, "memorised": copies / n}


def as_points(images: Tensor) -> Tensor:
    """uint8 images (B, C, H, W) as points (B, C·H·W) with values in [0, 1]."""
    return images.flatten(1).double() / 255
