"""Mean and covariance of a stream of feature vectors, in float64."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from samplerbench.errors import RunError, UserError, argument


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
        if not len(features):
            return
        features = features.to(self.mean.device).double()
        mean, n = features.mean(dim=0), self.n + len(features)
        shift = mean - self.mean
        # The rank-one term of the merge is one more row of the product, so the scatter is read and written once.
        between = shift * math.sqrt(self.n * len(features) / n)
        rows = torch.cat([features - mean, between[None]])
        self._become(n, self.mean + shift * (len(features) / n), torch.addmm(self.scatter, rows.T, rows))

    def merge(self, other: Moments) -> None:
        """Take in everything that another stream has seen."""
        if not other.n:
            return
        n = self.n + other.n
        shift = other.mean - self.mean
        scatter = torch.addr(self.scatter + other.scatter, shift, shift, alpha=self.n * other.n / n)
        self._become(n, self.mean + shift * (other.n / n), scatter)

    def _become(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        # New tensors, never written into: a state that was given away keeps its value.
        self.n, self.mean, self.scatter = n, mean, scatter
        for cached in ("cholesky", "factor"):
            self.__dict__.pop(cached, None)

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance, (d, d). Raises UserError for fewer than two vectors."""
        return self.scatter / self._degrees

    @property
    def total_variance(self) -> float:
        """The covariance's trace. Raises UserError for fewer than two vectors."""
        return float(self.scatter.trace()) / self._degrees

    @property
    def _degrees(self) -> int:
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 images; there are {self.n}.")
        return self.n - 1

    @property
    def rank(self) -> int:
        """The largest rank the covariance can have: min(d, n-1)."""
        return min(len(self.mean), self.n - 1)

    @cached_property
    def cholesky(self) -> Tensor | None:
        """The lower triangular L (d, d) on the CPU with L Lᵀ = covariance; None where that is singular.

        Raises:
            UserError: fewer than two vectors. RunError: a mean or covariance that is not finite.
        """
        from scipy.linalg.lapack import dpotrf

        covariance = self.lapack_covariance()
        if self.rank < len(self.mean):
            return None
        factor, info = dpotrf(covariance, lower=1, clean=1, overwrite_a=1)
        return None if info else torch.from_numpy(factor)

    @cached_property
    def factor(self) -> Tensor:
        """A (d, r) on the CPU with A Aᵀ = covariance and r at most the rank: its Cholesky factor.

        Where the covariance is singular, the factor is that of the pivoted decomposition, PᵀΣP = L Lᵀ (LAPACK's
        dpstrf; Higham 1990), which ends at the known rank or where the largest diagonal element left is rounding noise.

        Raises:
            UserError: fewer than two vectors. RunError: a mean or covariance that is not finite.
        """
        from scipy.linalg.lapack import dpstrf

        if self.cholesky is not None:
            return self.cholesky
        lower, pivots, rank, _ = dpstrf(self.lapack_covariance(), lower=1, overwrite_a=1)
        rank = min(int(rank), self.rank)
        factor = torch.zeros(len(self.mean), rank, dtype=torch.float64)
        factor[torch.from_numpy(pivots).long() - 1] = torch.from_numpy(lower[:, :rank]).tril()
        return factor

    def lapack_covariance(self) -> np.ndarray:
        """The covariance (d, d) as a new numpy array in LAPACK's order.

        Raises:
            UserError: fewer than two vectors. RunError: a mean or covariance that is not finite.
        """
        covariance = self.covariance.cpu()
        if not (bool(covariance.isfinite().all()) and bool(self.mean.isfinite().all())):
            raise RunError(f"the features are not finite, so they have no covariance; try {argument('dtype', 'fp32')}.")
        return covariance.numpy().T  # it is symmetric, so this is only its order in memory
