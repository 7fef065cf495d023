"""DEIS sampling with Adams-Bashforth weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step, intervals, is_infinite, option, runge_kutta
from samplerbench_plugins.dpm_solver import singlestep

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


@dataclass(frozen=True)
class DEIS(Sampler):
    """Diffusion exponential integrator sampler, Adams-Bashforth (Zhang & Chen 2023, eq. 14 and 15): tAB0 … tAB3.

    For x = x₀ + σ z the semilinear ODE is dx = ε dσ with ε = (x - D)/σ. A step is  x ← x + Σ_j C_j ε_j  over the last
    r+1 evaluations, with C_j = ∫ ℓ_j dσ and the Lagrange polynomials ℓ_j in one of three variables: the model's time t
    (tAB), σ (ρAB), or log σ as in diffusers. A polynomial of degree r gives order r+1 of convergence.
    The last interval, to σ = 0, is x ← D.

    The first steps have lower order. If sampling starts at a large σ, where D hardly changes, the order is not
    reduced. If it starts at a σ of the size of the data, the order is at most 2. With start=singlestep the first r-1
    steps are DPM-Solver-r, each with r-1 more evaluations, and the order holds from any start.
    For a rectified flow, the time of tAB is t = σ/(1+σ), the first steps of start=singlestep are Runge-Kutta steps in
    t, and the first interval from t = 1, where σ is infinite, is x ← D + σ' ε for start=lower-order.
    """

    spacing = "logsnr"
    from_infinity = True

    order: int = option(3, "degree r of the polynomial: tAB-r", ge=0, le=3)
    variable: Literal["t", "sigma", "log-sigma"] = option("t", "variable of the polynomial for ε")

    start: Literal["lower-order", "singlestep"] = option(
        "lower-order", "first steps for order=2 and 3: lower-order, or singlestep with more evaluations"
    )

    @property
    def _starts(self) -> int:
        """The number of singlestep steps, and of additional evaluations in each of them."""
        return max(0, self.order - 1) if self.start == "singlestep" else 0

    def nfe(self, steps: int) -> int:
        return steps + self._starts * min(self._starts, steps - 1)

    def convergence(self) -> int:
        return self.order + 1

    def convergence_from_any_start(self) -> int:
        return self.order + 1 if self._starts else min(2, self.order + 1)

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        quadrature = self._quadrature(denoise)
        past: list[tuple[float, Tensor]] = []  # (σ, ε), latest first
        start = runge_kutta if denoise.process.ends else singlestep
        for i, (s, t) in enumerate(intervals(sigmas)):
            x0 = denoise(x, s)
            if self.variable == "log-sigma" and past and is_infinite(past[0][0]):
                past = []  # the polynomial in log σ has no node at σ = ∞
            past = [(s, (x - x0) / s), *past[: self.order]]
            if t == 0:
                x = x0
            elif is_infinite(s) or i < self._starts:
                x = start(denoise, x, x0, s, t, self.order if self._starts else 1)
            else:
                weights = _integrals([level for level, _ in past], t, quadrature)
                x = x + sum(w * epsilon for w, (_, epsilon) in zip(weights, past, strict=True))
            yield Step(t, x, x0)

    def _quadrature(self, denoise: Denoiser) -> Quadrature:
        """A quadrature rule for ∫ f(variable) dσ, exact up to rounding for the polynomials of this method."""
        if self.variable == "sigma":
            return _in_sigma
        if self.variable == "log-sigma":
            return _in_log_sigma
        from scipy.interpolate import CubicSpline

        levels = denoise.levels.numpy()
        logs = np.log(levels)
        if denoise.process.ends:
            return _InTime(logs, lambda log: 1 / (1 + np.exp(-log)))
        return _InTime(logs, CubicSpline(logs, np.arange(len(levels)) / len(levels)))


Array = np.ndarray
Quadrature = Callable[[list[float], float], tuple[Array, Array, Array]]
"""(levels, t) → the variable at the levels, the variable at the quadrature points, and the weights of the points."""


def _panels(edges: Array) -> tuple[Array, Array]:
    """Gauss-Legendre points and weights of all intervals between neighbouring edges."""
    middle, half = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    return (middle[:, None] + half[:, None] * _NODES).ravel(), (half[:, None] * _WEIGHTS).ravel()


def _in_sigma(levels: list[float], t: float) -> tuple[Array, Array, Array]:
    points, weights = _panels(np.array([levels[0], t]))
    return np.array(levels), points, weights


def _in_log_sigma(levels: list[float], t: float) -> tuple[Array, Array, Array]:
    """Quadrature in u = log(σ/s), with dσ = s eᵘ du. Quadrature in σ would be inaccurate for large steps."""
    s = levels[0]
    length = math.log(t / s)
    points, weights = _panels(np.linspace(0.0, length, 2 + int(-length / 5)))
    return np.log(np.array(levels) / s), points, weights * (s * np.exp(points))


@dataclass(frozen=True)
class _InTime:
    """Quadrature in log σ between the model's levels, where the model's time is a cubic polynomial of log σ."""

    logs: Array
    time: Callable[[Array], Array]

    def __call__(self, levels: list[float], t: float) -> tuple[Array, Array, Array]:
        high, low = math.log(levels[0]), math.log(t)
        inner = self.logs[(self.logs > low) & (self.logs < high)]
        points, weights = _panels(np.array([high, *inner[::-1], low]))
        return self.time(np.log(levels)), self.time(points), weights * np.exp(points)


def _integrals(levels: list[float], t: float, quadrature: Quadrature) -> list[float]:
    """∫ ℓ_j dσ from levels[0] to t, for the Lagrange polynomials ℓ_j through the levels."""
    knots, at, weights = quadrature(levels, t)
    integrals = []
    for j, knot in enumerate(knots):
        values = np.ones_like(at)
        for other in np.delete(knots, j):
            values = values * (at - other) / (knot - other)
        integrals.append(float((weights * values).sum()))
    return integrals
