"""Rectified flows: coordinates, the first step from t = 1, orders of convergence, schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from support.flows import small_flow
from torch import Tensor

from samplerbench import registry
from samplerbench.errors import UserError
from samplerbench.models.exact import ExactModel, exact
from samplerbench.models.flow import flow_levels, is_flow, read_flow_schedule
from samplerbench.models.sample import bind, sample_states, start_states
from samplerbench.sampling import (
    RECTIFIED_FLOW,
    SIGMA_INFINITY,
    Denoiser,
    Inputs,
    Noise,
    Sampler,
    Step,
    intervals,
)
from samplerbench.sampling.flow import FlowSchedule
from samplerbench.sampling.process import flow_level, flow_time
from samplerbench.sampling.spacing import bind_spacing, make_grid, pick_spacing
from samplerbench.testing.sampler import measure_order_from_infinity

DETERMINISTIC = [
    *("ddim", "heun", "pf-ode:solver=euler", "pf-ode", "pf-ode:solver=rk4"),
    *("dpm-solver:order=1", "dpm-solver", "dpm-solver:order=3"),
    *("dpm++:order=1", "dpm++", "dpm++:order=3", "dpm++:method=singlestep", "dpm++:order=3,start=singlestep"),
    *("unipc:order=1", "unipc:order=2,variant=B1", "unipc", "unipc:corrector=false", "unipc:start=singlestep"),
    *(f"deis:order={r}" for r in range(4)),
    *("deis:variable=sigma", "deis:variable=log-sigma", "deis:order=3,start=singlestep"),
    *(f"ipndm:order={p}" for p in range(1, 5)),
    *("ipndm:order=3,start=singlestep", "ipndm:order=4,start=singlestep"),
    *("restart:K=0", "res", "res:method=singlestep", "er-sde:phi=ode", "er-sde:phi=ode,derivatives=exact"),
    *("sa-solver:tau=0", "sa-solver:tau=0,predictor=3,corrector=4"),
]
STOCHASTIC = [
    *("ddim:eta=0.5", "ddim:eta=1", "ddpm", "ddpm:variance=large", "euler-maruyama", "reverse-diffusion"),
    *("pc", "pc:predictor=ancestral", "langevin", "dpm++:sde=true", "heun:S_churn=40", "analytic-dpm"),
]
NEW_STOCHASTIC = [
    *(
        "restart",
        "er-sde",
        "er-sde:phi=er-4",
        "er-sde:phi=sde,order=1",
        "sa-solver",
        "sa-solver:predictor=3,corrector=4",
    ),
    *("dpm++:sde=true,order=3", "dpm++:method=singlestep,sde=true", "dpm++:method=singlestep,ancestral=true"),
]
"""Their moments are measured in CI, and not in the README's command."""


