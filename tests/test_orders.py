"""Measured orders of convergence, and the last step to σ = 0, which is measured apart.

The grids end at a fixed σ > 0, where the order is defined: from 157 to 0.1 even in log σ, with 32 to 1024 steps;
for iPNDM from 20 to 1 even in σ, with 256 to 4096.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.denoising import denoiser
from torch import Tensor

from samplerbench import registry
from samplerbench.models.exact import exact
from samplerbench.sampling import Denoiser, Noise, Sampler, Step, intervals
from samplerbench.sampling.driver import drive
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.testing.sampler import measure_order, order_errors

ORDERS = {
    "ddim": 1,
    "pf-ode:solver=euler": 1,
    "pf-ode:solver=heun": 2,
    "pf-ode:solver=rk4": 4,
    "heun": 2,
    **{f"dpm-solver:order={k}": k for k in (1, 2, 3)},
    **{f"dpm++:order={k}": k for k in (1, 2, 3)},
    "dpm++:method=singlestep": 2,
    **{f"unipc:order={p},variant={b}": p + 1 for p in (1, 2, 3) for b in ("B1", "B2")},
    **{f"unipc:order={p},corrector=false": p for p in (1, 2, 3)},
    **{f"deis:order={r}": r + 1 for r in (0, 1, 2, 3)},
    "deis:variable=sigma": 4,
    "deis:variable=log-sigma": 4,
    **{f"ipndm:order={k}": k for k in (1, 2, 3, 4)},
}
QUICK = (
    "ddim",
    "heun",
    "pf-ode:solver=rk4",
    "dpm-solver:order=3",
    "dpm++:order=2",
    "dpm++:order=3",
    "unipc:order=2,variant=B2",
    "deis:order=3",
)
"""The orders that the README's command measures; CI measures all of them."""
DETERMINISTIC = [*ORDERS, "pf-ode:solver=rk45"]


@pytest.mark.parametrize("problem", [pytest.param("gaussian", marks=pytest.mark.slow), "mixture"])
@pytest.mark.parametrize("spec", [pytest.param(s, marks=[pytest.mark.slow] if s not in QUICK else []) for s in ORDERS])
def test_measured_order_is_the_theorys(spec: str, problem: str) -> None:
    sampler = registry.parse("sampler", spec)
    slope, _ = measure_order(sampler, problem)
    assert slope == pytest.approx(ORDERS[spec], abs=0.2)
    assert sampler.convergence() == ORDERS[spec]


def test_the_measurement_is_against_the_exact_solution_by_a_fit_in_logarithms() -> None:
    """Euler's errors on the Gaussian from its recursion, each dimension a product of factors; then the slope."""
    model = exact("gaussian", shape="1x2x2")
    mean, v = model.problem.means.reshape(model.shape), model.problem.variances.reshape(model.shape)
    away = model.prior(normal(0, Purpose.PRIOR, torch.arange(4), 0, model.shape), 157.0) - mean
    expected = []
    for n in (32, 64, 128, 256, 512, 1024):
        grid = np.geomspace(157.0, 0.1, n + 1)
        kept = math.prod(1 + (t - s) * s / (v + s**2) for s, t in pairwise(grid))
        truth = ((v + 0.1**2) / (v + 157.0**2)).sqrt()
        expected.append((n, float((away * (kept - truth)).square().mean().sqrt())))
    found = order_errors(registry.parse("sampler", "ddim"), "gaussian")
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    last = np.log(np.array(expected[-4:]))
    slope, _ = measure_order(registry.parse("sampler", "ddim"), "gaussian")
    assert slope == pytest.approx(-np.polyfit(last[:, 0], last[:, 1], 1)[0], rel=1e-9)


@dataclass(frozen=True)
class HalfCurvature(Sampler):
    """DPM-Solver++ 3M as diffusers and the authors' code have it: half of the D'' term (see test_solvers_agree)."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        past: list[tuple[float, Tensor]] = []
        for s, t in intervals(sigmas):
            past = [(-math.log(s), denoise(x, s)), *past[:2]]
            h = math.log(s / t)
            phi1 = -math.expm1(-h)
            phi2 = 1 - phi1 / h
            at = np.array([level - past[0][0] for level, _ in past])
            rows = np.linalg.inv(np.vander(at, increasing=True))
            curve = [sum(c * d for c, (_, d) in zip(row, past, strict=True)) for row in rows]
            x = (t / s) * x + sum(
                c * d for c, d in zip((phi1, phi2 * h, -(phi2 / h - 0.5) * h**2), curve, strict=False)
            )
            yield Step(t, x)


@pytest.mark.parametrize("problem", ["gaussian", "mixture"])
def test_half_of_the_second_derivative_leaves_3m_at_order_2(problem: str) -> None:
    halved, _ = measure_order(HalfCurvature(), problem)
    whole, _ = measure_order(registry.parse("sampler", "dpm++:order=3"), problem)
    assert halved == pytest.approx(2, abs=0.2)
    assert whole == pytest.approx(3, abs=0.2)


# --- The step to σ = 0 ----------------------------------------------------------------------------------------------


def finish(spec: str, start: float, grid: list[float]) -> tuple[Tensor, Tensor]:
    """(final - μ)/(exact - μ) of a run over a grid that ends at 0, (B, *shape); and the variances, (*shape)."""
    model = exact("gaussian", shape="1x2x2")
    mean, v = model.problem.means.reshape(model.shape), model.problem.variances.reshape(model.shape)
    index = torch.arange(4)
    x = model.prior(normal(0, Purpose.PRIOR, index, 0, model.shape), start)
    noise = Noise(0, index, model.shape, torch.float64)
    final = drive(registry.parse("sampler", spec), denoiser(model, None, 4), x, torch.tensor(grid).double(), noise)
    limit = (v / (v + start**2)).sqrt() * (x - mean)
    return (final - mean) / limit, v


@pytest.mark.parametrize("spec", DETERMINISTIC)
def test_the_step_to_zero_leaves_a_known_error(spec: str) -> None:
    """x ← D shrinks x - μ by v/(v+σ²) where the ODE shrinks it by the root: a relative error of σ²/(2v)."""
    start = float(exact("gaussian").levels[0])  # rk45 stops at the model's smallest level
    ratio, v = finish(spec, start, [start, 0.0])
    torch.testing.assert_close(ratio, (v / (v + start**2)).sqrt().expand_as(ratio), rtol=1e-9, atol=0)
    torch.testing.assert_close(1 - ratio, (start**2 / (2 * v)).expand_as(ratio), rtol=1e-2, atol=0)


@pytest.mark.parametrize("spec", ["deis", "unipc", "dpm++:order=3", "dpm-solver:order=3", "pf-ode:solver=rk4"])
def test_of_a_long_run_nothing_but_that_error_is_left(spec: str) -> None:
    low = 0.05
    ratio, v = finish(spec, 157.0, [*np.geomspace(157.0, low, 400), 0.0])
    torch.testing.assert_close(ratio, (v / (v + low**2)).sqrt().expand_as(ratio), rtol=1e-5, atol=0)
    assert float((1 - ratio).abs().min()) > 1e-3
