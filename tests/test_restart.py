"""Restart sampling (Xu et al. 2023): where it restarts, what it costs, and what it does on a Gaussian."""

import math

import pytest
import torch
from samplerbench_plugins.heun import Heun
from samplerbench_plugins.restart import Restart

from samplerbench.sampling import VARIANCE_EXPLODING, Denoiser, Prediction, UserError

VARIANCE = 0.25
SIGMAS = torch.tensor([40.0, 10.0, 2.0, 0.5, 0.1, 0.02, 0.0], dtype=torch.float64)


class Gaussian(Denoiser):
    """D of N(0, v): v x/(v + σ²). It records the levels of its evaluations."""

    process = VARIANCE_EXPLODING

    def __init__(self) -> None:
        self.evaluated: list[float] = []

    def predict(self, x, sigma):
        self.evaluated.append(sigma)
        return Prediction(VARIANCE / (VARIANCE + sigma**2) * x)

    def rows(self, index):
        return self


class Curved(Gaussian):
    """A denoiser that is not linear in x."""

    def predict(self, x, sigma):
        return Prediction(torch.tanh(super().predict(x, sigma).x0))


class Ones:
    """Noise that is 1 everywhere, and counted."""

    def __init__(self, x: torch.Tensor) -> None:
        self.one, self.draws = torch.ones_like(x), 0

    def __call__(self) -> torch.Tensor:
        self.draws += 1
        return self.one


def start(seed: int = 0) -> torch.Tensor:
    return 40 * torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_without_restarts_it_is_heun_s_method() -> None:
    x = start()
    mine = list(Restart(K=0).steps(Curved(), x, SIGMAS, Ones(x)))
    heun = list(Heun().steps(Curved(), x, SIGMAS, Ones(x)))
    assert [step.sigma for step in mine] == [step.sigma for step in heun]
    for a, b in zip(mine, heun, strict=True):
        assert torch.equal(a.x, b.x)


def test_down_to_the_restart_it_is_heun_s_method() -> None:
    """The level nearest to t_min = 0.07 is 0.1: above it nothing differs, from it on everything does."""
    x = start()
    mine = {step.sigma: step.x for step in Restart(t_min=0.07).steps(Curved(), x, SIGMAS, Ones(x))}
    for step in Heun().steps(Curved(), x, SIGMAS, Ones(x)):
        assert torch.equal(mine[step.sigma], step.x) == (step.sigma > 0.1)


@pytest.mark.parametrize(
    ("t_min", "t_max", "bottom"),
    [(0.07, 0.3, 0.1), (0.05, 0.3, 0.02), (0.4, 0.6, 0.5), (0.4, 0.45, 0.1), (1.0, 50.0, 0.5), (0.005, 0.01, None)],
)
def test_it_restarts_at_the_level_nearest_to_t_min(t_min: float, t_max: float, bottom: float | None) -> None:
    sampler, x, denoise = Restart(t_min=t_min, t_max=t_max, K=3, N_restart=4), start(), Gaussian()
    noise = Ones(x)
    list(sampler.steps(denoise, x, SIGMAS, noise))
    assert sampler.bottom(SIGMAS) == bottom
    steps = len(SIGMAS) - 1
    assert noise.draws == (0 if bottom is None else 3)
    assert len(denoise.evaluated) == (2 * steps - 1 if bottom is None else sampler.nfe(steps))
    if bottom is not None:
        assert denoise.evaluated.count(t_max) == 3


def test_the_paper_s_setting_costs_43_evaluations() -> None:
    """18 steps of Heun's method are 35; two restarts over 3 levels are 2 x 2 x 2 more."""
    sampler = Restart(t_min=0.06, t_max=0.3, K=2, N_restart=3)
    assert sampler.nfe(18) == 43
    assert sampler.nfe(1) == 1


def test_the_levels_of_a_restart() -> None:
    """Even in σ^(1/ρ), both ends exact: with ρ = 2 and √σ = 0.6, 0.4, 0.2."""
    levels = Restart(t_min=0.03, t_max=0.36, rho=2.0, N_restart=3).levels(0.04)
    assert levels[0] == 0.36
    assert levels[-1] == 0.04
    assert levels[1] == pytest.approx(0.16, rel=1e-12)
    assert Restart(N_restart=2).levels(0.06) == [0.3, 0.06]


@pytest.mark.parametrize("t", [0.06, 0.1])
def test_a_restart_keeps_the_marginal_of_a_gaussian(t: float) -> None:
    """On N(0, v) a restart is linear, x ← a x + b z, and keeps the variance v + t²:  a² (v + t²) + b² = v + t².

    The exact ODE has a = √((v + t²)/(v + t_max²)) and b = a √(t_max² - t²). Heun's error over n intervals is of second
    order, so four times the intervals leave a sixteenth of it.
    """
    x, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    errors = []
    for intervals_of in (8, 32):
        sampler = Restart(t_max=0.3, N_restart=intervals_of + 1)
        with_noise = float(sampler.restart(Gaussian(), zero, t, Ones(zero))[0])
        a = float(sampler.restart(Gaussian(), x, t, Ones(x))[0]) - with_noise
        assert with_noise == pytest.approx(a * math.sqrt(0.3**2 - t**2), rel=1e-12)
        errors.append(abs(a**2 * (VARIANCE + t**2) + with_noise**2 - (VARIANCE + t**2)))
    assert errors[1] < 1e-5
    assert 12 < errors[0] / errors[1] < 20


def test_the_added_noise_scales_with_s_noise() -> None:
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    plain, more = (Restart(S_noise=s).restart(Gaussian(), zero, 0.06, Ones(zero))[0] for s in (1.0, 1.003))
    assert float(more / plain) == pytest.approx(1.003, rel=1e-12)


def test_an_empty_interval_is_refused() -> None:
    with pytest.raises(UserError, match=r"t_min = 0\.3 is not below t_max = 0\.3"):
        Restart(t_min=0.3)
