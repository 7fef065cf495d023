"""Analytic-DPM: its variance against the closed form on a Gaussian, what it costs, and what it is good for."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_cell
from support.denoising import denoiser
from torch import Tensor

from samplerbench import cli, registry
from samplerbench.bench import engine
from samplerbench.models import Model, posterior_variances
from samplerbench.models.exact import ExactModel, exact
from samplerbench.models.sample import bind
from samplerbench.sampling import Noise
from samplerbench.sampling.driver import drive
from samplerbench.sampling.meter import Meter
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.spacing import make_grid

IMAGES = 1000
"""How many noised images an estimate is made of."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setenv("SAMPLERBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def gaussian() -> ExactModel:
    return exact("gaussian", shape="1x4x4")


def variances_at(model: ExactModel, sigma: float) -> Tensor:
    """Var[x₀ᵢ | x] = vᵢ σ²/(vᵢ + σ²) of each dimension, (d,): the same for every x."""
    v = model.problem.variances.flatten()
    return v * sigma**2 / (v + sigma**2)


def kappa(model: ExactModel, sigma: float) -> float:
    return float(variances_at(model, sigma).mean())


def standard_error(model: ExactModel, sigma: float) -> float:
    """Of κ estimated from n images: the mean of n·d squares of independent N(0, κᵢ), each of variance 2κᵢ²."""
    each = variances_at(model, sigma)
    return math.sqrt(2 * float(each.square().sum()) / (IMAGES * len(each) ** 2))


def grid_of(model: Model, steps: int) -> Tensor:
    return make_grid(registry.parse("spacing", "leading"), model.levels, steps)


def run(model: Model, spec: str, grid: Tensor, batch: int) -> Tensor:
    index = torch.arange(batch)
    x = model.prior(normal(0, Purpose.PRIOR, index, 0, model.shape), float(grid[0]))
    noise = Noise(0, index, model.shape, torch.float64)
    return drive(bind(model, registry.parse("sampler", spec), grid), denoiser(model, None, batch), x, grid, noise)


# --- The variance ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cache")
def test_the_estimate_is_the_closed_form() -> None:
    model, grid = gaussian(), torch.tensor([150.0, 20.0, 3.0, 0.7, 0.2, 0.05, 0.0], dtype=torch.float64)
    found, _ = posterior_variances(model, grid)
    assert list(found) == grid[:-1].tolist()
    for sigma in grid[:-1].tolist():
        assert abs(found[sigma] - kappa(model, sigma)) < 4.5 * standard_error(model, sigma)
        # κ = σ²(1 - σ²Γ) with Γ = E‖score‖²/d = mean 1/(vᵢ + σ²): the paper's form of the same number.
        gamma = float((1 / (model.problem.variances + sigma**2)).mean())
        assert sigma**2 * (1 - sigma**2 * gamma) == pytest.approx(kappa(model, sigma), rel=1e-7)


@pytest.mark.usefixtures("cache")
def test_the_estimate_is_the_mean_squared_error_of_the_denoiser() -> None:
    """Which at the optimum a wrong level changes little: so on the same draws it must be the same number."""
    model, sigma = gaussian(), 0.7
    mean, v = model.problem.means.reshape(model.shape), model.problem.variances.reshape(model.shape)
    x0, _ = model.real(IMAGES)
    x = x0 + sigma * normal(0, Purpose.ESTIMATE, torch.arange(IMAGES), 0, model.shape)
    error = x0 - (mean + v / (v + sigma**2) * (x - mean))
    found, _ = posterior_variances(model, torch.tensor([sigma, 0.0], dtype=torch.float64))
    assert found[sigma] == pytest.approx(float(error.square().mean()), rel=1e-12)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("form", ["ddpm", "ddim"])
