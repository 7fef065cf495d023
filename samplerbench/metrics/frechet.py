"""The Fréchet distance between two Gaussians."""

from __future__ import annotations

import torch

from samplerbench.metrics.moments import Moments


def frechet_distance(generated: Moments, reference: Moments) -> float:
    """‖μ₁-μ₂‖² + tr Σ₁ + tr Σ₂ - 2 tr (Σ₁Σ₂)^½ (Heusel et al. 2017, eq. 6; Dowson & Landau 1982).

    With Σ₂ = A Aᵀ, the eigenvalues of Σ₁Σ₂ are those of the symmetric matrix AᵀΣ₁A, so one Cholesky factor (kept
    with the reference) and one symmetric eigenvalue problem give the trace. Eigenvalues beyond the rank that the
    number of images allows are rounding noise around 0, whose square roots would add up; they are dropped.

    Raises:
        UserError: fewer than two vectors on either side.
    """
    covariance = generated.covariance
    device = covariance.device
    factor = reference.factor.to(device)
    values = torch.linalg.eigvalsh(factor.T @ covariance @ factor)
    rank = min(generated.rank, factor.shape[1])
    root_trace = values[len(values) - rank :].clamp(min=0).sqrt().sum()
    shift = generated.mean - reference.mean.to(device)
    traces = covariance.trace() + reference.covariance.trace().to(device)
    return float(shift @ shift + traces - 2 * root_trace)
