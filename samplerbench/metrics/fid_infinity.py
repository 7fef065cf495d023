"""FID extrapolated to infinitely many images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from samplerbench.metrics.frechet import frechet_distance, frechet_influence
from samplerbench.metrics.metric import Accumulator, Context, LabelledStore, Layer, Metric
from samplerbench.metrics.moments import Moments
from samplerbench.metrics.strata import centred, strata_of
from samplerbench.options import option


@dataclass(frozen=True)
class FIDInfinity(Metric):
    """FID∞: FID at several sample sizes, a line in 1/N, its value at 1/N = 0 (Chong & Forsyth 2020, section 4).

    The sizes are even between a tenth of n and n, each a random subset by a fixed seed; under balanced labels, a random
    subset with the same shares of the classes. The standard error is that of the value over other generated images
    (the infinitesimal jackknife: Efron 1982, chapter 6), against the same reference. The residuals of the line say
    little about it, since the subsets share their images. With fewer than 24 images per feature, FID is not a line in
    1/N down to the smallest subset, and the extrapolated value is biased by more than its error.
    """

    min_images: ClassVar[int] = 20
    min_images_per_feature: ClassVar[int] = 24
    layer: ClassVar[Layer] = "fid"
    ordered: ClassVar[bool] = True

    points: int = option(15, "sample sizes through which the line goes", ge=3, le=1000)

    def start(self, context: Context) -> Accumulator:
        return _Line(self.points, context)

    def estimator(self, stratified: bool) -> str | None:
        return "stratified, jackknife error" if stratified else "jackknife error"


class _Line(LabelledStore):
    def __init__(self, points: int, context: Context) -> None:
        super().__init__(context)
        self.points = points

    def result(self) -> dict[str, Any]:
        value, error = extrapolate(self.features(), self.context.reference.moments, self.points, self.labels())
        return {"value": value, "standard_error": error}


def extrapolate(features: Tensor, reference: Moments, points: int, labels: Tensor | None = None) -> tuple[float, float]:
    """(FID∞, its standard error) of features (n, d).

    FID∞ is Σ_p c_p FID(S_p) over subsets S_p of size n_p, with c the first row of the design matrix's pseudo-inverse.
    Image i has the influence u_i = Σ_p c_p [i ∈ S_p] ψ_p(x_i)/n_p, where ψ_p(x) is the derivative of FID(S_p) by the
    weight of x (`frechet_influence`). The error is √(n/(n-1) Σ u_i²).

    Args:
        reference: moments of the real images' features; taken as exact.
        points: how many subsets.
        labels: (n,) int64 where the number of images of each label is fixed, in an order whose every prefix has the
            same shares; None for independent draws. The influences are then taken within the classes.
    """
    n = len(features)
    sizes = np.linspace(max(2, n // 10), n, points).astype(int)
    generator = torch.Generator().manual_seed(0)
    subsets = [_shuffled(n, labels, generator)[:size] for size in sizes.tolist()]
    design = np.stack([np.ones(points), 1 / sizes], axis=1)
    values = np.empty(points)
    weights = np.linalg.pinv(design)[0].tolist()
    influence = torch.zeros(n, dtype=torch.float64)
    for i, (subset, weight) in enumerate(zip(subsets, weights, strict=True)):
        part = features[subset]
        moments = Moments.of(part)
        values[i] = frechet_distance(moments, reference)
        influences = frechet_influence(part, moments, reference)
        if labels is not None:
            strata = strata_of(labels[subset])
            counts = torch.bincount(strata)[strata].double()
            influences = centred(influences, strata) * (counts / (counts - 1).clamp(min=1)).sqrt()
        influence[subset] += weight / len(subset) * influences
    solution, *_ = np.linalg.lstsq(design, values, rcond=None)
    correction = n / (n - 1) if labels is None else 1.0
    return float(solution[0]), math.sqrt(correction * float(influence.square().sum()))


def _shuffled(n: int, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """The numbers 0 … n-1 in random order; with labels (n,), such that the i-th has the label of the i-th image."""
    order = torch.randperm(n, generator=generator)
    if labels is None:
        return order
    shuffled = torch.empty(n, dtype=torch.int64)
    # Both sorts are stable, so the images of a class fill its places in the random order.
    shuffled[labels.argsort(stable=True)] = order[labels[order].argsort(stable=True)]
    return shuffled
