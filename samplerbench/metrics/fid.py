"""Fréchet inception distance (FID)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from samplerbench.metrics.frechet import frechet_distance
from samplerbench.metrics.metric import Accumulator, Batch, Context, FeatureMetric
from samplerbench.metrics.moments import Moments
from samplerbench.metrics.reference import Reference


@dataclass(frozen=True)
class FID(FeatureMetric):
    """Fréchet distance between the features of generated and real images (Heusel et al. 2017).

    FID = ‖μ₁-μ₂‖² + tr(Σ₁ + Σ₂ - 2(Σ₁Σ₂)^½), with the means and covariances of the two sets of features. Only values
    with inception-v3-compat features are comparable with published FIDs. Tables always show the feature space.
    """

    min_images: ClassVar[int] = 2

    def start(self, context: Context) -> Accumulator:
        return FrechetAccumulator(context.reference)


class FrechetAccumulator(Accumulator):
    """The Fréchet distance of the features of a batch to a reference, from their moments."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.moments: Moments | None = None

    def update(self, batch: Batch) -> None:
        if self.moments is None:
            self.moments = Moments(batch.features.shape[1], batch.features.device)
        self.moments.update(batch.features)

    def state(self) -> dict[str, Tensor]:
        if self.moments is None:
            return {}
        m = self.moments
        return {"n": torch.tensor([m.n]), "mean": m.mean.cpu(), "scatter": m.scatter.cpu()}

    def merge(self, state: dict[str, Tensor]) -> None:
        if not state:
            return
        other = Moments(len(state["mean"]))
        other.n, other.mean, other.scatter = int(state["n"]), state["mean"], state["scatter"]
        if self.moments is None:
            self.moments = Moments(len(other.mean))
        self.moments.merge(other)

    def result(self) -> dict[str, Any]:
        moments = self.moments or Moments(len(self.reference.moments.mean))
        return {"value": frechet_distance(moments, self.reference.moments)}
