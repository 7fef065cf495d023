"""The φ functions of exponential integrators."""

from __future__ import annotations

import math


def phi(k: int, z: float) -> float:
    """φ_k(z) = Σ_j z^j/(j+k)!: φ_0 = e^z, and φ_k = (φ_{k-1} - 1/(k-1)!)/z (Hochbruck & Ostermann 2010, eq. 2.10).

    Accurate up to rounding for every real z. For small |z| the series is used, because the recursion loses k digits at
    z = 10⁻¹, and all digits at z = 10⁻⁵ for k = 3.

    Args:
        k: index, at least 0.
        z: argument: -h or h of a step, with h = log(s/t).
    """
    if abs(z) < 2:
        term, total, j = 1 / math.factorial(k), 0.0, 0
        while abs(term) > 1e-18 * abs(total):
            total += term
            j += 1
            term *= z / (j + k)
        return total
    value = math.exp(z)
    for j in range(k):
        value = (value - 1 / math.factorial(j)) / z
    return value
