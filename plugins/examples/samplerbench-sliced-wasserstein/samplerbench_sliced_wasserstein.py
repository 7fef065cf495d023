"""The sliced Wasserstein distance: optimal transport along random directions, where it is sorting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from samplerbench.metrics import Accumulator, Context, FeatureStore, Layer, Metric
from samplerbench.sampling import option
from torch import Tensor

CHUNK = 64
"""Directions at a time: memory for them, and as many numbers as there are images, in float64."""


@dataclass(frozen=True)
class SlicedWasserstein(Metric):
    """Sliced Wasserstein distance of the features of generated and real images (Bonneel et al. 2015).

    (mean over directions θ of W_p(θ·x, θ·y)^p)^(1/p), with θ uniform on the unit sphere, and
    W_p^p = ∫₀¹ |F⁻¹(u) - G⁻¹(u)|^p du, exact for the two empirical distributions, whatever their sizes.
    It assumes nothing of the features' distribution, as the Fréchet distance does. The directions are a function of the
    seed, the same for all samplers. Two finite samples of one distribution are not at distance 0: compare at equal n.
    """

    layer: ClassVar[Layer] = "fid"
    needs_real_images: ClassVar[bool] = True

    directions: int = option(256, "how many directions", ge=1)
    power: float = option(2.0, "p of the distance", ge=1.0, le=8.0)
    seed: int = option(0, "of the directions", ge=0)

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
    """(mean over θ of W_p(θ·x, θ·y)^p)^(1/p) of x (n, d) and y (m, d), in float64."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(directions, x.shape[1], generator=generator, dtype=torch.float64)
    theta = theta / theta.norm(dim=1, keepdim=True)
    x, y = x.double().cpu(), y.double().cpu()
    parts = [wasserstein_1d(x @ part.T, y @ part.T, power) for part in theta.split(CHUNK)]
    return float(torch.cat(parts).mean() ** (1 / power))


def wasserstein_1d(x: Tensor, y: Tensor, power: float) -> Tensor:
    """W_p^p of each column of x (n, L) and y (m, L), two samples of numbers: (L,).

    The quantile functions are steps, at i/n and at j/m. Between two neighbours of all these cuts both are constant; the
    cuts are counted in units of 1/(n m), in which they are whole numbers.
    """
    n, m = len(x), len(y)
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    x, y = x.sort(dim=0).values, y.sort(dim=0).values
    distances = (x[starts // m] - y[starts // n]).abs() ** power
    return (distances * ((ends - starts).double() / (n * m))[:, None]).sum(dim=0)
