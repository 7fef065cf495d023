"""FID extrapolated to infinitely many images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from samplerbench.metrics.frechet import frechet_distance
from samplerbench.metrics.metric import Accumulator, Context, FeatureStore, Layer, Metric
from samplerbench.metrics.moments import Moments
from samplerbench.options import option


@dataclass(frozen=True)
class FIDInfinity(Metric):
    """FID∞: FID at several sample sizes, a line in 1/N, its value at 1/N = 0 (Chong & Forsyth 2020, section 4).

    The sizes are even between a tenth of n and n, each a random subset by a fixed seed. The error is the standard
    error of the line's intercept.
    """

    fewest: ClassVar[int] = 20
    layer: ClassVar[Layer] = "fid"
    ordered: ClassVar[bool] = True

    points: int = option(15, "sample sizes through which the line goes", ge=3, le=1000)

    def start(self, context: Context) -> Accumulator:
        return _Line(self.points, context)


class _Line(FeatureStore):
    def __init__(self, points: int, context: Context) -> None:
        super().__init__()
        self.points, self.context = points, context

    def result(self) -> dict[str, Any]:
        value, error = extrapolate(self.features(), self.context.reference.moments, self.points)
        return {"value": value, "standard_error": error}


def extrapolate(features: Tensor, reference: Moments, points: int) -> tuple[float, float]:
    """(FID∞, standard error of the fit) of features (n, d)."""
    n = len(features)
    sizes = np.linspace(max(2, n // 10), n, points).astype(int)
    generator = torch.Generator().manual_seed(0)
    subsets = (features[torch.randperm(n, generator=generator)[:size]] for size in sizes.tolist())
    values = np.array([frechet_distance(Moments.of(part), reference) for part in subsets])
    design = np.stack([np.ones(points), 1 / sizes], axis=1)
    solution, *_ = np.linalg.lstsq(design, values, rcond=None)
    residual = values - design @ solution
    variance = (residual @ residual) / (points - 2) * np.linalg.inv(design.T @ design)[0, 0]
    return float(solution[0]), math.sqrt(float(variance))
