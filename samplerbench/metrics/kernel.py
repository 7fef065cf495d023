"""Kernel inception distance (KID)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from samplerbench.metrics.metric import Accumulator, Context, FeatureMetric, LabelledStore, Layer
from samplerbench.metrics.strata import strata_of, variance_of_mean
from samplerbench.options import option


@dataclass(frozen=True)
class KID(FeatureMetric):
    """Kernel inception distance (Bińkowski et al. 2018): the unbiased squared MMD with the kernel (x·y/d + 1)³.

    The estimate uses all images at once (a U-statistic). Its standard error is that of the linear part,
    √(var ψ_x/n + var ψ_y/m), where ψ is the influence of one image. torch-fidelity instead averages over random subsets
    and reports their spread, which is not a standard error.

    With balanced labels the images are not independent draws, because the number of images of each class is fixed.
    Pairs within a class and pairs of two classes are then averaged separately, and weighted by the class proportions.
    The same is done for the real images if they have the same proportions. The estimate is again unbiased.
    """

    min_images: ClassVar[int] = 2
    layer: ClassVar[Layer] = "kid"
    needs_real_images: ClassVar[bool] = True
    needs_class_pairs: ClassVar[bool] = True
    min_real_images: ClassVar[int] = 2

    degree: int = option(3, "degree of the polynomial kernel", ge=1, le=100)

    def start(self, context: Context) -> Accumulator:
        return _KID(self, context)

    def estimator(self, stratified: bool) -> str | None:
        return "stratified" if stratified else None


class _KID(LabelledStore):
    def __init__(self, metric: KID, context: Context) -> None:
        super().__init__(context)
        self.metric = metric

    def result(self) -> dict[str, Any]:
        strata = self.context.strata if self.context.stratified else None
        value, error = squared_mmd(
            self.features(),
            self.context.real_features("kid"),
            self.metric.degree,
            labels=self.labels(),
            real_labels=None if strata is None else strata(),
        )
        return {"value": value, "standard_error": error}


_WITHIN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def mean_kernels(x: Tensor, degree: int, chunk: int, strata: Tensor | None = None) -> Tensor:
    """For each row, the mean kernel with another draw from the same distribution.

    For independent rows, this is the mean over the other rows. If the number of rows in each stratum is fixed, it is
    (Σ_{j≠i} k(x_i, x_j) + k̄_i)/n, where k̄_i is the mean over the other rows in the stratum of x_i.

    Args:
        x: (n, d).
        degree: degree of the polynomial kernel.
        chunk: the number of rows per block of the kernel matrix.
        strata: (n,) int64, each with at least two rows, or None for independent rows.

    Returns:
        (n,), with the dtype of x.
    """
    n, d = x.shape
    sums = torch.cat([(part @ x.T / d + 1).pow(degree).sum(1) for part in x.split(chunk)])
    others = sums - (x.square().sum(1) / d + 1).pow(degree)
    if strata is None:
        return others / (n - 1)
    own = torch.empty_like(others)
    for stratum in strata.unique():
        rows = (strata == stratum).nonzero()[:, 0]
        own[rows] = mean_kernels(x[rows], degree, chunk)
    return (others + own) / n


def squared_mmd(
    x: Tensor,
    y: Tensor,
    degree: int = 3,
    chunk: int = 2048,
    labels: Tensor | None = None,
    real_labels: Tensor | None = None,
) -> tuple[float, float]:
    """Unbiased squared MMD with the kernel (x·y/d + 1)^degree, and its standard error.

    With labels, the rows of class a are independent draws from P_a, their number n_a is fixed, and the distribution is
    the mixture P = Σ w_a P_a with w_a = n_a/n. Then E k(x, x') = Σ_ab w_a w_b E k(x_a, x_b), where a pair within a
    class consists of two different rows. The standard error uses the variances within classes.

    Args:
        x: (n, d), features of the generated images.
        y: (m, d), features of the real images.
        degree: degree of the polynomial kernel.
        chunk: the number of rows per block of the kernel matrix.
        labels: (n,) int64, labels of x, or None for independent draws. For classes with one row see `strata_of`.
        real_labels: (m,) int64, labels of y, or None for independent draws.

    Returns:
        (squared MMD, standard error).
    """
    real = y
    x, y = x.double(), y.double()
    n, m, d = len(x), len(y), x.shape[1]
    strata_x = None if labels is None else strata_of(labels)
    strata_y = None if real_labels is None else strata_of(real_labels)

    across_x = torch.zeros(n, dtype=torch.float64)
    across_y = torch.zeros(m, dtype=torch.float64)
    for first in range(0, n, chunk):
        kernel = (x[first : first + chunk] @ y.T / d + 1).pow(degree)
        across_x[first : first + chunk] = kernel.sum(1) / m
        across_y += kernel.sum(0) / n
    within_x = mean_kernels(x, degree, chunk, strata_x)
    # The real images are the same for all blocks and cells of a run, so their kernel sums are cached.
    known = _WITHIN.setdefault(real, {})
    key = (degree, None if strata_y is None else strata_y.numpy().tobytes())
    if key not in known:
        known[key] = mean_kernels(y, degree, chunk, strata_y)
    within_y = known[key]
    value = within_x.mean() + within_y.mean() - 2 * across_x.mean()
    variance = variance_of_mean(within_x - across_x, strata_x) + variance_of_mean(within_y - across_y, strata_y)
    return float(value), 2 * math.sqrt(variance)
