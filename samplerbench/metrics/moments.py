"""Mean and covariance of a stream of feature vectors, in float64."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from samplerbench.errors import UserError


class Moments:
    """Count, mean and scatter of a stream: memory d² whatever n is.

    Batches are merged by the pairwise update of Chan, Golub & LeVeque 1983, which loses nothing to cancellation; so
    the result does not depend on how the stream was cut, up to the last bits of float64.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        """Σ (x - mean)(x - mean)ᵀ, (d, d)."""

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """The moments of features (n, d)."""
        features = features.double()
        moments = cls(features.shape[1], features.device)
        if len(features):
            moments.n = len(features)
            moments.mean = features.mean(dim=0)
            centred = features - moments.mean
            moments.scatter = centred.T @ centred
        return moments

    @classmethod
    def from_statistics(cls, mean: Tensor, covariance: Tensor, n: int | None) -> Moments:
        """The moments of n vectors with this mean (d,) and this unbiased covariance (d, d).

        n: None where it is not known; the covariance may then have any rank.
        """
        moments = cls(len(mean))
        n = len(mean) + 1 if n is None else n
        moments.n, moments.mean = n, mean.double()
        moments.scatter = covariance.double() * (n - 1)
        return moments

    def update(self, features: Tensor) -> None:
        """Take in features (B, d)."""
        self.merge(Moments.of(features.to(self.mean.device)))

    def merge(self, other: Moments) -> None:
        """Take in everything that another stream has seen."""
        n = self.n + other.n
        if not other.n:
            return
        shift = other.mean - self.mean
        self.scatter = self.scatter + other.scatter + torch.outer(shift, shift) * (self.n * other.n / n)
        self.mean = self.mean + shift * (other.n / n)
        self.n = n
        self.__dict__.pop("factor", None)

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance, (d, d). Raises UserError for fewer than two vectors."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 images; there are {self.n}.")
        return self.scatter / (self.n - 1)

    @property
    def rank(self) -> int:
        """The largest rank the covariance can have: min(d, n-1)."""
        return min(len(self.mean), self.n - 1)

    @cached_property
    def factor(self) -> Tensor:
        """A (d, r) with A Aᵀ = covariance: Cholesky's factor, or where it is singular, of the known rank by eigh."""
        covariance = self.covariance
        if self.rank == len(self.mean):
            factor, info = torch.linalg.cholesky_ex(covariance)
            if int(info) == 0:
                return factor
        values, vectors = torch.linalg.eigh(covariance)
        floor = values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
        keep = torch.arange(len(values), device=values.device) >= len(values) - self.rank
        keep &= values > floor
        return vectors[:, keep] * values[keep].sqrt()
