"""The solvers' coefficients and the spacings' timesteps are exact: against 40-digit arithmetic and rational numbers."""

from __future__ import annotations

import math
from functools import cache

import mpmath
import numpy as np
import pytest
import torch
from samplerbench_plugins.deis import DEIS, _integrals
from samplerbench_plugins.exponential import phi
from samplerbench_plugins.unipc import _weights
from support.denoising import denoiser

from samplerbench import registry
from samplerbench.models.exact import exact
from samplerbench.sampling import Spacing

T = 1000
EVERY = range(1, T + 1)


@cache
def spacing(spec: str) -> Spacing:
    return registry.parse("spacing", spec)


def timesteps(spec: str, steps: int, count: int = T) -> list[int]:
    """The timesteps of a spacing: the levels are their own numbers, from 1."""
    levels = torch.arange(1, count + 1, dtype=torch.float64)
    return (spacing(spec).grid(levels, steps)[:-1] - 1).int().tolist()


# --- Timesteps ------------------------------------------------------------------------------------------------------


def nearest(numerator: int, denominator: int) -> int:
    """The whole number nearest to a fraction, halves to even."""
    whole, rest = divmod(numerator, denominator)
    return whole + (2 * rest > denominator or (2 * rest == denominator and whole % 2 == 1))


def test_linspace_rounds_the_exact_fraction_halves_to_even_at_every_number_of_steps() -> None:
    assert timesteps("linspace", 1) == [T - 1]
    for steps in range(2, T + 1):
        expected = [nearest((T - 1) * i, steps - 1) for i in range(steps - 1, -1, -1)]
        assert timesteps("linspace", steps) == expected, steps


def test_linspace_differs_from_numpys_rounding_at_exact_halves_only() -> None:
    """diffusers rounds np.linspace, whose products are not exact: at 92 of 1000 numbers of steps it loses a half."""
    losing = 0
    for steps in range(2, T + 1):
        rounded = np.linspace(0, T - 1, steps).round()[::-1].astype(int).tolist()
        ours = timesteps("linspace", steps)
        differing = [i for i, (a, b) in enumerate(zip(ours, rounded, strict=True)) if a != b]
        assert all(2 * (T - 1) * (steps - 1 - i) % (steps - 1) == 0 for i in differing), steps
        losing += bool(differing)
    assert losing == 92


