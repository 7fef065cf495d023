"""Spherical interpolation between two starts."""

from __future__ import annotations

import torch
from torch import Tensor


def slerp(a: Tensor, b: Tensor, fraction: float) -> Tensor:
    """Spherical interpolation: sin((1-α)θ)/sin θ · a + sin(αθ)/sin θ · b, with the angle θ between a and b.

    Two samples of N(0, I) are nearly orthogonal and have nearly equal length. Points on the arc between them have the
    same length, whereas points on the straight line are shorter by up to √2. For θ = 0, and for θ = π where the arc is
    undefined, the straight line is used.

    Args:
        a: (B, C, H, W).
        b: (B, C, H, W).
        fraction: α; 0 gives a, and 1 gives b.

    Source: Shoemake 1985; Song, Meng & Ermon 2021, section 5.3 and eq. 67.
    """
    one, two = a.double().flatten(1), b.double().flatten(1)
    cosine = torch.nn.functional.cosine_similarity(one, two, dim=1, eps=0).nan_to_num(1.0)
    theta = cosine.clamp(-1, 1).arccos()
    straight = theta.sin() < 1e-6
    sine = torch.where(straight, 1.0, theta.sin())
    left = torch.where(straight, 1 - fraction, ((1 - fraction) * theta).sin() / sine)
    right = torch.where(straight, fraction, (fraction * theta).sin() / sine)
    return (left[:, None] * one + right[:, None] * two).reshape(a.shape).to(a.dtype)
