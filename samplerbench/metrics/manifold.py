"""Precision and recall of nearest-neighbour manifolds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.metrics.metric import Accumulator, Context, FeatureMetric, FeatureStore, Layer
from samplerbench.options import option


@dataclass(frozen=True)
class _Manifold(FeatureMetric):
    better: ClassVar[Literal["lower", "higher"]] = "higher"
    layer: ClassVar[Layer] = "prc"
    needs_real_images: ClassVar[bool] = True

    k: int = option(3, "number of the nearest neighbour that sets the radius of a ball", ge=1, le=1_000_000)

    @property
    def min_images(self) -> int:  # type: ignore[override]
        """The image itself, its k neighbours, and one more."""
        return self.k + 2

    @property
    def min_real_images(self) -> int:  # type: ignore[override]
        """The image itself and its k neighbours."""
        return self.k + 1


@dataclass(frozen=True)
class Precision(_Manifold):
    """Fraction of generated images within the k-nearest-neighbour ball of a real image (Kynkäänniemi et al. 2019)."""

    def start(self, context: Context) -> Accumulator:
        return _Coverage(self.k, context, swap=False)


@dataclass(frozen=True)
class Recall(_Manifold):
    """Fraction of real images within the k-nearest-neighbour ball of a generated image (Kynkäänniemi et al. 2019)."""

    def start(self, context: Context) -> Accumulator:
        return _Coverage(self.k, context, swap=True)


class _Coverage(FeatureStore):
    def __init__(self, k: int, context: Context, swap: bool) -> None:
        super().__init__()
        self.k, self.context, self.swap = k, context, swap

    def result(self) -> dict[str, Any]:
        generated, real = self.features(), self.context.real_features("prc")
        points, centres = (real, generated) if self.swap else (generated, real)
        return {"value": coverage(points, centres, self.k)}


def coverage(points: Tensor, centres: Tensor, k: int, chunk: int = 2048) -> float:
    """Fraction of the points that lie in at least one ball. A ball extends from a centre to its k-th nearest centre.

    Args:
        points: (n, d).
        centres: (m, d), m > k.
        k: number of the neighbour.
        chunk: the number of rows per block of the distance matrix.

    Raises:
        UserError: m ≤ k.
    """
    if len(centres) <= k:
        raise UserError(f"balls to the {k}-th neighbour need at least {k + 1} images; there are {len(centres)}.")
    points, centres = points.double(), centres.double()
    # The nearest centre is the centre itself, at distance 0.
    radii = torch.cat([torch.cdist(part, centres).kthvalue(k + 1, dim=1).values for part in centres.split(chunk)])
    inside = [(torch.cdist(part, centres) <= radii).any(dim=1) for part in points.split(chunk)]
    return float(torch.cat(inside).double().mean())
