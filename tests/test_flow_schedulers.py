"""diffusers' schedulers on rectified flows: what agrees with our solvers, and the differences with their reasons."""

from __future__ import annotations

import contextlib
from typing import Any

import diffusers
import pytest
import torch
from samplerbench_plugins.diffusers_flow import flow_steps, make_flow_scheduler
from torch import Tensor

from samplerbench import registry
from samplerbench.errors import UserError
from samplerbench.models.exact import exact
from samplerbench.models.sample import bind, sample_states, start_states
from samplerbench.sampling import SIGMA_INFINITY, Inputs
from samplerbench.sampling.flow import FlowSchedule
from samplerbench.sampling.meter import Meter
from samplerbench.sampling.process import flow_level, flow_time

MODEL = exact("mixture", shape="1x2x2", process="flow")
INDEX = torch.arange(16)
Z = start_states(MODEL, SIGMA_INFINITY, INDEX) / SIGMA_INFINITY
EULER, HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
DPM, UNIPC, DEIS = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"


def made(name: str, shift: float = 1.0, **settings: Any) -> Any:
    return make_flow_scheduler(getattr(diffusers, name), settings, FlowSchedule(shift=shift))[0]


def unrounded(scheduler: Any) -> Any:
    """The scheduler with the timesteps 1000 t of its own float levels, instead of whole numbers."""
    original = scheduler.set_timesteps

    def set_timesteps(*arguments: Any, **named: Any) -> None:
        original(*arguments, **named)
        scheduler.timesteps = (scheduler.sigmas[:-1] * 1000).double()

    scheduler.set_timesteps = set_timesteps
    return scheduler


def theirs(scheduler: Any, steps: int) -> Tensor:
    denoise = MODEL.denoiser(Inputs(len(INDEX)))
    *_, last = flow_steps(scheduler, {}, denoise, Z, steps, FlowSchedule(), contextlib.nullcontext)
    return last.x


def ours(spec: str, scheduler: Any, to_zero: bool = True) -> Tensor:
    """Our sampler on the levels of a scheduler, in the state x."""
    times = list(dict.fromkeys(scheduler.sigmas.double().tolist()))
    levels = [flow_level(t) for t in times if t > 0] + [0.0] * to_zero
    return sample_states(MODEL, registry.parse("sampler", spec), torch.tensor(levels, dtype=torch.float64), INDEX)


