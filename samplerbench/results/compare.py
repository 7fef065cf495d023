"""Which rows of a column can be told apart, and the noise floor they are seen against."""

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


def unpaired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Difference of means with Welch's 95% interval, for blocks that share nothing (other seeds).

    Degrees of freedom by Welch & Satterthwaite: (v_a + v_b)² / (v_a²/(n_a - 1) + v_b²/(n_b - 1)), v = s²/n.

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
    """How much the metric of record a exceeds that of record b; None where there are not two finite blocks of each.

    Blocks of one seed are paired (they share x_T and labels), those of different seeds are not.
    """
    one, two = a["metrics"][metric].get("blocks") or [], b["metrics"][metric].get("blocks") or []
    if min(len(one), len(two)) < 2 or not all(map(math.isfinite, [*one, *two])):
        return None
    if a["seed"] == b["seed"] and len(one) == len(two):
        return paired_difference(one, two)
    return unpaired_difference(one, two)


def noise_floor(features: Tensor, size: int, splits: int = 5) -> tuple[float, float, int]:
    """(mean, standard deviation, size) of the FID between two disjoint random subsets of the real images.

    What a perfect generator of so many images would show against so many real ones. size is cut to half of the data.
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
