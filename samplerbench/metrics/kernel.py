"""The kernel distance KID."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from samplerbench.metrics.metric import Accumulator, Context, FeatureStore, Layer, Metric
from samplerbench.options import option


@dataclass(frozen=True)
class KID(Metric):
    """Kernel inception distance (Bińkowski et al. 2018): the unbiased squared MMD with the kernel (x·y/d + 1)³.

    Over all images at once (a U-statistic), with the standard error of its linear part: √(var ψ_x/n + var ψ_y/m),
    ψ the influence of one image. torch-fidelity instead averages over random subsets and reports their spread, which
    is no standard error.
    """

    fewest: ClassVar[int] = 2
    layer: ClassVar[Layer] = "kid"

    degree: int = option(3, "degree of the polynomial kernel", ge=1)

    def start(self, context: Context) -> Accumulator:
        return _KID(self, context)


class _KID(FeatureStore):
    def __init__(self, metric: KID, context: Context) -> None:
        super().__init__()
        self.metric, self.context = metric, context

    def result(self) -> dict[str, Any]:
        value, error = squared_mmd(self.features(), self.context.real_features("kid"), self.metric.degree)
        return {"value": value, "standard_error": error}


def squared_mmd(x: Tensor, y: Tensor, degree: int = 3, chunk: int = 2048) -> tuple[float, float]:
    """(unbiased squared MMD, standard error) of x (n, d) and y (m, d) under the kernel (x·y/d + 1)^degree."""
    x, y = x.double(), y.double()
    n, m, d = len(x), len(y), x.shape[1]

    def row_sums(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([((part @ b.T) / d + 1).pow(degree).sum(1) for part in a.split(chunk)])

    within_x = (row_sums(x, x) - (x.square().sum(1) / d + 1).pow(degree)) / (n - 1)
    within_y = (row_sums(y, y) - (y.square().sum(1) / d + 1).pow(degree)) / (m - 1)
    across_x, across_y = row_sums(x, y) / m, row_sums(y, x) / n
    value = within_x.mean() + within_y.mean() - 2 * across_x.mean()
    variance = 4 * ((within_x - across_x).var() / n + (within_y - across_y).var() / m)
    return float(value), math.sqrt(float(variance))
