"""FID∞: FID extrapolated to infinitely many images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from samplerbench.metrics.frechet import frechet_distance, frechet_influence
from samplerbench.metrics.metric import Accumulator, Context, FeatureMetric, LabelledStore, Layer
from samplerbench.metrics.moments import Moments
from samplerbench.metrics.strata import centred, strata_of
from samplerbench.options import option


@dataclass(frozen=True)
class FIDInfinity(FeatureMetric):
    """FID∞: a line in 1/N fitted to FID at several sample sizes N, at 1/N = 0 (Chong & Forsyth 2020, section 4).

    The sizes are evenly spaced between n/10 and n. Each size is a random subset with a fixed seed. With balanced
    labels, each subset has the class proportions of the whole set. The standard error is the error over other generated
    images with the same reference (infinitesimal jackknife; Efron 1982, chapter 6). The residuals of the line do not
    measure this error, because the subsets share images. With fewer than 24 images per feature, FID is not linear in
    1/N at the smallest sizes, and the bias of the extrapolation exceeds its error.
    """

    min_images: ClassVar[int] = 20
    min_images_per_feature: ClassVar[int] = 24
    layer: ClassVar[Layer] = "fid"
    ordered: ClassVar[bool] = True

    points: int = option(15, "number of sample sizes for the fit", ge=3, le=1000)

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
    """FID∞ and its standard error.

    FID∞ is Σ_p c_p FID(S_p) over subsets S_p of size n_p, with c the first row of the design matrix's pseudo-inverse.
    Image i has the influence u_i = Σ_p c_p [i ∈ S_p] ψ_p(x_i)/n_p, where ψ_p(x) is the derivative of FID(S_p) by the
    weight of x (`frechet_influence`). The error is √(n/(n-1) Σ u_i²).

    Args:
        features: (n, d), of the generated images.
        reference: moments of the real images' features, assumed exact.
        points: the number of subsets.
        labels: (n,) int64, if the number of images of each label is fixed; every prefix must have the same class
            proportions. The influences are then centred within each class. None for independent draws.

    Returns:
        (FID∞, standard error).
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
    """A random permutation of 0 … n-1. With labels (n,), entry i has the label of image i."""
    order = torch.randperm(n, generator=generator)
    if labels is None:
        return order
    shuffled = torch.empty(n, dtype=torch.int64)
    # Both sorts are stable, so the images of each class are permuted among the places of the class.
    shuffled[labels.argsort(stable=True)] = order[labels[order].argsort(stable=True)]
    return shuffled
