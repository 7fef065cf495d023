"""The exact problems against densities written down independently: SciPy's, torch.distributions', and plain NumPy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.special import logsumexp, softmax
from scipy.stats import norm
from sklearn.datasets import load_digits
from support.denoising import denoiser, labelled
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from samplerbench import cli, registry
from samplerbench.errors import UserError
from samplerbench.models.exact import NO_LABEL, ExactModel, exact
from samplerbench.models.model import Bound
from samplerbench.sampling import per_sample
from samplerbench.sampling.noise import Purpose, normal

LEVELS = (0.02, 0.3, 2.0, 60.0)
PROBLEMS = {
    "gaussian": {"shape": "1x2x2"},
    "mixture": {"shape": "1x2x2"},
    "mixture of five": {"shape": "2x1x3", "components": 5, "classes": 3, "width": 0.6, "seed": 3},
    "points": {},
}


def make(name: str) -> ExactModel:
    return exact(name.split()[0], **PROBLEMS[name])


def states(model: ExactModel, sigma: float, n: int = 6) -> Tensor:
    """Noised data, (n, *shape): where a sampler would be at that level."""
    x0, _ = model.real(n)
    return x0 + sigma * normal(5, Purpose.PRIOR, torch.arange(n), 0, model.shape)


def numpy_of(model: ExactModel) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Means (K, d), variances (K, d), weights (K,) and labels (K,)."""
    p = model.problem
    means = p.means.numpy()
    variances = np.broadcast_to(p.variances.numpy().reshape(len(means), -1), means.shape)
    return means, variances, p.log_weights.exp().numpy(), p.labels.numpy()


def brute_force(model: ExactModel, x: Tensor, sigma: float, label: int = NO_LABEL) -> tuple[np.ndarray, np.ndarray]:
    """(D, log p(y | x)) by Bayes' rule, one component and one sample at a time."""
    means, variances, weights, labels = numpy_of(model)
    denoised, posteriors = [], []
    for row in x.flatten(1).numpy():
        joint = np.log(weights) + norm.logpdf(row, means, np.sqrt(variances + sigma**2)).sum(1)
        classes = np.array([logsumexp(joint[labels == k]) for k in range(labels.max() + 1)])
        posteriors.append(classes - logsumexp(joint))
        share = softmax(np.where((labels == label) | (label == NO_LABEL), joint, -np.inf))
        # The mean of x₀ given x and the component k is where the two Gaussians' product has its mode.
        pull = np.divide(sigma**2, variances + sigma**2)
        denoised.append((share[:, None] * (row + pull * (means - row))).sum(0))
    return np.stack(denoised).reshape(x.shape), np.stack(posteriors)


def log_density(model: ExactModel, sigma: float, label: int = NO_LABEL) -> MixtureSameFamily:
    means, variances, weights, labels = (torch.from_numpy(np.array(a)) for a in numpy_of(model))
    kept = (labels == label) | (label == NO_LABEL)
    parts = Independent(Normal(means[kept], (variances[kept] + sigma**2).sqrt()), 1)
    return MixtureSameFamily(Categorical(weights[kept]), parts)


def score(model: ExactModel, x: Tensor, sigma: float, label: int = NO_LABEL) -> Tensor:
    """∇ log p(x, σ), by automatic differentiation of torch.distributions' density."""
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(log_density(model, sigma, label).log_prob(leaf.flatten(1)).sum(), leaf)
    return gradient


def denoised(model: ExactModel, x: Tensor, sigma: float, labels: Tensor | None = None) -> Tensor:
    return denoiser(model, labels, len(x))(x, sigma)


