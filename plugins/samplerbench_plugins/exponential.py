"""The φ functions of exponential integrators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


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


def adams_weights(nodes: Sequence[float], h: float, rate: float = 1.0) -> list[float]:
    """The weights w of Σ_j w_j D_j = r ∫₀^h e^{-r(h-u)} P(u) du, P interpolating D_j at the nodes.

    The moments are r ∫₀^h e^{-r(h-u)} u^k du = k! r h^{k+1} φ_{k+1}(-r h). The sum of the weights is 1 - e^{-r h}.

    Args:
        nodes: distinct places u_j in λ = -log σ, relative to the start of the step.
        h: length of the step in λ.
        rate: r: 1 for the ODE, 1 + τ² for an SDE.
    """
    powers = np.vander(np.array(nodes) / h, increasing=True).T
    moments = [math.factorial(k) * rate * h * phi(k + 1, -rate * h) for k in range(len(nodes))]
    return np.linalg.solve(powers, np.array(moments)).tolist()
