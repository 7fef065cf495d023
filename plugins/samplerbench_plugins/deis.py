"""DEIS with Adams-Bashforth weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step, intervals, option

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


@dataclass(frozen=True)
class DEIS(Sampler):
    """Diffusion exponential integrator sampler, Adams-Bashforth (Zhang & Chen 2023, eq. 14 and 15): tAB0 … tAB3.

    In these coordinates the semilinear ODE is dx = ε dσ with ε = (x - D)/σ, so  x ← x + Σ_j C_j ε_j  over the last
    order+1 evaluations, with C_j = ∫ ℓ_j dσ over the step and ℓ_j Lagrange's polynomials in the variable: the model's
    time t (tAB), σ (ρAB), or log σ, as in diffusers. Order r of the polynomial is order r+1 of convergence.
    The last interval, to σ = 0, is x ← D.
    """

    spacing = "logsnr"

    order: int = option(3, "degree r of the polynomial: tAB-r", ge=0, le=3)
    variable: Literal["t", "sigma", "log-sigma"] = option("t", "what ε is a polynomial in")

    def convergence(self) -> int:
        return self.order + 1

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        place = self._place(denoise)
        past: list[tuple[float, Tensor]] = []  # (σ, ε), the latest first
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            past = [(s, (x - x0) / s), *past[: self.order]]
            if t == 0:
                x = x0
            else:
                weights = _integrals([level for level, _ in past], s, t, place)
                x = x + sum(w * epsilon for w, (_, epsilon) in zip(weights, past, strict=True))
            yield Step(t, x, x0)

    def _place(self, denoise: Denoiser) -> Callable[[np.ndarray], np.ndarray]:
        """σ → the variable of the polynomial."""
        if self.variable == "sigma":
            return lambda sigma: sigma
        if self.variable == "log-sigma":
            return np.log
        from scipy.interpolate import CubicSpline

        levels = denoise.levels.numpy()
        spline = CubicSpline(np.log(levels), np.arange(len(levels)) / len(levels))
        return lambda sigma: spline(np.log(sigma))


def _integrals(levels: list[float], s: float, t: float, place: Callable[[np.ndarray], np.ndarray]) -> list[float]:
    """∫_s^t ℓ_j dσ for Lagrange's polynomials through the levels, by Gauss-Legendre quadrature in σ."""
    points = (s + t) / 2 + (t - s) / 2 * _NODES
    at, knots = place(points), place(np.array(levels))
    found = []
    for j, knot in enumerate(knots):
        values = np.ones_like(at)
        for other in np.delete(knots, j):
            values = values * (at - other) / (knot - other)
        found.append(float((t - s) / 2 * (_WEIGHTS * values).sum()))
    return found
