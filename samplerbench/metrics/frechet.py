"""The Fréchet distance between two Gaussians."""

from __future__ import annotations

import numpy as np

from samplerbench.metrics.moments import Moments


def frechet_distance(generated: Moments, reference: Moments) -> float:
    """‖μ₁-μ₂‖² + tr Σ₁ + tr Σ₂ - 2 tr (Σ₁Σ₂)^½ (Heusel et al. 2017, eq. 6; Dowson & Landau 1982).

    With Σ₂ = A Aᵀ, the eigenvalues of Σ₁Σ₂ are those of the symmetric AᵀΣ₁A (and 0), so one Cholesky factor, which is
    kept with its moments, and the eigenvalues of one symmetric matrix give the trace: `root_trace`.

    Raises:
        UserError: fewer than two vectors on either side.
        RunError: features that are not finite.
    """
    shift = generated.mean.cpu() - reference.mean.cpu()
    traces = generated.total_variance + reference.total_variance
    return float(shift @ shift) + traces - 2 * root_trace(generated, reference)


def root_trace(one: Moments, two: Moments) -> float:
    """tr (Σ₁Σ₂)^½, symmetric in its arguments.

    The factor is that of the side of lower rank, else of `two`; the matrix is r x r of that rank r, so there are no
    eigenvalues beyond the rank that the numbers of images allow: they would be rounding noise around 0, whose square
    roots add up. LAPACK runs on the CPU, whatever device the moments are on: dsygst makes LᵀΣL of a triangular L with a
    quarter of the operations of two products (as type 2 of the generalised problem; Martin & Wilkinson 1968), and the
    tridiagonal QR method needs no eigenvectors.
    """
    from scipy.linalg import eigvalsh
    from scipy.linalg.lapack import dsygst

    if one.rank < two.rank:
        one, two = two, one
    covariance, factor = one.lapack_covariance(), two.factor.numpy()
    if not factor.size:  # no vector of `two` differs from another
        return 0.0
    if two.cholesky is not None:
        projected, _ = dsygst(covariance, factor, itype=2, lower=1, overwrite_a=1)
    else:
        projected = factor.T @ covariance @ factor
    values = eigvalsh(projected, lower=True, overwrite_a=True, check_finite=False, driver="ev")
    return float(np.sqrt(values.clip(min=0)).sum())
