"""The sliced Wasserstein distance: optimal transport along random directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from samplerbench.metrics import Accumulator, Context, FeatureStore, Layer, Metric
from samplerbench.sampling import option
from torch import Tensor

CHUNK = 64
"""Number of directions per chunk, which limits the memory."""


@dataclass(frozen=True)
class SlicedWasserstein(Metric):
    """Sliced Wasserstein distance of the features of generated and real images (Bonneel et al. 2015).

    (mean over directions θ of W_p(θ·x, θ·y)^p)^(1/p), with θ uniform on the unit sphere, and
    W_p^p = ∫₀¹ |F⁻¹(u) - G⁻¹(u)|^p du, exact for the two empirical distributions, whatever their sizes.
    Unlike the Fréchet distance, it makes no assumption on the distribution of the features. The directions depend only
    on the seed and are the same for all samplers. Two finite samples of one distribution have a positive distance, so
    compare values with equal n.
    """

    layer: ClassVar[Layer] = "fid"
    needs_real_images: ClassVar[bool] = True

    directions: int = option(256, "number of directions", ge=1)
    power: float = option(2.0, "p of the distance", ge=1.0, le=8.0)
    seed: int = option(0, "random seed of the directions", ge=0)

    def start(self, context: Context) -> Accumulator:
        return _Projected(self, context)


class _Projected(FeatureStore):
    def __init__(self, metric: SlicedWasserstein, context: Context) -> None:
        super().__init__()
        self.metric, self.context = metric, context

    def result(self) -> dict[str, Any]:
        m = self.metric
        real = self.context.real_features(m.layer)
        return {"value": sliced_wasserstein(self.features(), real, m.directions, m.power, m.seed)}


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 256, power: float = 2.0, seed: int = 0) -> float:
    """(mean over θ of W_p(θ·x, θ·y)^p)^(1/p), in float64.

    Args:
        x: (n, d), features of the generated images.
        y: (m, d), features of the real images.
        directions: the number of directions θ.
        power: p.
        seed: random seed of the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(directions, x.shape[1], generator=generator, dtype=torch.float64)
    theta = theta / theta.norm(dim=1, keepdim=True)
    x, y = x.double().cpu(), y.double().cpu()
    parts = [wasserstein_1d(x @ part.T, y @ part.T, power) for part in theta.split(CHUNK)]
    return float(torch.cat(parts).mean() ** (1 / power))


def wasserstein_1d(x: Tensor, y: Tensor, power: float) -> Tensor:
    """W_p^p between two samples of numbers, for each column.

    The quantile functions are step functions with steps at i/n and j/m. Both are constant between neighbouring steps.
    The positions of the steps are integers in units of 1/(n m).

    Args:
        x: (n, L).
        y: (m, L).
        power: p.

    Returns:
        (L,).
    """
    n, m = len(x), len(y)
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    x, y = x.sort(dim=0).values, y.sort(dim=0).values
    distances = (x[starts // m] - y[starts // n]).abs() ** power
    return (distances * ((ends - starts).double() / (n * m))[:, None]).sum(dim=0)
