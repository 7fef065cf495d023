"""Streaming mean and covariance of feature vectors, in float64."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from samplerbench.errors import RunError, UserError, argument


class Moments:
    """Streaming count, mean and scatter matrix of feature vectors. Memory is O(d²), independently of n.

    Batches are merged by the pairwise update of Chan, Golub & LeVeque 1983, which avoids cancellation. The result does
    not depend on how the vectors are split into batches, up to rounding in float64.

    Args:
        dim: dimension d of the vectors.
        device: device of the mean and the scatter matrix.

    Attributes:
        n: the number of vectors.
        mean: (d,) float64.
        scatter: Σ (x - mean)(x - mean)ᵀ, (d, d) float64.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

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
        """The moments with a given mean and covariance.

        Args:
            mean: (d,).
            covariance: (d, d), the unbiased covariance.
            n: the number of vectors. None if it is unknown; the covariance may then have any rank.
        """
        moments = cls(len(mean))
        n = len(mean) + 1 if n is None else n
        moments.n, moments.mean = n, mean.double()
        moments.scatter = covariance.double() * (n - 1)
        return moments

    def update(self, features: Tensor) -> None:
        """Add features (B, d)."""
        if not len(features):
            return
        features = features.to(self.mean.device).double()
        mean, n = features.mean(dim=0), self.n + len(features)
        shift = mean - self.mean
        # The rank-one term is an additional row of the product, so the scatter matrix is read and written only once.
        between = shift * math.sqrt(self.n * len(features) / n)
        rows = torch.cat([features - mean, between[None]])
        self._become(n, self.mean + shift * (len(features) / n), torch.addmm(self.scatter, rows.T, rows))

    def merge(self, other: Moments) -> None:
        """Add all vectors of another stream."""
        if not other.n:
            return
        n = self.n + other.n
        shift = other.mean - self.mean
        scatter = torch.addr(self.scatter + other.scatter, shift, shift, alpha=self.n * other.n / n)
        self._become(n, self.mean + shift * (other.n / n), scatter)

    def _become(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        # New tensors, never modified in place, so that a returned state keeps its value.
        self.n, self.mean, self.scatter = n, mean, scatter
        for cached in ("cholesky", "factor"):
            self.__dict__.pop(cached, None)

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance, (d, d). Raises UserError for fewer than two vectors."""
        return self.scatter / self._degrees

    @property
    def total_variance(self) -> float:
        """The trace of the covariance. Raises UserError for fewer than two vectors."""
        return float(self.scatter.trace()) / self._degrees

    @property
    def _degrees(self) -> int:
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 images; there are {self.n}.")
        return self.n - 1

    @property
    def rank(self) -> int:
        """The maximum rank of the covariance: min(d, n-1)."""
        return min(len(self.mean), self.n - 1)

    @cached_property
    def cholesky(self) -> Tensor | None:
        """The lower triangular L (d, d) with L Lᵀ = covariance, on the CPU; None if the covariance is singular.

        Raises:
            UserError: fewer than two vectors.
            RunError: a mean or covariance that is not finite.
        """
        from scipy.linalg.lapack import dpotrf

        covariance = self.lapack_covariance()
        if self.rank < len(self.mean):
            return None
        factor, info = dpotrf(covariance, lower=1, clean=1, overwrite_a=1)
        return None if info else torch.from_numpy(factor)

    @cached_property
    def factor(self) -> Tensor:
        """A factor A (d, r) with A Aᵀ = covariance and r ≤ rank, on the CPU: the Cholesky factor.

        If the covariance is singular, A comes from the pivoted Cholesky decomposition, PᵀΣP = L Lᵀ (LAPACK's dpstrf;
        Higham 1990). It stops at the known rank, or if the largest remaining diagonal element is rounding noise.

        Raises:
            UserError: fewer than two vectors.
            RunError: a mean or covariance that is not finite.
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
        """The covariance (d, d) as a new NumPy array in Fortran order, as LAPACK requires.

        Raises:
            UserError: fewer than two vectors.
            RunError: a mean or covariance that is not finite.
        """
        covariance = self.covariance.cpu()
        if not (bool(covariance.isfinite().all()) and bool(self.mean.isfinite().all())):
            raise RunError(f"the features are not finite, so they have no covariance; try {argument('dtype', 'fp32')}.")
        return covariance.numpy().T  # the matrix is symmetric, so this only changes the memory order