@pytest.mark.parametrize("steps", [4, 8, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("name", "spec"), [(EULER, "ddim"), (EULER, "pf-ode:solver=euler"), (HEUN, "pf-ode:solver=heun")]
)
def test_flow_match_schedulers_agree(name: str, spec: str, shift: float, steps: int) -> None:
    """Euler in t is DDIM, and Heun in t is `pf-ode`, up to diffusers' float32 tables."""
    scheduler = made(name, shift)
    assert float((theirs(scheduler, steps) - ours(spec, scheduler)).abs().max()) <= 1e-6


@pytest.mark.parametrize("steps", [4, 8, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("name", "spec", "settings"),
    [
        (DPM, "dpm++", {}),
        (DPM, "dpm++:order=1", {"solver_order": 1}),
        (UNIPC, "unipc:order=2", {}),
        (UNIPC, "unipc:order=2,corrector=false", {"disable_corrector": list(range(30))}),
    ],
)
def test_whole_timesteps_are_the_only_difference(
    name: str, spec: str, settings: dict[str, Any], shift: float, steps: int
) -> None:
    """DPM++ and UniPC in flow mode round timesteps: the network sees ⌊1000 t⌋, the solver t. Without it they agree."""
    scheduler = made(name, shift, **settings)
    assert float((theirs(unrounded(scheduler), steps) - ours(spec, scheduler)).abs().max()) <= 1e-5
    rounded = made(name, shift, **settings)
    difference = float((theirs(rounded, steps) - ours(spec, rounded)).abs().max())
    assert 5e-4 <= difference <= 5e-3
    assert not rounded.timesteps.is_floating_point()


@pytest.mark.parametrize(("steps", "expected"), [(4, 0.42), (8, 0.13), (20, 0.056)])
def test_deis_stops_before_zero(steps: int, expected: float) -> None:
    """DEIS in flow mode repeats its last level instead of stepping to 0: it returns the noisy state at t = 1/N."""
    scheduler = made(DEIS)
    final = theirs(scheduler, steps)
    assert scheduler.sigmas[-1] == scheduler.sigmas[-2] > 0
    difference = float((final - ours("deis:order=1,variable=log-sigma", scheduler)).abs().max())
    assert difference == pytest.approx(expected, rel=0.05)


def test_unipc_bh1_is_nan() -> None:
    assert bool(theirs(made(UNIPC, solver_type="bh1"), 8).isnan().any())


@pytest.mark.parametrize("shift", [2.0, 3.0, 6.0])
def test_the_shift_is_applied_to_sigma_min_twice(shift: float) -> None:
    """FlowMatchEuler shifts its smallest level in the constructor, and again in set_timesteps(N)."""
    scheduler = made(EULER, shift)
    scheduler.set_timesteps(10)
    once = shift * 0.001 / (1 + (shift - 1) * 0.001)
    twice = shift * once / (1 + (shift - 1) * once)
    assert float(scheduler.sigmas[-2]) == pytest.approx(twice, rel=1e-4)
    assert twice > 1.9 * once


def test_where_they_start() -> None:
    """DPM++ starts at t = 0.999 before the shift, UniPC at 1 - 10⁻⁶, FlowMatchEuler at 1."""
    starts = []
    for name in (DPM, UNIPC, EULER):
        scheduler = made(name)
        scheduler.set_timesteps(10)
        starts.append(float(scheduler.sigmas[0]))
    assert starts == pytest.approx([0.999, 1 - 1e-6, 1.0], abs=1e-7)


def test_churn_adds_noise_in_interpolant_space() -> None:
    """FlowMatchHeun's churn raises t without shrinking x₀, and evaluates the network at the old time.

    If all data is one point c, the state at time t is (1-t) c + t z. After churn and one Euler step of the scheduler,
    its mean is off by 14% of c and its noise is 51% too large. Those of `heun` are right.
    """
    c, n = 2.0, 20_000
    scheduler = made(HEUN)
    scheduler.set_timesteps(10)
    t, after = float(scheduler.sigmas[10]), float(scheduler.sigmas[11])
    scheduler.set_begin_index(10)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, generator=generator)
    y = (1 - t) * c + t * z
    moved = scheduler.step(z - c, scheduler.timesteps[10], y, s_churn=8.0, generator=generator).prev_sample
    bias = float(moved.mean()) / (1 - after) - c
    # In our coordinates: x = c + σ z, raised to σ̂ = (1+γ) σ, then Euler to σ'.
    gamma = min(8.0 / 19, 2**0.5 - 1)
    s, following = flow_level(t), flow_level(after)
    raised = s * (1 + gamma)
    x = c + s * z + (raised**2 - s**2) ** 0.5 * torch.randn(n, generator=generator)
    x = x + (following - raised) * (x - c) / raised
    assert abs(float(x.mean()) - c) <= 5 * following / n**0.5
    assert float(x.std()) == pytest.approx(following, rel=0.03)
    assert bias == pytest.approx(0.285, abs=0.02)  # 14% of c
    assert float(moved.std()) == pytest.approx(0.504, abs=0.01)  # 51% more than σ' of the next level


# --- As samplers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", registry.get("sampler", "diffusers").schedulers(flows=True))  # type: ignore[attr-defined]
def test_every_flow_scheduler_runs(name: str) -> None:
    """It is finite, its evaluations are counted, and a sample does not depend on its batch."""
    sampler = registry.parse("sampler", f"diffusers/{name}")
    grid = FlowSchedule().grid(6)
    sampler = bind(MODEL, sampler, grid)
    with Meter(MODEL.network) as meter:
        whole = sample_states(MODEL, sampler, grid, torch.arange(4))
    assert bool(whole.isfinite().all())
    assert meter.network == 4 * sampler.nfe(6)
    parts = torch.cat([sample_states(MODEL, sampler, grid, torch.arange(i, i + 1)) for i in range(4)])
    torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-9)


def test_the_shift_of_the_model_is_used() -> None:
    for flow in (FlowSchedule(shift=3.0), FlowSchedule(dynamic=True, tokens=1024, terminal=0.02)):
        cls = getattr(diffusers, EULER)
        scheduler, arguments = make_flow_scheduler(cls, {}, flow)
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], **arguments)
        expected = [flow_time(float(s)) for s in flow.grid(4)]
        assert scheduler.sigmas.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_scheduler_without_flow_mode_is_refused() -> None:
    with pytest.raises(UserError, match="EulerDiscreteScheduler cannot sample a rectified flow: it has no flow mode"):
        bind(MODEL, registry.parse("sampler", "diffusers/EulerDiscreteScheduler"), FlowSchedule().grid(4))
    with pytest.raises(UserError, match="samples rectified flows, and this model is none"):
        bind(exact("gaussian"), registry.parse("sampler", f"diffusers/{EULER}"), torch.tensor([1.0, 0.0]).double())
