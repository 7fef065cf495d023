"""Samplers on a Gaussian, whose denoiser and whose ODE are known in closed form: no network, no reference, no luck."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from samplerbench import registry
from samplerbench.sampling import Denoiser, Noise, Prediction, Sigma
from samplerbench.sampling.denoiser import coefficient
from samplerbench.sampling.driver import drive
from samplerbench.sampling.process import VARIANCE_EXPLODING, VARIANCE_PRESERVING, Process

MEAN, DEVIATION = 0.3, 0.5
START, END = 20.0, 0.05


class Gaussian(Denoiser):
    """x₀ ~ N(μ, s²):  D = μ + s²/(s²+σ²) (x - μ)."""

    def __init__(self, process: Process = VARIANCE_PRESERVING) -> None:
        self.levels = torch.logspace(math.log10(END), math.log10(START), 100, dtype=torch.float64)
        self.process = process

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        share = DEVIATION**2 / (DEVIATION**2 + sigma**2)
        return Prediction(MEAN + coefficient(share, x) * (x - MEAN))

    def rows(self, index: Tensor) -> Denoiser:
        return self


def exact_flow(x: Tensor, start: float, end: float) -> Tensor:
    """The solution of the probability-flow ODE at `end` that is x at `start`."""
    return MEAN + math.sqrt((DEVIATION**2 + end**2) / (DEVIATION**2 + start**2)) * (x - MEAN)


def prior(n: int) -> Tensor:
    return START * torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def step_noise(n: int) -> Noise:
    return Noise(1, torch.arange(n), (1, 1, 1), torch.float64)


def levels(*sigmas: float) -> Tensor:
    return torch.tensor(sigmas, dtype=torch.float64)


def run(spec: str, x: Tensor, sigmas: Tensor, denoise: Denoiser | None = None) -> tuple[Tensor, Noise]:
    noise = step_noise(len(x))
    return drive(registry.parse("sampler", spec), denoise or Gaussian(), x, sigmas, noise), noise


# --- The ODE --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_order_of_convergence(solver: str, order: int) -> None:
    x = prior(8)
    steps = np.array([32, 64, 128, 256])
    errors = []
    for n in steps:
        # No step to σ = 0, which is Euler's in every solver and would hide the order.
        grid = torch.logspace(math.log10(START), math.log10(END), int(n) + 1, dtype=torch.float64)
        reached, _ = run(f"pf-ode:solver={solver}", x, grid)
        errors.append((reached - exact_flow(x, START, END)).abs().max().item())
    slope, _ = np.polyfit(np.log(steps), np.log(errors), 1)
    assert abs(-slope - order) <= 0.2


def rk45_error(tolerance: float, x: Tensor) -> float:
    found, _ = run(f"pf-ode:solver=rk45,rtol={tolerance},atol={tolerance}", x, levels(START, 0.0))
    # The solver ends at the model's smallest level with one denoising step.
    exact = Gaussian()(exact_flow(x, START, END), END)
    return (found - exact).abs().max().item()


def test_adaptive_solver_meets_its_tolerance() -> None:
    x = prior(8)
    tolerances = (1e-3, 1e-5, 1e-7)
    errors = [rk45_error(tolerance, x) for tolerance in tolerances]
    assert all(error <= 20 * tolerance for error, tolerance in zip(errors, tolerances, strict=True))
    assert all(finer < coarser / 10 for coarser, finer in pairwise(errors))


def test_adaptive_solver_has_the_cost_of_a_fifth_order_method() -> None:
    """The error of a step is O(h⁵), so 10⁵ times the accuracy costs 10 times the steps, and no more."""

    class Counted(Gaussian):
        calls = 0

        def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
            self.calls += 1
            assert self.calls < 5000
            return super().predict(x, sigma)

    def calls(tolerance: float) -> int:
        counted = Counted()
        run(f"pf-ode:solver=rk45,rtol={tolerance},atol={tolerance}", prior(1), levels(START, 0.0), counted)
        return counted.calls

    assert 5 * calls(1e-4) < calls(1e-9) < 10 * calls(1e-4)


def test_adaptive_solver_steps_each_sample_alone() -> None:
    x, ends = prior(5), levels(START, 0.0)
    together, _ = run("pf-ode:solver=rk45", x, ends)
    alone = torch.cat([run("pf-ode:solver=rk45", row[None], ends)[0] for row in x])
    assert (together - alone).abs().max() <= 1e-10


# --- The stochastic samplers: each step is affine in x and z, so mean and variance are known exactly ----------------


def ancestral_step(variance: str, s: float, t: float) -> tuple[float, float, float]:
    """x_t = a D + b x_s + c z of Ho et al. 2020 eq. 6-7, written with ᾱ as there, then put into x = x_vp/√ᾱ."""
    bar_s, bar_t = 1 / (1 + s**2), 1 / (1 + t**2)
    beta = 1 - bar_s / bar_t
    a = math.sqrt(bar_t) * beta / (1 - bar_s) / math.sqrt(bar_t)
    b = math.sqrt(bar_s / bar_t) * (1 - bar_t) / (1 - bar_s) * math.sqrt(bar_s / bar_t)
    v = beta * (1 - bar_t) / (1 - bar_s) if variance == "small" else beta
    return a, b, math.sqrt(v / bar_t) if t > 0 else 0.0


def assert_moments(x: Tensor, mean: float, variance: float) -> None:
    """Sample mean and variance within 5 of their standard errors."""
    n = len(x)
    assert abs(x.mean().item() - mean) <= 5 * math.sqrt(variance / n)
    assert abs(x.var().item() - variance) <= 5 * variance * math.sqrt(2 / (n - 1))


@pytest.mark.parametrize(
    ("spec", "kind"), [("ddpm", "small"), ("ddpm:variance=large", "large"), ("ddim:eta=1", "small")]
)
def test_terminal_mean_and_variance(spec: str, kind: str) -> None:
    grid = torch.cat([torch.logspace(math.log10(START), math.log10(END), 8, dtype=torch.float64), torch.zeros(1)])
    mean, variance = 0.0, START**2
    for s, t in pairwise(grid.tolist()):
        a, b, c = ancestral_step(kind, s, t)
        share = DEVIATION**2 / (DEVIATION**2 + s**2)
        mean = a * (MEAN + share * (mean - MEAN)) + b * mean
        variance = (a * share + b) ** 2 * variance + c**2
    x, _ = run(spec, prior(20_000), grid)
    assert_moments(x, mean, variance)


def test_the_large_variance_of_a_variance_exploding_model() -> None:
    # Its forward step adds s² - t² and scales nothing (Song et al. 2021, appendix F), so the reverse adds that much.
    s, t = 3.0, 1.0
    sampler = registry.parse("sampler", "ddpm:variance=large")
    x, exploding = prior(20_000), Gaussian(VARIANCE_EXPLODING)
    first = next(sampler.steps(exploding, x, levels(s, t, 0.0), step_noise(len(x))))
    share = DEVIATION**2 / (DEVIATION**2 + s**2)
    gain = share + (t / s) ** 2 * (1 - share)
    added = first.x - (MEAN + gain * (x - MEAN))
    assert_moments(added, 0.0, s**2 - t**2)


@pytest.mark.parametrize("spec", ["ddpm", "ddpm:variance=large", "ddim:eta=1", "ddim:eta=0.5"])
def test_the_last_step_adds_no_noise(spec: str) -> None:
    grid = levels(START, 2.0, 0.3, 0.0)
    noise = step_noise(3)
    *_, last = registry.parse("sampler", spec).steps(Gaussian(), prior(3), grid, noise)
    assert last.sigma == 0
    assert torch.equal(last.x, last.x0)
    assert noise.draws == 2


def test_deterministic_samplers_draw_no_noise() -> None:
    grid = levels(START, 2.0, 0.3, 0.0)
    for spec in ("ddim", *(f"pf-ode:solver={solver}" for solver in ("euler", "heun", "rk4", "rk45"))):
        assert run(spec, prior(3), grid)[1].draws == 0


def test_langevin_at_one_level_has_the_stationary_variance_of_its_recursion() -> None:
    # x ← μ + ρ (x - μ) + √(2r) σ z with ρ = 1 - r σ²/(s²+σ²): an AR(1) process, of variance 2rσ²/(1-ρ²).
    level, r, T = 0.8, 0.5, 50
    rho = 1 - r * level**2 / (DEVIATION**2 + level**2)
    stationary = 2 * r * level**2 / (1 - rho**2)
    assert rho ** (2 * T) < 1e-12
    x, noise = run(f"langevin:T={T},r={r},denoise=false", prior(20_000), levels(level, 0.0))
    assert noise.draws == T
    assert_moments(x, MEAN, stationary)


def test_langevin_ends_with_a_denoising_step() -> None:
    grid = levels(2.0, 0.4, 0.0)
    noisy, _ = run("langevin:T=3,denoise=false", prior(4), grid)
    denoised, _ = run("langevin:T=3", prior(4), grid)
    torch.testing.assert_close(denoised, Gaussian()(noisy, 0.4), rtol=0, atol=0)