# --- The denoiser ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_denoiser_is_the_mean_of_the_posterior(name: str, sigma: float) -> None:
    model = make(name)
    x = states(model, sigma)
    np.testing.assert_allclose(denoised(model, x, sigma), brute_force(model, x, sigma)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_denoiser_is_tweedies_formula(name: str, sigma: float) -> None:
    """D = x + σ² ∇ log p(x, σ)."""
    model = make(name)
    x = states(model, sigma)
    expected = x + sigma**2 * score(model, x, sigma)
    torch.testing.assert_close(denoised(model, x, sigma), expected, rtol=0, atol=1e-9)


def test_each_sample_may_have_a_level_of_its_own() -> None:
    model = make("mixture")
    x = torch.cat([states(model, sigma, 1) for sigma in LEVELS])
    together = denoiser(model, None, len(x))(x, torch.tensor(LEVELS, dtype=torch.float64))
    alone = torch.cat([denoised(model, x[i : i + 1], sigma) for i, sigma in enumerate(LEVELS)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_a_float32_state_is_answered_in_float32_to_its_precision() -> None:
    model = make("mixture")
    x = states(model, 2.0)
    single = denoised(model, x.float(), 2.0)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), denoised(model, x.float().double(), 2.0), rtol=0, atol=1e-7)


# --- Labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("name", ["mixture", "mixture of five", "points"])
def test_a_label_leaves_only_its_components(name: str, sigma: float) -> None:
    model = make(name)
    x = states(model, sigma)
    assert model.classes is not None
    labels = torch.tensor([0, 1, model.classes - 1, NO_LABEL, 0, NO_LABEL])
    expected = [brute_force(model, x[i : i + 1], sigma, int(y))[0] for i, y in enumerate(labels)]
    np.testing.assert_allclose(denoised(model, x, sigma, labels), np.concatenate(expected), rtol=0, atol=1e-9)
    free = denoised(model, x, sigma)
    assert torch.equal(denoised(model, x, sigma, torch.full((6,), NO_LABEL)), free)


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("name", ["mixture", "mixture of five", "points"])
def test_label_posterior_is_that_of_bayes(name: str, sigma: float) -> None:
    model = make(name)
    x = states(model, sigma)
    classifier = model.own_classifier()
    assert classifier is not None
    log_p = classifier.logits(x, torch.full((len(x),), sigma, dtype=torch.float64))
    assert log_p.shape == (len(x), classifier.classes)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(len(x), dtype=torch.float64), rtol=0, atol=1e-12)
    np.testing.assert_allclose(log_p.exp(), np.exp(brute_force(model, x, sigma)[1]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("name", ["mixture", "mixture of five", "points"])
def test_unconditional_plus_label_score_is_conditional(name: str, sigma: float) -> None:
    """D_u + σ² ∇ log p(y | x, σ) = D_c: what classifier guidance and classifier-free guidance both stand on."""
    model = make(name)
    x = states(model, sigma)
    labels = torch.tensor([1, 0, 1, 1, 0, 1])
    denoise, classifier = Bound(model, labelled(labels)), model.own_classifier()
    assert classifier is not None
    bayes = denoise.unconditional(x, sigma).x0 + sigma**2 * classifier.score(x, per_sample(sigma, x), labels)
    torch.testing.assert_close(bayes, denoise.conditional(x, sigma).x0, rtol=0, atol=1e-8)
    ours = torch.cat(
        [x[i : i + 1] + sigma**2 * score(model, x[i : i + 1], sigma, int(y)) for i, y in enumerate(labels)]
    )
    torch.testing.assert_close(bayes, ours, rtol=0, atol=1e-8)


# --- The distribution -----------------------------------------------------------------------------------------------


def test_draws_have_the_mean_the_variance_and_the_labels_of_the_mixture() -> None:
    model, n = make("mixture of five"), 20_000
    x0, given = model.real(n)
    means, variances, weights, labels = numpy_of(model)
    mean = weights @ means
    variance = weights @ (variances + means**2) - mean**2
    found = x0.flatten(1).numpy()
    assert np.abs((found.mean(0) - mean) / np.sqrt(variance / n)).max() < 4.5
    fourth = ((found - mean) ** 4).mean(0)
    assert np.abs((found.var(0) - variance) / np.sqrt((fourth - variance**2) / n)).max() < 4.5
    assert given is not None
    for k in range(3):
        p = weights[labels == k].sum()
        assert abs(float((given == k).double().mean()) - p) < 4.5 * np.sqrt(p * (1 - p) / n)


def test_a_gaussian_run_starts_from_its_exact_marginal() -> None:
    model = make("gaussian")
    means, variances, _, _ = numpy_of(model)
    z = normal(0, Purpose.PRIOR, torch.arange(5), 0, model.shape)
    expected = means + np.sqrt(variances + 7.0**2) * z.flatten(1).numpy()
    np.testing.assert_allclose(model.prior(z, 7.0).flatten(1), expected, rtol=1e-13)
    torch.testing.assert_close(make("mixture").prior(z, 7.0), z * 50**0.5)


def test_the_parameters_make_another_problem() -> None:
    base = make("mixture of five")
    assert base.identity["weights"] == make("mixture of five").identity["weights"]
    others = [exact("mixture", **PROBLEMS["mixture of five"] | change) for change in ({"seed": 4}, {"width": 0.5})]
    assert len({m.identity["weights"] for m in (base, *others)}) == 3
    assert [len(base.problem.means), base.classes, base.shape] == [5, 3, (2, 1, 3)]


# --- The ODE --------------------------------------------------------------------------------------------------------


def integrate(model: ExactModel, x: Tensor, start: float, end: float) -> np.ndarray:
    """The probability-flow ODE by SciPy in σ, on the brute-force denoiser."""

    def slope(sigma: float, y: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(y).reshape(1, *model.shape)
        return (y - brute_force(model, state, sigma)[0].ravel()) / sigma

    runs = [solve_ivp(slope, (start, end), row.flatten().numpy(), method="DOP853", rtol=1e-13, atol=1e-14) for row in x]
    return np.stack([run.y[:, -1] for run in runs]).reshape(x.shape)


@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_solve_is_the_solution_of_the_ode(name: str) -> None:
    model = make(name)
    x = states(model, 5.0, 2)
    np.testing.assert_allclose(model.solve(x, 5.0, 0.5), integrate(model, x, 5.0, 0.5), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["gaussian", "mixture", "mixture of five"])
def test_solve_composes_and_can_be_undone(name: str) -> None:
    model = make(name)
    x = states(model, 30.0, 3)
    there = model.solve(x, 30.0, 0.4)
    by_way = model.solve(model.solve(x, 30.0, 3.0), 3.0, 0.4)
    torch.testing.assert_close(there, by_way, rtol=0, atol=1e-10)
    # On the way back an error grows as the state does, by 30/0.4 at most.
    torch.testing.assert_close(model.solve(there, 0.4, 30.0), x, rtol=0, atol=1e-10 * 30 / 0.4)


def test_solve_takes_labels() -> None:
    model = make("mixture")
    x = states(model, 5.0, 2)
    labels = torch.tensor([1, 0])
    both = model.solve(x, 5.0, 0.5, labels)
    alone = model.solve(x[1:], 5.0, 0.5, labels[1:])
    assert torch.equal(both[1:], alone)
    assert float((both - model.solve(x, 5.0, 0.5)).abs().max()) > 1e-3


# --- The digits as points -------------------------------------------------------------------------------------------


def digit_images() -> np.ndarray:
    """The 1,797 images, (1797, 64), as the toolkit's pixels: 0 … 16 becomes 0 … 255, then [-1, 1]."""
    pixels = np.round(load_digits().data * (255 / 16)).astype(np.uint8)
    return (pixels.astype(np.float64) - 127.5) / 127.5


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_points_are_a_softmax_over_the_digits(sigma: float) -> None:
    model, images = make("points"), digit_images()
    x = states(model, sigma, 4)
    squares = ((x.flatten(1).numpy()[:, None] - images) ** 2).sum(2)
    expected = softmax(-squares / (2 * sigma**2), axis=1) @ images
    np.testing.assert_allclose(denoised(model, x, sigma).flatten(1), expected, rtol=0, atol=1e-6)  # float32 pixels


def test_with_little_noise_a_point_is_the_nearest_digit() -> None:
    model, images = make("points"), digit_images()
    x = states(model, 0.05, 20)
    nearest = ((x.flatten(1).numpy()[:, None] - images) ** 2).sum(2).argmin(1)
    np.testing.assert_allclose(denoised(model, x, 1e-3).flatten(1), images[nearest], rtol=0, atol=1e-6)


def test_with_much_noise_a_point_is_the_mean_digit() -> None:
    model, images = make("points"), digit_images()
    found = denoised(model, states(model, 1e5, 4), 1e5).flatten(1)
    # The first-order term is Cov x/σ², and x/σ is a few units.
    np.testing.assert_allclose(found, np.broadcast_to(images.mean(0), found.shape), rtol=0, atol=1e-3)
    seven = denoised(model, states(model, 1e5, 1), 1e5, torch.tensor([7])).flatten(1)
    mean_seven = images[load_digits().target == 7].mean(0)
    np.testing.assert_allclose(seven, mean_seven[None], rtol=0, atol=1e-3)


def test_points_draw_digits_with_their_labels() -> None:
    x0, labels = make("points").real(50)
    images = digit_images()
    index = ((x0.flatten(1).numpy()[:, None] - images) ** 2).sum(2).argmin(1)
    np.testing.assert_allclose(x0.flatten(1), images[index], rtol=0, atol=1e-6)
    assert labels is not None
    assert set(load_digits().target[index]) == set(labels.tolist())
    assert len(set(index)) > 40


# --- As a model of the commands -------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("shape", ["8x8", "1x8", "1x8x8x8", "1x0x8", "1xax8", "", "-1x8x8"])
def test_a_bad_shape_is_refused_in_one_line(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="is not channels x height x width; write shape=1x8x8"):
        exact("gaussian", shape=shape)
    assert command("sample", "never.png", "-s", "ddim", "--model", f"exact:mixture,shape={shape}") == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("spec", ["exact:points", "exact:mixture,shape=1x8x8", "exact/gaussian"])
def test_run_takes_an_exact_problem(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", str(tmp_path), "--json")
    assert command("run", "-s", "ddim", "--model", spec, "--steps", "3", "--n", "8", *out) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["nfe"] == 3
    assert record["metrics"]["fid"]["features"] == "digits-cnn"
    assert np.isfinite(record["metrics"]["fid"]["value"])
    assert record["labels"] == ("none" if "gaussian" in spec else "balanced")


@pytest.mark.parametrize("spec", ["exact:points", "exact:mixture,shape=3x4x5", "exact/gaussian"])
def test_sample_and_show_take_an_exact_problem(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    npz = tmp_path / "images.npz"
    arguments = ("-s", "dpm++", "--model", spec, "--steps", "6", "--n", "3", "--npz", str(npz))
    assert command("sample", str(tmp_path / "grid.png"), *arguments) == 0
    with np.load(npz) as file:
        images = file["images"]
    assert images.shape == ((3, 4, 5, 3) if "3x4x5" in spec else (3, 8, 8, 1))
    capsys.readouterr()
    assert command("show", spec) == 0
    assert "closed form" in capsys.readouterr().out


def test_samples_of_points_are_digits(tmp_path: Path) -> None:
    """Guided or not, the ideal denoiser of a data set can only give its images back."""
    npz = tmp_path / "images.npz"
    arguments = ("-s", "heun", "--model", "exact:points", "--steps", "40", "--n", "5", "--labels", "7")
    assert command("sample", str(tmp_path / "grid.png"), *arguments, "--npz", str(npz)) == 0
    with np.load(npz) as file:
        found = file["images"].reshape(5, 64).astype(int)
    sevens = np.round(load_digits().data * (255 / 16))[load_digits().target == 7]
    distance = np.abs(found[:, None] - sevens).max(2).min(1)
    assert distance.max() <= 1


def test_an_exact_problem_is_found_by_its_spec() -> None:
    source = registry.parse("model", "exact:mixture,components=3,classes=3")
    assert (source.problem, source.components, source.classes) == ("mixture", 3, 3)
    assert registry.parse("model", "exact/points").problem == "points"
