"""Significance of differences between rows, and the noise floor."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """The mean difference of two rows over blocks, with half the width of its 95% interval (`margin`)."""

    mean: float
    margin: float

    @property
    def tied(self) -> bool:
        """Whether the interval contains zero, so the difference is not significant."""
        return abs(self.mean) <= self.margin


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Mean of a_i - b_i with Student's 95% interval. Blocks are paired, because samplers share x_T and labels.

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


def unpaired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Difference of means with Welch's 95% interval, for independent blocks (different seeds).

    Degrees of freedom (Welch-Satterthwaite): (v_a + v_b)² / (v_a²/(n_a - 1) + v_b²/(n_b - 1)), v = s²/n.

    Raises:
        ValueError: fewer than two blocks on either side.
    """
    from scipy.stats import t

    if min(len(a), len(b)) < 2:
        raise ValueError("a difference needs at least two blocks")
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    mean = statistics.fmean(a) - statistics.fmean(b)
    if va + vb == 0:
        return Difference(mean, 0.0)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return Difference(mean, float(t.ppf(0.975, freedom)) * math.sqrt(va + vb))


def difference(a: dict[str, Any], b: dict[str, Any], metric: str) -> Difference | None:
    """The difference of a metric between records a and b (a - b); None without two finite blocks of each.

    Blocks with the same seed are paired, because they share x_T and labels. Blocks with different seeds are not.
    """
    one, two = a["metrics"][metric].get("blocks") or [], b["metrics"][metric].get("blocks") or []
    if min(len(one), len(two)) < 2 or not all(map(math.isfinite, [*one, *two])):
        return None
    if a["seed"] == b["seed"] and len(one) == len(two):
        return paired_difference(one, two)
    return unpaired_difference(one, two)


def noise_floor(features: Tensor, size: int, splits: int = 5) -> tuple[float, float, int]:
    """The FID between two disjoint random subsets of the real images.

    This is the FID of a perfect generator, with `size` images on both sides.

    Args:
        features: (n, d), of the real images.
        size: size of a subset, at most n/2.
        splits: number of repetitions.

    Returns:
        Mean, standard deviation, and the size that was used.
    """
    import torch

    from samplerbench.metrics.frechet import frechet_distance
    from samplerbench.metrics.moments import Moments

    half = min(size, len(features) // 2)
    values = []
    for seed in range(splits):
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        one, two = features[order[:half]], features[order[half : 2 * half]]
        values.append(frechet_distance(Moments.of(one), Moments.of(two)))
    return statistics.fmean(values), statistics.stdev(values), half