def test_the_reverse_variance_is_the_optimal_one(form: str) -> None:
    """Theorem 1 of Bao et al. 2022: for x_t given x_s the noise's variance plus what D leaves unknown of x₀."""
    model, s, t = gaussian(), 3.0, 0.7
    grid = torch.tensor([s, t, 0.3, 0.0], dtype=torch.float64)
    sampler = bind(model, registry.parse("sampler", f"analytic-dpm:form={form}"), grid)
    x = model.prior(normal(0, Purpose.PRIOR, torch.arange(3), 0, model.shape), s)
    first = next(sampler.steps(denoiser(model, None, 3), x, grid, Noise(0, torch.arange(3), model.shape, x.dtype)))
    z = normal(0, Purpose.STEP, torch.arange(3), 0, model.shape)

    u2 = t**2 * (1 - t**2 / s**2) if form == "ddpm" else 0.0
    c = math.sqrt(t**2 - u2) / s
    optimal = u2 + (1 - c) ** 2 * kappa(model, s)
    x0 = denoiser(model, None, 3)(x, s)
    deviation = (first.x - (x0 + c * (x - x0))) / z
    assert float(deviation.max() - deviation.min()) < 1e-10
    variance = float(deviation.mean()) ** 2
    assert abs(variance - optimal) < 4.5 * (1 - c) ** 2 * standard_error(model, s)
    assert variance > 1.05 * u2  # more than the posterior's own


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("y", [1.0, 2.0, 8.0])
def test_the_noise_of_the_last_step_but_one_is_at_most_y_grey_levels(y: float) -> None:
    model = gaussian()
    grid = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    sampler = bind(model, registry.parse("sampler", f"analytic-dpm:y={y}"), grid)
    x = model.prior(normal(0, Purpose.PRIOR, torch.arange(2), 0, model.shape), 3.0)
    noise = Noise(0, torch.arange(2), model.shape, x.dtype)
    sizes, before = [], x
    for step in sampler.steps(denoiser(model, None, 2), x, grid, noise):
        if step.sigma > 0 and step.x0 is not None:
            share = (step.sigma / {2.0: 3.0, 1.0: 2.0}[step.sigma]) ** 2
            z = normal(0, Purpose.STEP, torch.arange(2), len(sizes), model.shape)
            sizes.append(float(((step.x - step.x0 - share * (before - step.x0)) / z).mean()))
        before = step.x
    assert noise.draws == 2  # none in the last step
    # E|√v z| = √(2v/π); a grey level is 2/255.
    assert sizes[1] * math.sqrt(2 / math.pi) == pytest.approx(y * 2 / 255, rel=1e-9)
    assert sizes[0] * math.sqrt(2 / math.pi) > 8 * 2 / 255


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("form", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [5, 10])
def test_few_steps_keep_more_of_the_variance_than_ddpm(form: str, steps: int) -> None:
    model, batch = gaussian(), 2000
    grid = grid_of(model, steps)
    truth = model.problem.variances.flatten()

    def distance(spec: str) -> float:
        found = run(model, spec, grid, batch).flatten(1).var(0)
        return float((found / truth).log().abs().mean())

    ddpm = distance("ddpm")
    assert distance(f"analytic-dpm:form={form}") < ddpm
    # Without the bound on the last noise, which is for images, the theorem is all that is left.
    assert distance(f"analytic-dpm:form={form},y=none") < ddpm / 4


# --- What it costs --------------------------------------------------------------------------------------------------


def test_the_estimate_is_made_once_and_kept(cache: Path) -> None:
    grid = grid_of(gaussian(), 5)

    def estimate(model: ExactModel, levels: Tensor) -> int:
        """The evaluations that it takes now. Those that it says are of these levels, whenever they were estimated."""
        with Meter(model.network) as meter:
            _, evaluations = posterior_variances(model, levels)
        assert evaluations == (len(levels) - 1) * IMAGES
        return meter.network

    first = gaussian()
    assert estimate(first, grid) == 5 * IMAGES
    assert estimate(first, grid) == 0
    (file,) = cache.glob("posterior-variance-*.json")
    kept = json.loads(file.read_text("utf-8"))["values"]
    levels = [repr(s) for s in grid[:-1].tolist()]
    assert set(kept) == {*levels, *(f"{level} evaluations" for level in levels)}
    assert all(kept[f"{level} evaluations"] == IMAGES for level in levels)

    anew = gaussian()
    assert estimate(anew, grid) == 0
    assert posterior_variances(anew, grid) == posterior_variances(first, grid)
    longer = torch.cat([torch.tensor([200.0], dtype=torch.float64), grid])
    assert estimate(anew, longer) == IMAGES
    assert estimate(exact("gaussian", shape="1x4x4", seed=1), grid) == 5 * IMAGES  # another model

    file.write_text("{ not json")
    assert estimate(gaussian(), grid) == 5 * IMAGES
    assert estimate(gaussian(), grid) == 0


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAMPLERBENCH_CACHE", str(tmp_path / "file"))
    model, grid = gaussian(), grid_of(gaussian(), 2)
    found, _ = posterior_variances(model, grid)
    assert found[float(grid[0])] > 0


@pytest.mark.usefixtures("cache")
def test_the_estimate_is_no_evaluation_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("run", "-s", "analytic-dpm", "--model", "exact:mixture,shape=1x8x8", "--steps", "5", "--n", "8")
    for folder in ("cold", "warm"):
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments, "--out", str(tmp_path / folder), "--json"])
        assert ended.value.code == 0
    (cold, warm) = (json.loads(part) for part in capsys.readouterr().out.replace("]\n[", "]\0[").split("\0"))
    assert cold[0]["nfe"] == warm[0]["nfe"] == 5
    assert cold[0]["metrics"] == warm[0]["metrics"]
    assert cold[0]["protocol"] == warm[0]["protocol"]


@pytest.mark.usefixtures("cache")
def test_a_level_that_was_not_estimated_is_an_error() -> None:
    model = gaussian()
    grid = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    sampler = bind(model, registry.parse("sampler", "analytic-dpm"), grid)
    x = model.prior(normal(0, Purpose.PRIOR, torch.arange(2), 0, model.shape), 3.0)
    noise = Noise(0, torch.arange(2), model.shape, x.dtype)
    other = torch.tensor([3.0, 0.123, 0.05, 0.0], dtype=torch.float64)
    with pytest.raises(KeyError, match=r"0\.123"):
        list(sampler.steps(denoiser(model, None, 2), x, other, noise))


# --- What it is good for --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("steps", [5, 10])
def test_it_beats_ddpm_on_the_digits(make_session: Callable[..., engine.Session], digits: Model, steps: int) -> None:
    session = make_session(n=400, model=dataclasses.replace(digits))

    def fid(spec: str) -> float:
        outcome = engine.run_cell(session, make_cell(digits, spec, None, steps))
        return float(outcome.record["metrics"]["fid"]["value"])

    assert fid("analytic-dpm") < fid("ddpm")
