"""The Fréchet distance between two Gaussians."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from samplerbench.metrics.moments import Moments


def frechet_distance(generated: Moments, reference: Moments) -> float:
    """The squared Fréchet distance between two Gaussians (Heusel et al. 2017, eq. 6; Dowson & Landau 1982).

    ‖μ₁-μ₂‖² + tr Σ₁ + tr Σ₂ - 2 tr (Σ₁Σ₂)^½. With Σ₂ = A Aᵀ, the eigenvalues of Σ₁Σ₂ are those of the symmetric matrix
    AᵀΣ₁A (and 0). The trace therefore needs one Cholesky factor, which is cached with its moments, and the eigenvalues
    of one symmetric matrix (`root_trace`).

    Args:
        generated: moments of the generated images' features.
        reference: moments of the real images' features.

    Raises:
        UserError: fewer than two vectors on either side.
        RunError: features that are not finite.
    """
    shift = generated.mean.cpu() - reference.mean.cpu()
    traces = generated.total_variance + reference.total_variance
    return float(shift @ shift) + traces - 2 * root_trace(generated, reference)


def root_trace(one: Moments, two: Moments) -> float:
    """tr (Σ₁Σ₂)^½, symmetric in its arguments.

    The factor is taken from the covariance of lower rank r, so the matrix is r x r. A larger matrix would have
    additional eigenvalues that are rounding noise around 0, and their square roots would add up. The computation runs
    on the CPU with LAPACK: dsygst computes LᵀΣL for a triangular L with a quarter of the operations of two matrix
    products (type 2 of the generalised problem; Martin & Wilkinson 1968), and the tridiagonal QR method computes
    eigenvalues without eigenvectors.
    """
    from scipy.linalg import eigvalsh
    from scipy.linalg.lapack import dsygst

    if one.rank < two.rank:
        one, two = two, one
    covariance, factor = one.lapack_covariance(), two.factor.numpy()
    if not factor.size:  # all vectors of `two` are equal
        return 0.0
    if two.cholesky is not None:
        projected, _ = dsygst(covariance, factor, itype=2, lower=1, overwrite_a=1)
    else:
        projected = factor.T @ covariance @ factor
    values = eigvalsh(projected, lower=True, overwrite_a=True, check_finite=False, driver="ev")
    return float(np.sqrt(values.clip(min=0)).sum())


def frechet_influence(features: Tensor, moments: Moments, reference: Moments) -> Tensor:
    """The derivative of the Fréchet distance with respect to the weight of each feature vector.

    With weights p_i that sum to 1, ψ_i = d/dε FID((1-ε) p + ε δ_i) at p_i = 1/n, ε = 0. With y = x_i - μ₁, Σ₂ = A Aᵀ
    and c = n/(n-1), it is 2 (μ₁-μ₂)ᵀy + c ‖y‖² - tr Σ₁ - c yᵀA (AᵀΣ₁A)^-½ Aᵀy + tr (Σ₁Σ₂)^½. The inverse is that on
    the range of AᵀΣ₁A, which holds Aᵀy. The ψ_i sum to 0.

    Args:
        features: (n, d), of the generated images.
        moments: the moments of `features`.
        reference: moments of the real images' features.

    Returns:
        ψ (n,) float64.

    Raises:
        UserError: fewer than two vectors on either side.
        RunError: features that are not finite.
    """
    covariance = torch.from_numpy(moments.lapack_covariance())
    n, mean, factor = moments.n, moments.mean.cpu(), reference.factor
    y = features.cpu().double() - mean
    # Σ_k (v_kᵀAᵀy)²/√λ_k over the eigenpairs of AᵀΣ₁A; with B = YA, BBᵀ/(n-1) has the same λ_k and may be smaller.
    if n < factor.shape[1]:
        projected = y @ factor
        values, vectors = torch.linalg.eigh(projected @ projected.T / (n - 1))
        roots = _roots(values)
        transported = (n - 1) * vectors.square() @ roots
    else:
        values, vectors = torch.linalg.eigh(factor.T @ covariance @ factor)
        roots = _roots(values)
        weights = torch.where(roots > 0, 1 / roots, 0).sqrt()
        transported = (y @ (factor @ (vectors * weights))).square().sum(dim=1)
    quadratic = n / (n - 1) * (y.square().sum(dim=1) - transported)
    return 2 * y @ (mean - reference.mean.cpu()) + quadratic - moments.total_variance + float(roots.sum())


def _roots(values: Tensor) -> Tensor:
    """The square roots of eigenvalues (r,) in ascending order, with rounding noise set to 0."""
    if not len(values):
        return values
    noise = float(values[-1].clamp(min=0)) * len(values) * torch.finfo(torch.float64).eps
    return torch.where(values > noise, values.clamp(min=0).sqrt(), 0)