def test_infinity_is_exact() -> None:
    """1 + σ = σ, t = 1 and α σ = 1 in float64, and (1+σ) z and σ² have float32 values."""
    s = SIGMA_INFINITY
    assert 1 + s == s
    assert flow_time(s) == 1
    assert RECTIFIED_FLOW.alpha(s) * s == 1
    assert RECTIFIED_FLOW.prior_scale(s) == s
    z = torch.randn(1000)
    assert torch.equal(z * s * RECTIFIED_FLOW.alpha(s), z)
    assert bool((z * s).square().sum().isfinite())
    assert flow_level(1.0) == s
    for t in (1e-3, 0.3, 0.999):
        assert flow_time(flow_level(t)) == pytest.approx(t, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_evaluation_is_exact(dtype: torch.dtype) -> None:
    """At t = 1 the input of the network is z itself, D = z - v, and ε = z, to the last bit."""
    model = small_flow(dtype)
    z = torch.randn(3, *model.shape, dtype=dtype)
    x = model.prior(z, SIGMA_INFINITY)
    seen = []
    model.network.register_forward_pre_hook(lambda _, args: seen.append(args))
    x0 = model.denoiser(Inputs(3))(x, SIGMA_INFINITY)
    (given, time), *_ = seen
    assert torch.equal(given, z)
    assert torch.equal(time, torch.full((3,), 1000.0))
    v = model.network(z, torch.full((3,), 1000.0)).sample
    assert torch.equal(x0, z - v)
    torch.testing.assert_close((x - x0) / SIGMA_INFINITY, z, rtol=1e-15 if dtype == torch.float64 else 0, atol=1e-15)


@pytest.mark.parametrize(
    "spec", [*DETERMINISTIC, *NEW_STOCHASTIC, *(s for s in STOCHASTIC if not s.startswith("langevin"))]
)
def test_one_step_from_infinity_is_d(spec: str) -> None:
    """Every sampler with a single step returns D = z - v."""
    model = exact("mixture", shape="1x2x2", process="flow")
    grid = FlowSchedule().grid(1)
    sampler = bind(model, registry.parse("sampler", spec), grid)
    final = sample_states(model, sampler, grid, torch.arange(4))
    x = start_states(model, SIGMA_INFINITY, torch.arange(4))
    torch.testing.assert_close(final, model.denoiser(Inputs(4))(x, SIGMA_INFINITY), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", DETERMINISTIC)
def test_first_step_of_a_constant_denoiser_is_exact(spec: str) -> None:
    """If D is a constant c, the solution is c + (σ'/σ)(x - c) → c + σ' z from t = 1, for every sampler, in float32."""
    model = small_flow(torch.float32)
    c = torch.full((2, *model.shape), 0.3)

    class Constant(torch.nn.Module):
        def forward(self, y: Tensor, time: Tensor, class_labels: Any = None) -> Any:
            t = (time / 1000)[:, None, None, None]
            return _Output((y - 0.3) / t)

    model.network = Constant()
    grid = FlowSchedule(shift=3.0).grid(5)
    z = torch.randn(2, *model.shape)
    steps: list[Step] = []
    from samplerbench.sampling.driver import drive

    noise = Noise(0, torch.arange(2), model.shape, torch.float32)
    drive(
        registry.parse("sampler", spec),
        model.denoiser(Inputs(2)),
        model.prior(z, SIGMA_INFINITY),
        grid,
        noise,
        on_step=lambda _, step: steps.append(step),
    )
    for step in steps:
        torch.testing.assert_close(step.x, c + step.sigma * z, rtol=1e-5, atol=1e-5)


@dataclass
class _Output:
    sample: Tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_euler_in_t_is_ddim(dtype: torch.dtype) -> None:
    """y' = y + (t'-t) v with the network itself, and DDIM in σ, agree to rounding."""
    model = small_flow(dtype)
    z = torch.randn(4, *model.shape, dtype=dtype)
    times = torch.linspace(1, 0, 11, dtype=torch.float64)
    grid = torch.tensor([flow_level(float(t)) for t in times], dtype=torch.float64)
    y = z
    with torch.no_grad():
        for t, after in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            y = y + (after - t) * model.network(y, torch.full((4,), 1000 * t).to(torch.float32)).sample
    noise = Noise(0, torch.arange(4), model.shape, dtype)
    from samplerbench.sampling.driver import drive

    for spec in ("ddim", "pf-ode:solver=euler", "dpm++:order=1", "ipndm:order=1", "deis:order=0"):
        x = drive(
            registry.parse("sampler", spec), model.denoiser(Inputs(4)), model.prior(z, SIGMA_INFINITY), grid, noise
        )
        tolerance = 3e-5 if dtype == torch.float32 else 1e-6  # the time input of the network is float32
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("spec", DETERMINISTIC)
def test_order_from_infinity(spec: str) -> None:
    """The claimed order holds from t = 1, on the Gaussian in closed form and on the mixture."""
    sampler = registry.parse("sampler", spec)
    for problem in ("gaussian", "mixture"):
        slope, _ = measure_order_from_infinity(sampler, problem)
        assert slope >= sampler.convergence_from_infinity() - 0.2


@pytest.mark.parametrize("spec", ["pf-ode:solver=rk4", "heun", "ipndm:order=4,start=singlestep", "dpm++"])
def test_order_from_infinity_of_four_kinds(spec: str) -> None:
    sampler = registry.parse("sampler", spec)
    slope, _ = measure_order_from_infinity(sampler, "gaussian")
    assert abs(slope - sampler.convergence_from_infinity()) <= 0.2


@pytest.mark.parametrize(
    "spec",
    ["ddim:eta=1", "ddpm", "dpm++:sde=true"]
    + [
        pytest.param(s, marks=pytest.mark.slow)
        for s in (*STOCHASTIC, *NEW_STOCHASTIC)
        if s not in ("ddim:eta=1", "ddpm", "dpm++:sde=true")
    ],
)
def test_moments_from_infinity(spec: str) -> None:
    """The mean and variance of stochastic samplers approach the closed form with more steps."""
    model = exact("gaussian", shape="1x8x8", process="flow")
    mean, variance = model.problem.means.reshape(model.shape), model.problem.variances.reshape(model.shape)
    ratios = []
    for steps in (25, 200):
        grid = FlowSchedule().grid(steps)
        sampler = bind(model, registry.parse("sampler", spec), grid)
        final = sample_states(model, sampler, grid, torch.arange(500), dtype=torch.float32).double()
        ratios.append(float((final.var(0) / variance).mean()))
        bias = float(((final.mean(0) - mean) / variance.sqrt()).abs().max())
    assert bias <= 4.5 / math.sqrt(500)
    # The Langevin steps of `pc` and `langevin` have a step size of their own, which does not go to 0.
    fixed = spec.startswith(("pc", "langevin"))
    assert abs(ratios[1] - 1) <= (0.15 if fixed else 0.08)
    assert fixed or abs(ratios[1] - 1) <= max(abs(ratios[0] - 1), 0.03)


def test_rk45_from_infinity_meets_its_tolerance() -> None:
    model = exact("mixture", shape="1x2x2", process="flow")
    index = torch.arange(4)
    x = start_states(model, SIGMA_INFINITY, index)
    end = float(model.levels[0])
    truth = model.denoiser(Inputs(4))(model.solve(x, SIGMA_INFINITY, end), end)
    grid = torch.tensor([SIGMA_INFINITY, 0.0], dtype=torch.float64)
    for tol in (1e-4, 1e-7):
        sampler = registry.parse("sampler", f"pf-ode:solver=rk45,rtol={tol},atol={tol}")
        assert float((sample_states(model, sampler, grid, index) - truth).abs().max()) <= 50 * tol


@dataclass(frozen=True)
class Naive(Sampler):
    """Heun in σ, which knows nothing of infinite levels (Karras et al. 2022)."""

    def nfe(self, steps: int) -> int:
        return 2 * steps - 1

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            slope = (x - x0) / s
            following = x + (t - s) * slope
            if t > 0:
                following = x + (t - s) / 2 * (slope + (following - denoise(following, t)) / t)
            x = following
            yield Step(t, x, x0)


def test_a_plugin_that_does_not_know_infinity_starts_with_ddim() -> None:
    """The first interval is a DDIM step, and the plugin keeps its order 2."""
    slope, _ = measure_order_from_infinity(Naive(), "mixture")
    assert abs(slope - 2) <= 0.2


# --- The schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 10, 28, 50])
@pytest.mark.parametrize(
    ("config", "mu"),
    [
        ({}, None),
        ({"shift": 3.0}, None),
        ({"use_dynamic_shifting": True}, 0.8),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 2.5),
        ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, 0.6),
    ],
)
def test_the_grid_is_that_of_diffusers(config: dict[str, Any], mu: float | None, steps: int) -> None:
    """The times equal those of FlowMatchEulerDiscreteScheduler for sigmas = 1, 1-1/N, …, 1/N, as FLUX passes them."""
    if "shift_terminal" in config and steps == 1:
        return  # diffusers divides by zero
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    given = np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(sigmas=given, mu=mu)
    schedule = read_flow_schedule("FlowMatchEulerDiscreteScheduler", dict(scheduler.config), "test")
    grid = schedule.grid(steps, mu=mu)
    assert grid[0] == SIGMA_INFINITY
    times = torch.tensor([flow_time(float(s)) for s in grid])
    torch.testing.assert_close(times, scheduler.sigmas.to(times), rtol=2e-6, atol=2e-6)


