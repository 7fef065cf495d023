"""Images drawn in fixed numbers for each class, and what that changes in an estimate."""

from __future__ import annotations

import torch
from torch import Tensor

SINGLE_SHARE = 0.1
"""The largest share of images that may be the only image of their class."""


def single_images(labels: Tensor) -> int:
    """How many of the images with these labels (n,) int64 are the only image of their class."""
    return int((torch.bincount(labels) == 1).sum())


def strata_of(labels: Tensor) -> Tensor:
    """The strata (n,) int64 of images with these labels (n,) int64: their classes, each with at least two images.

    Classes with a single image have no pair of their own. They form one stratum together ("collapsed strata"; Wolter
    2007, section 2.5), and if there is only one such class, it joins the smallest other class.
    """
    counts = torch.bincount(labels)
    single = counts == 1
    if not single.any():
        return labels
    if int(single.sum()) == 1:
        others = counts.where(counts > 1, counts.max() + 1)
        target = int(others.argmin()) if bool((counts > 1).any()) else int(single.int().argmax())
    else:
        target = int(single.int().argmax())
    return labels.where(~single[labels], torch.full_like(labels, target))


def variance_of_mean(values: Tensor, strata: Tensor | None = None) -> float:
    """The variance of the mean of values (n,): var/n for independent draws, Σ_a n_a var_a / n² for stratified ones.

    Args:
        strata: (n,) int64, each with at least two values, or None. var_a is the variance within stratum a.
    """
    n = len(values)
    if strata is None:
        return float(values.var()) / n
    counts = torch.bincount(strata).double()
    squares = torch.zeros(len(counts), dtype=values.dtype).index_add(0, strata, centred(values, strata).square())
    several = counts > 1
    return float((counts[several] / (counts[several] - 1) * squares[several]).sum()) / n**2


def centred(values: Tensor, strata: Tensor) -> Tensor:
    """Values (n,) minus the mean of their stratum, (n,)."""
    counts = torch.bincount(strata)
    means = torch.zeros(len(counts), dtype=values.dtype).index_add(0, strata, values) / counts.clamp(min=1)
    return values - means[strata]
