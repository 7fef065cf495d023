"""`samplerbench check` of methods for inverse problems: sound methods pass, and each broken one fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from samplerbench_plugins.imputation import NOISELESS, Replacement
from samplerbench_plugins.inverse import DDNM, PiGDM
from samplerbench_plugins.spectral_restoration import DDRM
from samplerbench_plugins.task_sampler import TaskSampler, ddim_step
from torch import Tensor

from samplerbench import registry
from samplerbench.sampling import (
    ConditionalDenoiser,
    Denoiser,
    Guidance,
    Noise,
    Prediction,
    Regime,
    Sampler,
    Sigma,
    Step,
    intervals,
)
from samplerbench.testing.checks import checks_for, run_check


def failures(method: Guidance | Sampler, *names: str) -> dict[str, str]:
    """The figures of the named checks that fail."""
    checks = [check for check in checks_for(method) if check.name in names]
    assert len(checks) == len(names)
    return {r.name: r.figure for r in map(run_check, checks) if r.passed is False}


@dataclass(frozen=True)
class HalfStep(DDNM):
    """Moves half the way to the observation (Nobody 2022)."""

    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        base, made = denoise.conditional(x, sigma).x0, super().predict(denoise, x, sigma).x0
        return Prediction((base + made) / 2)


@dataclass(frozen=True)
class IgnoresNoise(DDNM):
    """DDNM that says it is exact with noise (Nobody 2022)."""

    def posterior_regime(self) -> Regime | None:
        return Regime(any_task=False)


@dataclass(frozen=True)
class OfAnyGaussian(PiGDM):
    """Says that the variances of the pixels may differ (Nobody 2022)."""

    def posterior_regime(self) -> Regime | None:
        return Regime()


@dataclass(frozen=True)
class OnlyInpainting(DDNM):
    """Says that A may be any operator (Nobody 2022)."""

    def posterior_regime(self) -> Regime | None:
        return Regime(noise=False)


@dataclass(frozen=True)
class NotARegime(DDNM):
    """Says "always" (Nobody 2022)."""

    def posterior_regime(self) -> Any:
        return "always"


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (HalfStep(), {"posterior", "full-observation"}),
        (IgnoresNoise(), {"posterior"}),
        (OfAnyGaussian(), {"posterior", "full-observation"}),
        (OnlyInpainting(), {"posterior"}),
        (NotARegime(), {"posterior", "full-observation"}),
        (DDNM(), set()),
        (PiGDM(), set()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_guidance_is_compared_with_the_closed_form(method: Guidance, expected: set[str]) -> None:
    failed = failures(method, "posterior", "full-observation")
    assert failed.keys() == expected
    if isinstance(method, NotARegime):
        assert failed["posterior"] == "posterior_regime returned a str, not a Regime"
    elif failed:
        assert "differs from the posterior denoiser of a Gaussian by" in failed["posterior"]


@dataclass(frozen=True)
class Forgetful(TaskSampler):
    """Does not use the observation (Nobody 2022)."""

    def posterior_regime(self) -> Regime | None:
        return NOISELESS

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            x = ddim_step(x, x0, s, t, 0.0, noise)
            yield Step(t, x, x0)


@dataclass(frozen=True)
class Overconfident(DDRM):
    """DDRM that says its covariance is exact (Nobody 2022)."""

    def posterior_regime(self) -> Regime | None:
        return NOISELESS


@dataclass(frozen=True)
class Shifted(Replacement):
    """Replacement whose hidden pixels are too bright (Nobody 2022)."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for step in super().steps(denoise, x, sigmas, noise):
            hidden = 1 - self.operator.adjoint(self.operator.forward(x * 0 + 1))
            yield Step(step.sigma, step.x + 0.3 * hidden, step.x0)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (Forgetful(), "values that y determines differ from it by"),
        pytest.param(Overconfident(), "the variance at 200 steps is off", marks=pytest.mark.slow),
        pytest.param(Shifted(), "the mean at 200 steps is off", marks=pytest.mark.slow),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Sampler) else None,
)
def test_a_sampler_is_compared_with_the_closed_form(method: Sampler, says: str) -> None:
    failed = failures(method, "posterior")
    assert says in failed["posterior"]


def test_full_observation_is_measured_for_a_sampler() -> None:
    assert failures(Forgetful(), "full-observation").keys() == {"full-observation"}
    assert failures(DDRM(), "full-observation") == {}


def test_a_sampler_without_a_claim_says_so() -> None:
    reasons = {"sdedit": "it claims no regime in which it is exact", "ddim": "it does not require a task"}
    for spec, reason in reasons.items():
        checks = {c.name: c for c in checks_for(registry.parse("sampler", spec))}
        result = run_check(checks["posterior"])
        assert result.passed is None
        assert result.figure.startswith(reason)
