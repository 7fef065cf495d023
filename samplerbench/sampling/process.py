"""Forward processes: the relation between the network's coordinates y = α(σ) x and the state x = x₀ + σ z."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

SIGMA_INFINITY = 2.0**54
"""The noise level that stands for σ = ∞, the time t = 1 of a rectified flow.

It is finite, so that x = σ z is a state like any other, and so large that the limit is exact in float64 and float32:
1 + σ = σ, t = σ/(1+σ) = 1, y = x/(1+σ) = z, and a step to σ' gives D + σ' z up to rounding. σ² does not overflow in
float32."""


def is_infinite(sigma: float) -> bool:
    """Whether a noise level stands for σ = ∞ (`SIGMA_INFINITY`): the state is pure noise."""
    return sigma >= SIGMA_INFINITY


@dataclass(frozen=True)
class Process:
    """A forward process in variance-exploding coordinates.

    The input of the network is y = α(σ) x, with x = x₀ + σ z. Samplers that depend on the process use α, not the name.

    Attributes:
        name: name of the process.
        alpha: scale α(σ) of the network's coordinates, for σ ≥ 0. α(0) = 1.
        prior_scale: standard deviation of the initial state at noise level σ.
        time: variable τ(σ) of the probability-flow ODE (`sampling.ode`): σ, or t of a rectified flow.
        level: its inverse σ(τ). `SIGMA_INFINITY` at t = 1.
    """

    name: str
    alpha: Callable[[float], float] = field(repr=False)
    prior_scale: Callable[[float], float] = field(repr=False)
    time: Callable[[float], float] = field(default=float, repr=False)
    level: Callable[[float], float] = field(default=float, repr=False)

    @property
    def ends(self) -> bool:
        """Whether the process reaches pure noise, σ = ∞, at a finite time, as a rectified flow does at t = 1."""
        return self.time is not float


VARIANCE_PRESERVING = Process("variance preserving", lambda s: 1 / math.sqrt(1 + s**2), lambda s: math.sqrt(1 + s**2))
"""y = √ᾱ x₀ + √(1-ᾱ) z with σ = √(1-ᾱ)/√ᾱ: α = 1/√(1+σ²) (Ho et al. 2020; Song et al. 2021, VP SDE)."""

VARIANCE_EXPLODING = Process("variance exploding", lambda s: 1.0, lambda s: s)
"""y = x₀ + σ z: α = 1 (Song & Ermon 2019; Song et al. 2021, VE SDE; Karras et al. 2022)."""


def flow_time(sigma: float) -> float:
    """The time of a rectified flow, t = σ/(1+σ). Exactly 1 at `SIGMA_INFINITY`."""
    return sigma / (1 + sigma)


def flow_level(t: float) -> float:
    """The noise level of a rectified flow at time t, σ = t/(1-t). `SIGMA_INFINITY` at t = 1."""
    return t / (1 - t) if t < 1 else SIGMA_INFINITY


RECTIFIED_FLOW = Process("rectified flow", lambda s: 1 / (1 + s), lambda s: 1 + s, flow_time, flow_level)
"""y = (1-t) x₀ + t z with σ = t/(1-t): α = 1 - t = 1/(1+σ) (Liu et al. 2023; Lipman et al. 2023)."""