def test_mu_is_linear_in_the_tokens() -> None:
    """0.5 at 256 tokens and 1.15 at 4096, as FLUX has it."""
    for tokens, mu in ((256, 0.5), (4096, 1.15), (1024, 0.63)):
        assert FlowSchedule(dynamic=True, tokens=tokens).mu == pytest.approx(mu, abs=1e-12)
    assert FlowSchedule(dynamic=True, tokens=4096).factor() == pytest.approx(math.exp(1.15))
    assert FlowSchedule(dynamic=True, tokens=4096, kind="linear").factor() == pytest.approx(1.15)


def test_levels_are_the_timesteps() -> None:
    levels = flow_levels(1000)
    assert len(levels) == 999
    assert flow_time(float(levels[0])) == pytest.approx(0.001, rel=1e-12)
    assert flow_time(float(levels[-1])) == pytest.approx(0.999, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "config", "flow"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}, True),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, True),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, True),
        ("DPMSolverMultistepScheduler", {}, False),
        ("DDIMScheduler", {"prediction_type": "v_prediction"}, False),
    ],
)
def test_which_schedulers_are_flows(name: str, config: dict[str, Any], flow: bool) -> None:
    assert is_flow(name, config) is flow


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("FlowMatchNewScheduler", {}, "is a rectified flow with the scheduler FlowMatchNewScheduler; supported are"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": -1}, "shift is -1; it must be a number from 0.001 to 1000"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": True}, "shift is True; it must be a number from 0.001 to 1000"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas set"),
        ("FlowMatchEulerDiscreteScheduler", {"time_shift_type": "cubic"}, "must be exponential or linear"),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 2}, "shift_terminal is 2; it must be a number from"),
        ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1}, "num_train_timesteps is 1; it must be a whole"),
        (
            "UniPCMultistepScheduler",
            {"use_flow_sigmas": True, "flow_shift": "3"},
            "flow_shift is '3'; it must be a number",
        ),
    ],
)
def test_unsupported_schedules_are_one_line(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_flow_schedule(name, config, "CHECKPOINT")
    assert "\n" not in str(caught.value)


# --- The spacing ----------------------------------------------------------------------------------------------------


def _grid(spec: str | None, sampler: str, model: ExactModel, steps: int) -> Tensor:
    method = registry.parse("sampler", sampler)
    spacing = pick_spacing(method, spec, model.spacing)
    return make_grid(bind_spacing(spacing, model, method), model.levels, steps)


def test_flow_is_the_default_of_flows() -> None:
    model = exact("gaussian", process="flow")
    for sampler in ("ddim", "heun", "dpm++", "ipndm", "ddpm"):
        torch.testing.assert_close(_grid(None, sampler, model, 4)[1:], torch.tensor([3, 1, 1 / 3, 0]).double())
    assert _grid(None, "langevin", model, 4)[0] < 1000  # keeps its own, geometric
    assert _grid("karras", "ddim", model, 4)[0] == pytest.approx(999, rel=1e-9)


@pytest.mark.parametrize("spec", ["karras", "trailing", "leading", "linspace", "logsnr", "exponential", "quadratic"])
def test_every_other_spacing_works_on_flows(spec: str) -> None:
    model = exact("gaussian", shape="1x2x2", process="flow")
    index = torch.arange(4)
    grid = _grid(spec, "dpm++", model, 100)
    truth = start_states(model, float(grid[0]), index)
    truth = model.solve(truth, float(grid[0]), 1e-9)
    final = sample_states(model, registry.parse("sampler", "dpm++"), grid, index)
    assert float((final - truth).abs().max()) <= 0.02


def test_options_of_the_spacing() -> None:
    model = exact("gaussian", process="flow")
    torch.testing.assert_close(_grid("flow:shift=3", "ddim", model, 4)[1:], torch.tensor([9, 3, 1, 0]).double())
    expected = math.e * torch.tensor([3, 1, 1 / 3, 0]).double()
    torch.testing.assert_close(_grid("flow:mu=1", "ddim", model, 4)[1:], expected)
    torch.testing.assert_close(_grid("list:levels=inf;3;1", "ddim", model, 3)[1:], torch.tensor([3, 1, 0]).double())
    assert _grid("list:levels=inf;3;1", "ddim", model, 3)[0] == SIGMA_INFINITY
    with pytest.raises(UserError, match="only a rectified flow can start at inf; give a number"):
        bind_spacing(
            registry.parse("spacing", "list:levels=inf;1"), exact("gaussian"), registry.parse("sampler", "ddim")
        )
    with pytest.raises(UserError, match="give shift or mu, not both"):
        registry.parse("spacing", "flow:shift=3,mu=1")
    with pytest.raises(UserError, match="spacing flow is for rectified flows, and this model is none"):
        bind_spacing(registry.parse("spacing", "flow"), exact("gaussian"), registry.parse("sampler", "ddim"))


@pytest.mark.parametrize("guidance", ["classifier:scale=1", "image-classifier:scale=0.5", "cfg:scale=2"])
def test_guidance_at_infinity_is_finite(guidance: str) -> None:
    """The exact classifier at t = 1 gives the class mean, E[x₀ | y], as scale 1 must; no guidance diverges there."""
    from samplerbench.sampling.guidance import bind_guidance

    model = exact("mixture", shape="1x2x2", process="flow")
    guide = bind_guidance(registry.parse("guidance", guidance), model)
    x = start_states(model, SIGMA_INFINITY, torch.arange(4))
    labels = torch.tensor([0, 1, 0, 1])
    x0 = model.denoiser(Inputs(4, labels), guide)(x, SIGMA_INFINITY)
    assert float(x0.abs().max()) < 5
    if guidance.startswith("classifier"):
        torch.testing.assert_close(x0, model.denoiser(Inputs(4, labels))(x, SIGMA_INFINITY), rtol=2e-3, atol=2e-3)
