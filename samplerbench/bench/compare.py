"""Which rows of a column can be told apart, and the noise floor they are seen against."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samplerbench.metrics.frechet import frechet_distance
from samplerbench.metrics.moments import Moments


@dataclass(frozen=True)
class Difference:
    """Of two rows' metric, block by block: the mean difference and its 95% half-width."""

    mean: float
    margin: float

    @property
    def tied(self) -> bool:
        """Whether zero is within the interval: the two cannot be told apart."""
        return abs(self.mean) <= self.margin


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Mean of a_i - b_i with Student's 95% interval; the blocks are paired, since samplers share x_T and labels.

    Raises:
        ValueError: fewer than two blocks, or different numbers of them.
    """
    from scipy.stats import t

    differences = [x - y for x, y in zip(a, b, strict=True)]
    n = len(differences)
    if n < 2:
        raise ValueError("a difference needs at least two blocks")
    spread = statistics.stdev(differences)
    return Difference(statistics.fmean(differences), float(t.ppf(0.975, n - 1)) * spread / math.sqrt(n))


def noise_floor(features: Tensor, size: int, splits: int = 5) -> tuple[float, float, int]:
    """(mean, standard deviation, size) of the FID between two disjoint random subsets of the real images.

    What a perfect generator of so many images would show against so many real ones. size is cut to half of the data.
    """
    half = min(size, len(features) // 2)
    values = []
    for seed in range(splits):
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        one, two = features[order[:half]], features[order[half : 2 * half]]
        values.append(frechet_distance(Moments.of(one), Moments.of(two)))
    return statistics.fmean(values), statistics.stdev(values), half
