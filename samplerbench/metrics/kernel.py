"""The kernel distance KID."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

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

    degree: int = option(3, "degree of the polynomial kernel", ge=1, le=100)

    def start(self, context: Context) -> Accumulator:
        return _KID(self, context)


class _KID(FeatureStore):
    def __init__(self, metric: KID, context: Context) -> None:
        super().__init__()
        self.metric, self.context = metric, context

    def result(self) -> dict[str, Any]:
        value, error = squared_mmd(self.features(), self.context.real_features("kid"), self.metric.degree)
        return {"value": value, "standard_error": error}


_WITHIN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def mean_kernels(x: Tensor, degree: int, chunk: int) -> Tensor:
    """Of each row of x (n, d), the mean kernel with the others, (n,)."""
    n, d = x.shape
    sums = torch.cat([(part @ x.T / d + 1).pow(degree).sum(1) for part in x.split(chunk)])
    return (sums - (x.square().sum(1) / d + 1).pow(degree)) / (n - 1)


def squared_mmd(x: Tensor, y: Tensor, degree: int = 3, chunk: int = 2048) -> tuple[float, float]:
    """(unbiased squared MMD, standard error) of x (n, d) and y (m, d) under the kernel (x·y/d + 1)^degree."""
    real = y
    x, y = x.double(), y.double()
    n, m, d = len(x), len(y), x.shape[1]

    across_x = torch.zeros(n, dtype=torch.float64)
    across_y = torch.zeros(m, dtype=torch.float64)
    for first in range(0, n, chunk):
        kernel = (x[first : first + chunk] @ y.T / d + 1).pow(degree)
        across_x[first : first + chunk] = kernel.sum(1) / m
        across_y += kernel.sum(0) / n
    within_x = mean_kernels(x, degree, chunk)
    # The real images are the same for every block and cell of a run; their own kernels are summed once.
    known = _WITHIN.setdefault(real, {})
    if degree not in known:
        known[degree] = mean_kernels(y, degree, chunk)
    within_y = known[degree]
    value = within_x.mean() + within_y.mean() - 2 * across_x.mean()
    variance = 4 * ((within_x - across_x).var() / n + (within_y - across_y).var() / m)
    return float(value), math.sqrt(float(variance))
