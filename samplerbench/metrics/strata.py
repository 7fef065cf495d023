"""Stratified estimates: images with a fixed number per class."""

from __future__ import annotations

import torch
from torch import Tensor

SINGLE_SHARE = 0.1
"""The maximum fraction of images that may be the only image of their class."""


def single_images(labels: Tensor) -> int:
    """The number of images that are the only image of their class. labels: (n,) int64."""
    return int((torch.bincount(labels) == 1).sum())


def strata_of(labels: Tensor) -> Tensor:
    """The stratum of each image: its class, where classes with a single image are merged.

    A class with a single image has no pairs. All such classes form one stratum ("collapsed strata"; Wolter 2007,
    section 2.5). If there is only one such class, it is merged with the smallest other class.

    Args:
        labels: (n,) int64.

    Returns:
        (n,) int64, each stratum with at least two images.
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
    """The variance of a mean: var/n for independent draws, Σ_a n_a var_a / n² for stratified draws.

    Args:
        values: (n,).
        strata: (n,) int64, each with at least two values, or None for independent draws. var_a is the variance within
            stratum a.
    """
    n = len(values)
    if strata is None:
        return float(values.var()) / n
    counts = torch.bincount(strata).double()
    squares = torch.zeros(len(counts), dtype=values.dtype).index_add(0, strata, centred(values, strata).square())
    several = counts > 1
    return float((counts[several] / (counts[several] - 1) * squares[several]).sum()) / n**2


def centred(values: Tensor, strata: Tensor) -> Tensor:
    """Values (n,) minus the mean of their stratum (n,) int64."""
    counts = torch.bincount(strata)
    means = torch.zeros(len(counts), dtype=values.dtype).index_add(0, strata, values) / counts.clamp(min=1)
    return values - means[strata]
