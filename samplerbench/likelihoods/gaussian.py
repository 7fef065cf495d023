"""Gaussian terms of a likelihood: the KL divergence, the discretised decoder and the prior of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from samplerbench.boundary import plugin_call
from samplerbench.errors import UserError
from samplerbench.models.model import Model

Variance = float | Tensor


def gaussian_kl(difference: Tensor, q: Variance, p: Variance) -> Tensor:
    """KL(N(m₁, q) ‖ N(m₂, p)) in each dimension: ½ (log(p/q) + (q + (m₁-m₂)²)/p - 1), in nats.

    Args:
        difference: m₁ - m₂, (B, C, H, W).
        q: variance of the first distribution.
        p: variance of the second distribution.

    Returns:
        The divergence, (B, C, H, W).
    """
    ratio = torch.as_tensor(q / p, dtype=torch.float64)
    return 0.5 * (difference.square() / p + (ratio - 1 - ratio.log()))


def gaussian_nll(x: Tensor, mean: Tensor, variance: Variance) -> Tensor:
    """-log N(x; mean, variance) in each dimension, (B, C, H, W) in nats."""
    log_variance = torch.as_tensor(variance, dtype=torch.float64).log()
    return 0.5 * ((x - mean).square() / variance + log_variance + math.log(2 * math.pi))


def discretised_nll(k: Tensor, levels: int, mean: Tensor, variance: Variance) -> Tensor:
    """-log P(k) of the discretised Gaussian decoder (Ho et al. 2020, eq. 13), in each dimension.

    P(k) is the mass of N(mean, variance) between the midpoints around the grey level -1 + 2k/(L-1). The bins of the
    first and the last level are open. The normal distribution function is exact, in log space; the authors' code
    approximates it with tanh, and bounds P(k) from below by 10⁻¹².

    Args:
        k: grey levels 0 … L-1, (B, C, H, W).
        levels: number L of grey levels.
        mean: mean of the decoder, (B, C, H, W) float64.
        variance: variance of the decoder.

    Returns:
        -log P(k), (B, C, H, W) float64 in nats.
    """
    deviation = torch.as_tensor(variance, dtype=torch.float64).sqrt()
    centre, half = -1 + 2 * k.double() / (levels - 1), 1 / (levels - 1)
    low, high = (centre - half - mean) / deviation, (centre + half - mean) / deviation
    low = torch.where(k == 0, -math.inf, low)
    high = torch.where(k == levels - 1, math.inf, high)
    # In the upper tail, Φ(high) - Φ(low) = Φ(-low) - Φ(-high) without cancellation.
    upper = low > 0
    low, high = torch.where(upper, -high, low), torch.where(upper, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return -(log_high + torch.log(-torch.expm1(log_low - log_high)))


@dataclass(frozen=True)
class GaussianPrior:
    """The distribution N(mean, deviation²) of a model's initial states at noise level σ_T, in float64.

    Attributes:
        mean: mean, (1, C, H, W).
        deviation: standard deviation, (1, C, H, W).
    """

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, model: Model, sigma: float) -> GaussianPrior:
        """The prior of a model at a noise level.

        Raises:
            UserError: if the initial states are not an affine function of the noise, pixel by pixel.
        """
        ones = torch.ones(1, *model.shape, dtype=torch.float64, device=model.device)
        with plugin_call(f"model {model.identity.get('source', type(model).__name__)}", "in prior"):
            mean = model.prior(torch.zeros_like(ones), sigma).double()
            above, below = (model.prior(z, sigma).double() for z in (ones, -ones))
        deviation = above - mean
        if not torch.allclose(mean - below, deviation, rtol=1e-5) or not bool((deviation > 0).all()):
            raise UserError("the initial states of this model are not Gaussian, so its likelihood is not known.")
        return cls(mean, deviation)

    def nll(self, x: Tensor) -> Tensor:
        """-log p(x) of states, (B,) in nats."""
        return gaussian_nll(x, self.mean, self.deviation.square()).flatten(1).sum(1)

    def kl(self, x0: Tensor, sigma: float) -> Tensor:
        """KL(q(x_T | x₀) ‖ p(x_T)) with q = N(x₀, σ_T²), (B,) in nats: the term L_T of the bound."""
        # Scaled by the deviation, because σ may be SIGMA_INFINITY.
        scaled = (x0 - self.mean) / self.deviation
        return gaussian_kl(scaled, (sigma / self.deviation).square(), 1.0).flatten(1).sum(1)
