"""The Fréchet distance of features as a metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samplerbench.metrics.frechet import frechet_distance
from samplerbench.metrics.metric import Accumulator, Batch, Metric
from samplerbench.metrics.moments import Moments
from samplerbench.metrics.reference import Reference


@dataclass(frozen=True)
class FID(Metric):
    """Fréchet distance between the features of generated and of real images (Heusel et al. 2017).

    "FID" in the strict sense when the features are inception-v3-compat; in any other feature space it is a number of
    its own, so it always carries the space's name.
    """

    fewest: ClassVar[int] = 2

    def start(self, reference: Reference) -> Accumulator:
        return _Stream(reference)


class _Stream(Accumulator):
    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.moments: Moments | None = None

    def update(self, batch: Batch) -> None:
        if self.moments is None:
            self.moments = Moments(batch.features.shape[1], batch.features.device)
        self.moments.update(batch.features)

    def result(self) -> dict[str, Any]:
        moments = self.moments or Moments(len(self.reference.moments.mean))
        return {"value": frechet_distance(moments, self.reference.moments)}
