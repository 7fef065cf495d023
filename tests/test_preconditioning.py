"""Every parametrisation against its definition, written in the model's own coordinates; and a flow as a process."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from support.denoising import denoiser
from torch import Tensor, nn

from samplerbench import registry
from samplerbench.models.model import Condition, Model
from samplerbench.models.preconditioning import (
    DENOISED,
    EPSILON,
    FLOW,
    SAMPLE,
    SCORE,
    VELOCITY,
    Preconditioning,
    consistency,
    edm,
)
from samplerbench.sampling import Noise
from samplerbench.sampling.driver import drive
from samplerbench.sampling.process import RECTIFIED_FLOW, VARIANCE_EXPLODING, VARIANCE_PRESERVING, Process

SIGMAS = (0.003, 0.5, 1.0, 7.0, 150.0)


def draw(shape: tuple[int, ...] = (5, 1, 2, 3), seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def vp_v(x0: Tensor, z: Tensor, s: float) -> Tensor:
    """v = √ᾱ ε - √(1-ᾱ) x₀ (Salimans & Ho 2022)."""
    bar = 1 / (1 + s**2)
    return math.sqrt(bar) * z - math.sqrt(1 - bar) * x0


TARGETS: list[tuple[Preconditioning, Process, Callable[[Tensor, Tensor, float], Tensor]]] = [
    (EPSILON, VARIANCE_PRESERVING, lambda x0, z, s: z),
    (VELOCITY, VARIANCE_PRESERVING, vp_v),
    (SAMPLE, VARIANCE_PRESERVING, lambda x0, z, s: x0),
    (SCORE, VARIANCE_EXPLODING, lambda x0, z, s: -z / s),
    (FLOW, RECTIFIED_FLOW, lambda x0, z, s: z - x0),
    (DENOISED, VARIANCE_EXPLODING, lambda x0, z, s: x0),
]


@pytest.mark.parametrize(("made", "process", "target"), TARGETS, ids=[t[0].name for t in TARGETS])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_a_perfect_output_gives_x0_from_the_network_s_own_input(
    made: Preconditioning, process: Process, target: Callable[[Tensor, Tensor, float], Tensor], sigma: float
) -> None:
    x0, z = draw(), draw(seed=1)
    x, per_sample = x0 + sigma * z, torch.full((len(x0),), sigma, dtype=torch.float64)
    for level in (sigma, per_sample):
        torch.testing.assert_close(made.input(x, level), process.alpha(sigma) * x, rtol=1e-14, atol=0)
        found = made.denoised(target(x0, z, sigma), x, level)
        torch.testing.assert_close(found, x0, rtol=0, atol=1e-13 * (1 + sigma**2))
        output = made.output(x0, x, level)
        torch.testing.assert_close(output, target(x0, z, sigma), rtol=0, atol=1e-13 * (1 + sigma) / min(1.0, sigma))


def test_the_flow_s_time_and_input_are_those_of_the_interpolation() -> None:
    x0, z, t = draw(), draw(seed=1), 0.3
    sigma = t / (1 - t)
    torch.testing.assert_close(FLOW.input(x0 + sigma * z, sigma), (1 - t) * x0 + t * z, rtol=1e-14, atol=1e-14)
    assert FLOW.time is not None
    assert FLOW.time(sigma) == pytest.approx(t, rel=1e-15)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_edm_s_scalings_keep_input_and_target_at_unit_variance(sigma: float) -> None:
    """Karras et al. 2022, appendix B.6: Var[c_in x] = 1 and Var[(x₀ - c_skip x)/c_out] = 1 for data of σ_d."""
    sigma_data = 0.5
    made = edm(sigma_data)
    assert made.scale(sigma) ** 2 * (sigma_data**2 + sigma**2) == pytest.approx(1, rel=1e-12)
    skip, out = made.skip(sigma), made.out(sigma)
    target = (1 - skip) ** 2 * sigma_data**2 + skip**2 * sigma**2
    assert target / out**2 == pytest.approx(1, rel=1e-10)
    assert made.time is not None
    assert float(made.time(sigma)) == pytest.approx(math.log(sigma) / 4, rel=1e-12)


def test_a_consistency_model_is_the_identity_at_its_smallest_level() -> None:
    made, x = consistency(0.5, 0.002), draw()
    torch.testing.assert_close(made.denoised(draw(seed=3), x, 0.002), x, rtol=0, atol=0)
    assert made.time is not None
    assert float(made.time(0.002)) == pytest.approx(250 * math.log(0.002))


@pytest.mark.parametrize(
    ("process", "alpha"),
    [
        (VARIANCE_PRESERVING, lambda s: math.sqrt(1 / (1 + s**2))),
        (VARIANCE_EXPLODING, lambda s: 1.0),
        (RECTIFIED_FLOW, lambda s: 1 - s / (1 + s)),
    ],
    ids=["vp", "ve", "flow"],
)
def test_alpha_is_the_process_s_own(process: Process, alpha: Callable[[float], float]) -> None:
    for sigma in (0.0, *SIGMAS):
        assert process.alpha(sigma) == pytest.approx(alpha(sigma), rel=1e-14)
    assert process.alpha(0.0) == 1


MEAN, WIDTH = 0.3, 0.4


class GaussianVelocity(nn.Module):
    """v(y, t) = E[z - x₀ | y] of a flow between N(μ, w²) and N(0, 1): linear in y, in closed form."""

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, 1, 1, 1).to(y.dtype)
        variance = (1 - t) ** 2 * WIDTH**2 + t**2
        gain = (t - (1 - t) * WIDTH**2) / variance
        return gain * (y - (1 - t) * MEAN) - MEAN


@dataclass
class FlowModel(Model):
    """A rectified flow, written against the interface alone: a process, a preconditioning, and how to call it."""

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(x, time)


def flow() -> FlowModel:
    return FlowModel(
        network=GaussianVelocity(),
        shape=(1, 2, 2),
        levels=torch.logspace(-3, 3, 200, dtype=torch.float64),
        process=RECTIFIED_FLOW,
        preconditioning=FLOW,
        device=torch.device("cpu"),
        dtype=torch.float64,
        identity={"source": "flow", "weights": "0" * 64},
    )


def test_a_flow_s_denoiser_is_the_gaussian_s_closed_form() -> None:
    """D = (w² x + σ² μ)/(w² + σ²), whatever the process."""
    model, x = flow(), draw((6, 1, 2, 2))
    for sigma in SIGMAS:
        expected = (WIDTH**2 * x + sigma**2 * MEAN) / (WIDTH**2 + sigma**2)
        found = denoiser(model, None, len(x))(x, sigma)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11 * (1 + sigma))


def test_euler_in_the_flow_s_time_is_ddim() -> None:
    model, sampler = flow(), registry.parse("sampler", "ddim")
    t = torch.linspace(0.99, 0.0, 12, dtype=torch.float64)
    sigmas = t / (1 - t)
    y = draw((4, 1, 2, 2))
    noise = Noise(0, torch.arange(4), (1, 2, 2), torch.float64)
    x = drive(sampler, denoiser(model, None, 4), y / (1 - t[0]), sigmas, noise)
    network = model.network
    for a, b in pairwise(t):
        y = y + (b - a) * network(y, a.expand(4))
    torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        "ddpm:variance=large",
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("reverse-diffusion", "euler-maruyama")),
    ],
)
def test_stochastic_samplers_reach_the_flow_s_gaussian(spec: str) -> None:
    """On a fine grid the last state has the data's mean and variance, for every process; VP and VE as a control."""
    from samplerbench.sampling.noise import Purpose, normal

    sampler, n = registry.parse("sampler", spec), 4000
    levels = torch.logspace(2.5, -2.5, 400, dtype=torch.float64)
    sigmas = torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
    index = torch.arange(n)
    for process in (RECTIFIED_FLOW, VARIANCE_PRESERVING, VARIANCE_EXPLODING):
        model = replace(flow(), process=process)
        z = normal(0, Purpose.PRIOR, index, 0, model.shape)
        noise = Noise(1, index, model.shape, torch.float64)
        x = drive(sampler, denoiser(model, None, n), MEAN + float(sigmas[0]) * z, sigmas, noise)
        per_image = x.flatten(1)
        error = WIDTH / math.sqrt(per_image.numel())
        assert abs(float(per_image.mean()) - MEAN) < 5 * error
        assert float(per_image.var()) == pytest.approx(WIDTH**2, rel=0.06)