def test_trailing_and_quadratic_are_exact_at_every_number_of_steps() -> None:
    for steps in EVERY:
        exact_trailing = [nearest(T * (steps - i), steps) - 1 for i in range(steps)]
        assert timesteps("trailing", steps) == exact_trailing, steps
    for steps in range(2, 30):  # beyond, two would meet, and are pushed apart
        floors = [800 * i * i // (steps - 1) ** 2 for i in range(steps)]
        assert timesteps("quadratic", steps) == floors[::-1], steps


def test_quadratic_takes_the_fraction_as_it_is_written() -> None:
    """0.29 · 100 is 28.999999999999996 in floating point, and 29 timesteps."""
    assert timesteps("quadratic:fraction=0.29", 1, 100) == [29]
    for tenth in range(1, 10):
        assert timesteps(f"quadratic:fraction=0.{tenth}", 5, 1000)[0] == 100 * tenth


# --- DEIS -----------------------------------------------------------------------------------------------------------


def lagrange(knots: list[mpmath.mpf], j: int, at: mpmath.mpf) -> mpmath.mpf:
    value = mpmath.mpf(1)
    for i, knot in enumerate(knots):
        if i != j:
            value *= (at - knot) / (knots[j] - knot)
    return value


def gauss() -> list[tuple[mpmath.mpf, mpmath.mpf]]:
    """Gauss's rule of 60 points to 40 digits, by Newton's method from NumPy's nodes."""
    n, rule = 60, []
    with mpmath.workdps(40):
        for start in np.polynomial.legendre.leggauss(n)[0]:
            x = mpmath.mpf(float(start))
            for _ in range(3):
                value, before = x, mpmath.mpf(1)
                for k in range(1, n):
                    value, before = ((2 * k + 1) * x * value - k * before) / (k + 1), value
                slope = n * (x * value - before) / (x * x - 1)
                x = x - value / slope
            rule.append((x, 2 / ((1 - x * x) * slope * slope)))
    return rule


GAUSS = gauss()
STEPS = [(1000.0, 1.0), (157.0, 0.01), (1e5, 0.1), (2.0, 1.0), (1.0001, 1.0)]


@pytest.mark.parametrize(("s", "t"), STEPS, ids=[f"{s / t:g}" for s, t in STEPS])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("variable", ["sigma", "log-sigma"])
def test_deis_weights_are_the_integrals(variable: str, order: int, s: float, t: float) -> None:
    levels = [s * (s / t) ** (0.7 * k) for k in range(order + 1)]
    quadrature = DEIS(variable=variable)._quadrature(denoiser(exact("gaussian"), None, 1))
    found = _integrals(levels, t, quadrature)
    with mpmath.workdps(40):
        place = mpmath.log if variable == "log-sigma" else mpmath.mpf
        knots = [place(mpmath.mpf(level)) for level in levels]
        # In log σ the integrand is a polynomial times an exponential, which Gauss's rule knows to 40 digits.
        high, low = mpmath.log(s), mpmath.log(t)
        for j, weight in enumerate(found):
            integral = mpmath.mpf(0)
            for node, share in GAUSS:
                u = (high + low) / 2 + (low - high) / 2 * node
                at = u if variable == "log-sigma" else mpmath.exp(u)
                integral += (low - high) / 2 * share * lagrange(knots, j, at) * mpmath.exp(u)
            # Knots that are h apart in relative terms are known to ε/h.
            assert abs(weight - integral) <= 1e-12 * (s - t) / min(1.0, math.log(s / t)), j


@pytest.mark.parametrize("steps", [2, 3, 5, 20])
def test_deis_weights_in_time_are_the_integrals_of_the_spline(steps: int) -> None:
    """Each piece between two levels is a cubic of log σ: here 40 points in each half of it."""
    denoise = denoiser(exact("gaussian"), None, 1)
    grid = spacing("logsnr").grid(denoise.levels, steps).tolist()
    s, t = grid[steps - 2 : steps]
    levels = grid[: steps - 1][::-1][:4]
    quadrature = DEIS()._quadrature(denoise)
    logs = denoise.levels.log().numpy()
    pieces = np.unique(np.concatenate([[math.log(t), math.log(s)], logs[(logs > math.log(t)) & (logs < math.log(s))]]))
    pieces = np.sort(np.concatenate([pieces, (pieces[1:] + pieces[:-1]) / 2]))
    nodes, weights = np.polynomial.legendre.leggauss(40)
    half = np.diff(pieces) / 2
    u = ((pieces[1:] + pieces[:-1]) / 2)[:, None] + half[:, None] * nodes
    measure = -half[:, None] * weights * np.exp(u)
    knots = quadrature.time(np.log(levels))  # type: ignore[attr-defined]
    at = quadrature.time(u)  # type: ignore[attr-defined]
    for j, weight in enumerate(_integrals(levels, t, quadrature)):
        basis = np.ones_like(at)
        for other in np.delete(knots, j):
            basis = basis * (at - other) / (knots[j] - other)
        assert weight == pytest.approx((measure * basis).sum(), rel=1e-12, abs=1e-12 * s)


# --- Exponential integrators ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
def test_phi_is_accurate_to_rounding_at_every_step_size(k: int) -> None:
    for size in np.logspace(-14, 1.2, 40):
        for z in (size, -size):
            with mpmath.workdps(80):
                value = mpmath.exp(z)
                for j in range(k):
                    value = (value - 1 / mpmath.factorial(j)) / mpmath.mpf(z)
                expected = float(value)
            assert phi(k, float(z)) == pytest.approx(expected, rel=4e-15), z
    assert phi(k, 0.0) == pytest.approx(1 / math.factorial(k), rel=1e-15)


@pytest.mark.parametrize("h", [1e-7, 1e-5, 1e-3, 0.5, 5.0])
@pytest.mark.parametrize("ratios", [[-0.8, 1.0], [-0.8, -1.9, 1.0]])
def test_unipc_weights_solve_their_equations_at_every_step_size(ratios: list[float], h: float) -> None:
    found = _weights(ratios, -h, math.expm1(-h))
    with mpmath.workdps(60):
        value = (mpmath.exp(-h) - 1) / mpmath.mpf(-h)
        right = []
        for k in range(1, len(ratios) + 1):
            value = (value - 1 / mpmath.factorial(k)) / mpmath.mpf(-h)  # φ_{k+1}(-h)
            right.append(value * mpmath.factorial(k) * -h / mpmath.mpf(math.expm1(-h)))
        matrix = mpmath.matrix([[mpmath.mpf(r) ** k for r in ratios] for k in range(len(ratios))])
        expected = [float(w) for w in mpmath.lu_solve(matrix, mpmath.matrix(right))]
    assert found == pytest.approx(expected, rel=1e-13)
