"""Metrics of restorations: LPIPS and FID, several samples of one observation, and standard errors over observations."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from samplerbench_plugins.observations import mean_over_observations
from support.lpips_weights import reference, save
from torch import Tensor

import samplerbench
from samplerbench import registry
from samplerbench.errors import UserError
from samplerbench.metrics import Batch, Context
from samplerbench.metrics.guarded import Guarded
from samplerbench.models import ExactPosterior, exact_posterior
from samplerbench.models.exact import ExactModel, exact
from samplerbench.sampling import Inputs

TASK = "inpaint:mask=half,sigma=0.3"


def observed(model: ExactModel, images: int, task: str = TASK) -> tuple[ExactModel, ExactPosterior, Tensor]:
    """The model with a task, its posterior, and the observations (J, ...)."""
    made = model.observed(registry.parse("task", f"{task},images={images}"), model.real(images)[0])
    y = made.inputs(torch.arange(images), Inputs(images)).tensors["observation"]
    return made, exact_posterior(made, "a test"), y


def draws(posterior: ExactPosterior, y: Tensor, samples: int, shape: tuple[int, ...]) -> Tensor:
    """Exact draws, `samples` of each observation, in the order of a run: sample i is of observation i mod J."""
    rows = [posterior.draws(one, samples, seed=100 + j) for j, one in enumerate(y)]
    return torch.stack(rows, dim=1).reshape(-1, *shape)


def measured(spec: str, model: Any, states: Tensor, index: Tensor | None = None, cut: int = 0) -> dict[str, Any]:
    """The result of a metric for these final states, in batches of `cut` that are merged in reverse."""
    index = torch.arange(len(states)) if index is None else index
    context = Context(None, n=10**6, model=model)  # type: ignore[arg-type]
    pixels = (states.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    whole = Guarded(registry.parse("metric", spec), context)
    for rows in reversed(torch.arange(len(states)).split(cut or len(states))):
        part = Guarded(whole.metric, context)
        given = model.inputs(index[rows], Inputs(len(rows)))
        part.update(Batch(pixels[rows], torch.empty(len(rows), 0), None, index[rows], states[rows], False, given))
        whole.merge(part.state())
    return whole.result()


# --- Standard errors -------------------------------------------------------------------------------------------------


def test_a_standard_error_is_over_observations() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(12, generator=generator, dtype=torch.float64)
    image = torch.arange(12) % 4
    entry = mean_over_observations(values, image)
    means = torch.stack([values[image == j].mean() for j in range(4)])
    assert entry["value"] == pytest.approx(float(values.mean()))
    assert entry["standard_error"] == pytest.approx(float(means.std()) / 2)
    # One value for each observation: the usual error. Copies of the values add no information.
    alone = mean_over_observations(values, torch.arange(12))
    assert alone["standard_error"] == pytest.approx(float(values.std()) / math.sqrt(12))
    copied = mean_over_observations(values.repeat(5), torch.arange(12).repeat(5))
    assert copied["standard_error"] == pytest.approx(alone["standard_error"])
    assert mean_over_observations(values, torch.zeros(12, dtype=torch.int64)) == {"value": entry["value"]}


def test_the_standard_error_of_psnr_is_over_observations() -> None:
    model, posterior, y = observed(exact("gaussian"), 5)
    states = draws(posterior, y, 4, model.shape)
    entry = measured("psnr", model, states, cut=7)
    single = [measured("psnr", model, states[j::5], torch.arange(j, 20, 5))["value"] for j in range(5)]
    assert entry["value"] == pytest.approx(sum(single) / 5)
    assert entry["standard_error"] == pytest.approx(float(torch.tensor(single).double().std()) / math.sqrt(5))


def test_the_standard_error_of_the_posterior_distance_is_over_observations() -> None:
    model, posterior, y = observed(exact("gaussian"), 2)
    states = draws(posterior, y, 30, model.shape)
    whole = measured("posterior:directions=16", model, states, cut=13)
    one, two = (measured("posterior:directions=16", model, states[j::2], torch.arange(j, 60, 2)) for j in range(2))
    for name in ("value", "mean_error", "covariance_error", "floor"):
        assert whole[name] == pytest.approx((one[name] + two[name]) / 2), name
    for name, error in (("value", "standard_error"), ("mean_error", "mean_error_standard_error")):
        assert whole[error] == pytest.approx(abs(one[name] - two[name]) / 2), name
    assert "standard_error" not in one


# --- Several samples of one observation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "samples", "expected"),
    [
        ("coverage", 19, 0.9),
        ("coverage:level=0.5", 2, 1 / 3),
        pytest.param("coverage", 9, 0.8, marks=pytest.mark.slow),
        pytest.param("coverage:level=0.5", 11, 0.5, marks=pytest.mark.slow),
    ],
)
def test_exact_draws_have_the_coverage_of_exchangeable_ones(spec: str, samples: int, expected: float) -> None:
    model, posterior, y = observed(exact("gaussian"), 60)
    entry = measured(spec, model, draws(posterior, y, samples, model.shape), cut=512)
    assert entry["expected"] == pytest.approx(expected)
    assert entry["value"] == pytest.approx(expected, abs=4 * entry["standard_error"])
    assert entry["standard_error"] < 0.02


def test_samples_that_differ_too_little_have_a_low_coverage_and_spread() -> None:
    model, posterior, y = observed(exact("gaussian"), 20)
    states = draws(posterior, y, 19, model.shape)
    means = torch.stack([posterior.moments(one).mean for one in y]).reshape(20, *model.shape).repeat(19, 1, 1, 1)
    narrow = means + 0.5 * (states - means)
    # The truth is N(m, s²) and the samples are N(m, s²/4): the probability that it is below the least of 19 of them.
    z = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0)
    below = torch.trapezoid(normal.log_prob(z).exp() * (1 - normal.cdf(2 * z)) ** 19, z)
    entry = measured("coverage", model, narrow)
    assert entry["value"] == pytest.approx(1 - 2 * float(below), abs=4 * entry["standard_error"])
    assert entry["value"] < 0.7
    assert measured("coverage", model, means + 2 * (states - means))["value"] > 0.98
    wide, half = (measured("spread", model, s) for s in (states, narrow))
    assert half["value"] == pytest.approx(wide["value"] / 2)


def test_the_spread_of_exact_draws_is_the_deviation_of_the_posterior() -> None:
    model, posterior, y = observed(exact("gaussian"), 6)
    samples = 200
    entry = measured("spread", model, draws(posterior, y, samples, model.shape), cut=100)
    deviation = posterior.moments(y[0]).covariance.diagonal().sqrt()
    # E of a standard deviation of K values is σ (1 - 1/(4K)), its error σ/√(2K), here of 6 x 64 independent pixels.
    d = len(deviation) * 6
    expected = float(deviation.mean()) * (1 - 1 / (4 * samples))
    assert entry["value"] == pytest.approx(expected, abs=4 * float(deviation.max()) / math.sqrt(2 * samples * d))
    square = (1 + 1 / samples) * float(deviation.square().mean())
    relative = 4 * math.sqrt(2 / d) * float(deviation.max() / deviation.mean())  # 4 errors of a mean of χ²
    assert entry["error"] ** 2 == pytest.approx(square, rel=relative)


@pytest.mark.slow
def test_the_coverage_of_a_run_with_the_exact_posterior() -> None:
    how: dict[str, Any] = {"steps": 60, "spacing": "karras", "n": 19 * 60, "model": "exact:gaussian", "quiet": True}
    metrics = ["coverage", "spread"]
    exact_one, collapsed = samplerbench.evaluate(
        "dpm++:order=3", guidances=["exact", "dps"], tasks=f"{TASK},images=60", metrics=metrics, **how
    )
    entry = exact_one["metrics"]["coverage"]
    assert entry["expected"] == pytest.approx(0.9)
    assert entry["value"] == pytest.approx(0.9, abs=4 * entry["standard_error"])
    assert collapsed["metrics"]["coverage"]["value"] < 0.85
    assert exact_one["metrics"]["spread"]["standard_error"] > 0


def test_a_pixel_that_is_known_is_covered() -> None:
    """Without noise, the observed half has an interval of zero width, up to rounding."""
    model, posterior, y = observed(exact("gaussian"), 3, "inpaint:mask=half,sigma=0")
    states = draws(posterior, y, 19, model.shape)
    truth = model.observation.images.repeat(19, 1, 1, 1)  # type: ignore[union-attr]
    states[..., :4] = truth[..., :4] + 1e-7
    entry = measured("coverage", model, states)
    shifted = states.clone()
    shifted[..., :4] += 1e-3
    assert entry["value"] - measured("coverage", model, shifted)["value"] == pytest.approx(0.5)


@pytest.mark.parametrize("metric", ["spread", "coverage"])
@pytest.mark.parametrize("task", ["denoise", "denoise:images=3"])
def test_one_sample_of_each_observation_is_refused(metric: str, task: str) -> None:
    with pytest.raises(
        UserError, match=rf"the metric {metric} .*needs several samples of each observation; set images"
    ):
        samplerbench.evaluate("ddim", steps=1, n=5, model="exact:gaussian", metrics=metric, tasks=task, quiet=True)


# --- LPIPS and FID ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(reference("alex"), tmp_path_factory.mktemp("lpips") / "alex.safetensors")


@pytest.mark.slow
def test_lpips_is_of_the_restored_image_and_its_own_truth(alex: Path) -> None:
    network = reference("alex")
    plain = exact("gaussian", shape="3x32x32")
    model = plain.observed(registry.parse("task", "denoise:images=2"), plain.real(2)[0].clamp(-1, 1))
    states = plain.real(5)[0].clamp(-1, 1)
    entry = measured(f"lpips:weights={alex}", model, states, cut=2)
    truth = model.observation.images[torch.arange(5) % 2]  # type: ignore[union-attr]
    a, b = (((x * 127.5 + 127.5).round() / 127.5 - 1).float() for x in (states, truth))
    with torch.no_grad():
        values = network(a, b).flatten().double()
    assert values[0] < 1e-6  # sample 0 is the truth of observation 0
    assert entry["value"] == pytest.approx(float(values.mean()), rel=1e-4)
    expected = mean_over_observations(values, torch.arange(5) % 2)
    assert entry["standard_error"] == pytest.approx(expected["standard_error"], rel=1e-4)


@pytest.mark.slow
def test_lpips_of_a_run_records_its_weights_and_refuses_small_images(alex: Path) -> None:
    how: dict[str, Any] = {"steps": 1, "n": 2, "metrics": f"lpips:weights={alex}", "tasks": "denoise", "quiet": True}
    (record,) = samplerbench.evaluate("ddim", guidances="ddnm", model="exact:gaussian,shape=3x32x32", **how)
    sha256 = hashlib.sha256(alex.read_bytes()).hexdigest()
    assert list(record["protocol_fields"]["metric sources"].values()) == [f"lpips-alex {sha256}"]
    assert record["metrics"]["lpips"]["value"] > 0
    with pytest.raises(UserError, match="the metric lpips with the network alex needs images of at least 31 pixels"):
        samplerbench.evaluate("ddim", model="exact:gaussian", **how)


@pytest.mark.slow
def test_the_fid_of_perfectly_restored_images_is_that_of_the_observed_ones() -> None:
    """With y = x₀, ddnm returns the observed images: the same permutation of the data as that of the generator real."""
    data = "digits:split=held-out"
    how: dict[str, Any] = {"n": 64, "metrics": "fid", "data": data, "model": "digits", "quiet": True}
    task = {"tasks": "denoise:sigma=0", "steps": 2}
    restored, blurred = samplerbench.evaluate("ddim", guidances=["ddnm", "none"], **task, **how)
    (real,) = samplerbench.evaluate(f"real:data={data}", **how)
    fid = {name: record["metrics"]["fid"] for name, record in (("ddnm", restored), ("none", blurred), ("real", real))}
    assert fid["ddnm"]["value"] == pytest.approx(fid["real"]["value"], rel=1e-6)
    assert fid["none"]["value"] > 2 * fid["ddnm"]["value"]
    assert fid["ddnm"]["reference"].startswith("digits (held-out")
