"""Forward processes: the relation between the network's coordinates y = α(σ) x and the state x = x₀ + σ z."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Process:
    """A forward process in variance-exploding coordinates.

    The input of the network is y = α(σ) x, with x = x₀ + σ z. Samplers that depend on the process use α, not the name.

    Attributes:
        name: name of the process.
        alpha: scale α(σ) of the network's coordinates, for σ ≥ 0. α(0) = 1.
        prior_scale: standard deviation of the initial state at noise level σ.
    """

    name: str
    alpha: Callable[[float], float] = field(repr=False)
    prior_scale: Callable[[float], float] = field(repr=False)


VARIANCE_PRESERVING = Process("variance preserving", lambda s: 1 / math.sqrt(1 + s**2), lambda s: math.sqrt(1 + s**2))
"""y = √ᾱ x₀ + √(1-ᾱ) z with σ = √(1-ᾱ)/√ᾱ: α = 1/√(1+σ²) (Ho et al. 2020; Song et al. 2021, VP SDE)."""

VARIANCE_EXPLODING = Process("variance exploding", lambda s: 1.0, lambda s: s)
"""y = x₀ + σ z: α = 1 (Song & Ermon 2019; Song et al. 2021, VE SDE; Karras et al. 2022)."""

RECTIFIED_FLOW = Process("rectified flow", lambda s: 1 / (1 + s), lambda s: 1 + s)
"""y = (1-t) x₀ + t z with σ = t/(1-t): α = 1 - t = 1/(1+σ) (Liu et al. 2023; Lipman et al. 2023)."""
