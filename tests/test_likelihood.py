"""The variational bound and the likelihood of the ODE, against closed forms and the formulas of the papers' code."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import samplerbench
from samplerbench import registry
from samplerbench.cli.app import main
from samplerbench.data import ImageSet, load_data
from samplerbench.errors import RunError, UserError
from samplerbench.likelihoods.gaussian import discretised_nll
from samplerbench.likelihoods.images import Images, load_images
from samplerbench.likelihoods.ode import Divergence, LikelihoodDenoiser, OdeTerms, increasing_grid, ode_terms
from samplerbench.likelihoods.vlb import BoundTerms, bound_terms
from samplerbench.models.exact import ExactModel, exact
from samplerbench.sampling import SIGMA_INFINITY, Inputs, Prediction, Sampler
from samplerbench.sampling.denoiser import per_sample
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.spacing import make_grid

SHAPE = "1x2x3"
PROBLEMS = [(problem, process) for problem in ("gaussian", "mixture") for process in ("vp", "flow")]


def sampler_of(spec: str) -> Sampler:
    made: Sampler = registry.parse("sampler", spec)
    return made


def true_nll(model: ExactModel, x: Tensor) -> Tensor:
    """-log Σ w_k N(x; μ_k, v_k), (B,)."""
    zero = torch.zeros(len(x), dtype=torch.float64)
    return -model.problem.log_components(x.flatten(1), zero).logsumexp(1)


def grid_of(model: ExactModel, steps: int, top: float | None = None) -> Tensor:
    """Levels that are even in t from t = 1 for a flow, else even in log σ from `top` to the lowest level."""
    if model.process.ends:
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        sigmas = t / (1 - t)
        sigmas[0] = SIGMA_INFINITY
        return sigmas
    ends = math.log10(top or float(model.levels[-1])), math.log10(float(model.levels[0]))
    return torch.cat([torch.logspace(*ends, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


def kappa(model: ExactModel, sigma: float) -> Tensor:
    """Var[x₀ᵢ | x] = vᵢ σ²/(vᵢ + σ²) of a Gaussian, (d,)."""
    v = model.problem.variances.flatten()
    return v / (1 + v / sigma**2)


def bound_of(model: ExactModel, spec: str, sigmas: Tensor, images: Images, **options: Any) -> BoundTerms:
    sampler = sampler_of(spec)
    if spec.startswith("analytic-dpm"):
        sampler = sampler.with_state(variances={s: float(kappa(model, s).mean()) for s in sigmas.tolist() if s})
    n = len(images)
    return bound_terms(model, sampler, sigmas, images, Inputs(n), torch.arange(n), **options)


def ode_of(model: ExactModel, spec: str, sigmas: Tensor, x: Tensor, divergence: Divergence) -> OdeTerms:
    sampler = sampler_of(spec)
    grid = increasing_grid(sampler, model, sigmas)
    return ode_terms(model, sampler, grid, x, Inputs(len(x)), torch.arange(len(x)), divergence)


# --- The likelihood of the ODE ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "process"),
    [pytest.param(*pair, marks=[] if pair == ("mixture", "flow") else [pytest.mark.slow]) for pair in PROBLEMS],
)
def test_the_likelihood_of_the_ode_is_the_closed_form(problem: str, process: str) -> None:
    model = exact(problem, shape=SHAPE, process=process)
    x, _ = model.real(6)
    # The prior of a mixture, N(0, 1+σ²), is exact only for σ → ∞.
    top = torch.tensor([SIGMA_INFINITY if process == "flow" else 1e8, 0.0], dtype=torch.float64)
    found = ode_of(model, "pf-ode:solver=rk45,rtol=1e-8,atol=1e-8", top, x, Divergence(None))
    assert (found.total - true_nll(model, x)).abs().max() < 1e-6


def with_covariance(d: int, process: str, n: int) -> tuple[ExactModel, Images, Tensor, Tensor]:
    """N(μ, Σ) with a full covariance: the model, n draws, their -log p, and Σ. D = μ + Σ (Σ + σ²)⁻¹ (x - μ)."""
    generator = torch.Generator().manual_seed(d)
    model, root = exact("gaussian", shape=f"1x1x{d}", process=process), torch.randn(d, d, generator=generator).double()
    covariance = root @ root.T / d + 0.1 * torch.eye(d, dtype=torch.float64)
    mean = torch.randn(d, generator=generator).double()
    values, vectors = torch.linalg.eigh(covariance)

    def evaluate(x: Tensor, sigma: Any, condition: Any) -> Prediction:
        gain = values / (values + per_sample(sigma, x)[:, None] ** 2)
        x0 = mean + ((x.flatten(1) - mean) @ vectors * gain) @ vectors.T
        return Prediction(x0.reshape(x.shape))

    model.evaluate = evaluate  # type: ignore[method-assign]
    gaussian = torch.distributions.MultivariateNormal(mean, covariance)
    x = mean + torch.randn(n, d, generator=generator).double() @ torch.linalg.cholesky(covariance).T
    return model, Images("draws", x.reshape(n, *model.shape), None, None), -gaussian.log_prob(x), covariance


@pytest.mark.parametrize("process", ["vp", "flow"])
@pytest.mark.parametrize("d", [1, 3, pytest.param(10, marks=pytest.mark.slow)])
def test_the_likelihood_of_any_covariance_and_dimension_is_the_closed_form(d: int, process: str) -> None:
    model, images, nll, _ = with_covariance(d, process, 4)
    top = torch.tensor([SIGMA_INFINITY if process == "flow" else 1e8, 0.0], dtype=torch.float64)
    found = ode_of(model, "pf-ode:solver=rk45,rtol=1e-8,atol=1e-8", top, images.values, Divergence(None))
    assert (found.total - nll).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("heun", 2), pytest.param("rk4", 4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("process", ["vp", "flow"])
def test_it_converges_at_the_order_of_the_solver(solver: str, order: int, process: str) -> None:
    model = exact("gaussian", shape=SHAPE, process=process)
    x, _ = model.real(4)
    errors = []
    for steps in (80, 160):
        grid = grid_of(model, steps)
        found = ode_of(model, f"pf-ode:solver={solver}", grid, x, Divergence(None))
        errors.append(float((found.total - true_nll(model, x)).abs().mean()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_hutchinsons_estimate_is_unbiased(distribution: Any) -> None:
    model = exact("mixture", shape=SHAPE)
    x, _ = model.real(5)
    x = x + 0.4 * normal(1, Purpose.PRIOR, torch.arange(5), 0, model.shape)
    inner, index = model.denoiser(Inputs(5)), torch.arange(5)

    def trace(vectors: list[Tensor]) -> Tensor:
        return LikelihoodDenoiser(inner, model.shape, 1.0, vectors).traced(x, 0.4)[1]

    exactly = trace([])
    vectors = Divergence(600, distribution).vectors(0, index, model.shape)
    single = torch.stack([trace([v]) for v in vectors])
    error = single.std(0) / math.sqrt(len(single))
    assert (error > 1e-4).all()
    assert ((single.mean(0) - exactly).abs() < 4.5 * error).all()
    assert torch.allclose(trace(vectors), single.mean(0), atol=1e-12)
    # The exact trace, by finite differences.
    h, total = 1e-5, torch.zeros(5, dtype=torch.float64)
    for k in range(6):
        step = torch.zeros(6, dtype=torch.float64).index_fill(0, torch.tensor(k), h).reshape(model.shape)
        total += ((inner(x + step, 0.4) - inner(x - step, 0.4)) / (2 * h)).flatten(1)[:, k]
    assert torch.allclose(exactly, total, atol=1e-7)


def test_the_likelihood_with_probes_has_the_mean_of_the_exact_one() -> None:
    model = exact("mixture", shape=SHAPE)
    x, _ = model.real(64)
    grid = grid_of(model, 30)
    exactly = ode_of(model, "pf-ode:solver=rk4", grid, x, Divergence(None)).total
    difference = ode_of(model, "pf-ode:solver=rk4", grid, x, Divergence(2)).total - exactly
    assert difference.std() > 1e-3
    assert difference.mean().abs() < 4.5 * difference.std() / 8


# --- The variational bound --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", ["vp", "flow"])
@pytest.mark.parametrize("spec", ["ddpm:variance=large", "analytic-dpm:y=none"])
def test_every_term_of_another_variance_is_its_closed_form(process: str, spec: str) -> None:
    """L_{t-1} = ½ ((1-c)² ‖x₀-D‖²/v + d (u²/v - 1 - log u²/v)) for a variance v other than u²."""
    model = exact("gaussian", shape=SHAPE, process=process)
    n = 400
    images, grid = load_images(model, None, n), grid_of(model, 8)
    found = bound_of(model, spec, grid, images)
    x0, alpha = images.states(torch.arange(n)).flatten(1), model.process.alpha
    for i, (s, t) in enumerate(pairwise(grid.tolist()[:-1])):
        c = (t / s) ** 2
        u2 = t**2 * (1 - c)
        v = (alpha(s) / alpha(t)) ** 2 * (s**2 - t**2)
        if spec.startswith("analytic"):
            v = u2 + (1 - c) ** 2 * float(kappa(model, s).mean())
        z = normal(0, Purpose.LIKELIHOOD, torch.arange(n), i, model.shape).flatten(1)
        variances = model.problem.variances.flatten()
        difference = ((x0 - model.problem.means) - variances / s * z) / (1 + variances / s**2)
        rest = 6 * (u2 / v - 1 - math.log(u2 / v))
        closed = 0.5 * ((1 - c) ** 2 * difference.square().sum(1) / v + rest)
        assert torch.allclose(found.denoising[:, i], closed, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_the_terms_and_the_bound_of_a_full_covariance(process: str) -> None:
    """The mean of L_{t-1} is ½ (1/t² - 1/s²) tr κ(s), κ = Σ - Σ (Σ + s²)⁻¹ Σ, and the bound is above -log p."""
    n, d = 600, 5
    model, images, nll, covariance = with_covariance(d, process, n)
    grid = grid_of(model, 8)
    found = bound_of(model, "ddpm", grid, images)
    for i, (s, t) in enumerate(pairwise(grid.tolist()[:-1])):
        inverse = torch.linalg.inv(covariance + s**2 * torch.eye(d, dtype=torch.float64))
        closed = 0.5 * (1 / t**2 - 1 / s**2) * float(torch.trace(covariance - covariance @ inverse @ covariance))
        term = found.denoising[:, i]
        assert abs(float(term.mean()) - closed) < 4.5 * float(term.std()) / math.sqrt(n)
    for spec in ("ddpm", "ddpm:variance=large"):
        gap = bound_of(model, spec, grid, images).total - nll
        assert gap.mean() > -3 * gap.std() / math.sqrt(n)


@pytest.mark.parametrize("process", ["vp", "flow"])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_every_term_of_a_gaussian_is_its_closed_form(process: str, eta: float) -> None:
    """L_{t-1} = (1-c)² (x₀-D)²/(2u²), of mean (1-c)² κ/(2u²): for η = 1, ½ (1/t² - 1/s²) κ."""
    model = exact("gaussian", shape=SHAPE, process=process)
    n = 400
    images, grid = load_images(model, None, n), grid_of(model, 8)
    found = bound_of(model, "ddpm" if eta == 1 else f"ddim:eta={eta}", grid, images)
    x0, v = images.states(torch.arange(n)).flatten(1), model.problem.variances.flatten()
    levels = grid.tolist()
    for i, (s, t) in enumerate(pairwise(levels[:-1])):
        u = eta * t * math.sqrt(1 - (t / s) ** 2)
        weight = (1 - math.sqrt(t**2 - u**2) / s) ** 2 / u**2
        if eta == 1:
            assert weight == pytest.approx(1 / t**2 - 1 / s**2)
        # x₀ - D = (σ² (x₀-μ) - v σ z)/(v + σ²)
        z = normal(0, Purpose.LIKELIHOOD, torch.arange(n), i, model.shape).flatten(1)
        difference = ((x0 - model.problem.means) - v / s * z) / (1 + v / s**2)
        assert torch.allclose(found.denoising[:, i], 0.5 * weight * difference.square().sum(1), rtol=1e-7)
        closed = 0.5 * weight * float(kappa(model, s).sum())
        error = float(found.denoising[:, i].std()) / math.sqrt(n)
        assert abs(float(found.denoising[:, i].mean()) - closed) < 4.5 * error
    # L_T: 0 from t = 1 of a flow. Else KL(N(x₀, σ²) ‖ N(μ, v + σ²)).
    if process == "flow":
        assert found.prior.abs().max() < 1e-12
    else:
        total = v + levels[0] ** 2
        ratio = levels[0] ** 2 / total
        closed_prior = 0.5 * ((x0 - model.problem.means).square() / total + ratio - 1 - ratio.log()).sum(1)
        assert torch.allclose(found.prior, closed_prior, rtol=1e-6, atol=1e-12)


def test_the_bound_of_the_exact_kernel_is_the_entropy() -> None:
    """In one dimension, analytic-dpm has the exact reverse kernel of a Gaussian: the bound is tight for every N."""
    model = exact("gaussian", shape="1x1x1")
    n = 4000
    images = load_images(model, None, n)
    entropy = 0.5 * math.log(2 * math.pi * math.e * float(model.problem.variances))
    for steps in (2, 10, 40):
        bound = bound_of(model, "analytic-dpm:y=none", grid_of(model, steps), images).total
        gap = bound - true_nll(model, images.states(torch.arange(n)))
        assert abs(float(gap.mean())) < 4.5 * float(gap.std()) / math.sqrt(n)
        assert abs(float(bound.mean()) - entropy) < 4.5 * float(bound.std()) / math.sqrt(n)


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_the_bound_is_above_the_likelihood_and_approaches_it(process: str) -> None:
    model = exact("gaussian", shape=SHAPE, process=process)
    n = 600
    images = load_images(model, None, n)
    true = true_nll(model, images.states(torch.arange(n)))
    gaps = {}
    for spec in ("ddpm", "ddpm:variance=large", "ddim:eta=0.7", "analytic-dpm:y=none"):
        for steps in (4, 16, 64):
            gap = bound_of(model, spec, grid_of(model, steps), images).total - true
            assert gap.mean() > -3 * gap.std() / math.sqrt(n)
            gaps[spec, steps] = float(gap.mean())
    assert gaps["analytic-dpm:y=none", 4] > 2 * gaps["analytic-dpm:y=none", 64]
    assert abs(gaps["analytic-dpm:y=none", 64]) < 0.1 * 6  # nats per dimension
    for steps in (4, 16, 64):
        least = gaps["analytic-dpm:y=none", steps]
        assert least <= min(gaps["ddpm", steps], gaps["ddpm:variance=large", steps]) + 0.02


def guided_diffusion(
    bars: Tensor, kind: str, x0: Tensor, noise: list[Tensor], network: Callable[[Tensor, int], tuple[Tensor, Any]]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The terms of `GaussianDiffusion._vb_terms_bpd`, in y = √ᾱ x₀ + √(1-ᾱ) ε, with ᾱ of the respaced chain.

    Returns the terms of t = N-1 … 1 in bits per dimension, and the mean and log variance of t = 0.
    """
    previous = torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
    betas = 1 - bars / previous
    posterior = betas * (1 - previous) / (1 - bars)
    clipped = torch.cat([posterior[1:2], posterior[1:]]).log()
    terms, last = [], (x0, x0)
    for i, t in enumerate(reversed(range(len(bars)))):
        y = bars[t].sqrt() * x0 + (1 - bars[t]).sqrt() * noise[i]
        output, fraction = network(y, t)
        start = y / bars[t].sqrt() - (1 / bars[t] - 1).sqrt() * output

        def mean(of: Tensor, t: int = t, y: Tensor = y) -> Tensor:
            first = betas[t] * previous[t].sqrt() / (1 - bars[t])
            return first * of + (1 - previous[t]) * (1 - betas[t]).sqrt() / (1 - bars[t]) * y

        log_variance = clipped[t].expand_as(x0)
        if kind == "large":
            log_variance = torch.cat([posterior[1:2], betas[1:]]).log()[t].expand_as(x0)
        if kind == "learned":
            log_variance = fraction * betas[t].log() + (1 - fraction) * clipped[t]
        if t == 0:
            last = (mean(start), log_variance)
            continue
        divergence = -1 + log_variance - clipped[t] + (clipped[t] - log_variance).exp()
        divergence = 0.5 * (divergence + (mean(x0) - mean(start)).square() * (-log_variance).exp())
        terms.append(divergence.flatten(1).mean(1) / math.log(2))
    return terms, *last


def tanh_decoder(x: Tensor, mean: Tensor, log_variance: Tensor, half: float) -> Tensor:
    """`discretized_gaussian_log_likelihood`, with its approximation of the normal distribution function."""

    def cdf(v: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    scale = (-0.5 * log_variance).exp()
    high, low = cdf(scale * (x - mean + half)), cdf(scale * (x - mean - half))
    inside = (high - low).clamp(min=1e-12).log()
    edge = torch.where(x > 0.999, (1 - low).clamp(min=1e-12).log(), inside)
    return torch.where(x < -0.999, high.clamp(min=1e-12).log(), edge)


@pytest.mark.parametrize(
    ("source", "kind"), [("digits", "small"), ("digits", "large"), ("digits-learned-variance", "learned")]
)
def test_the_terms_of_the_digits_network_are_those_of_guided_diffusion(source: str, kind: str) -> None:
    n, steps = 8, 5
    model = samplerbench.load_model(source, device="cpu")
    images = load_images(model, "digits:split=held-out", n)
    assert images.levels == 17
    sampler = sampler_of(f"ddpm:variance={kind}")
    grid = make_grid(registry.parse("spacing", "leading"), model.levels, steps)
    assert images.labels is not None
    found = bound_terms(model, sampler, grid, images, Inputs(n, images.labels), torch.arange(n))
    # The schedule is written again: linear β from 10⁻⁴ to 0.02, every 200th of 1000 timesteps.
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[::200]
    noise = [normal(0, Purpose.LIKELIHOOD, torch.arange(n), i, model.shape) for i in range(steps)]

    def network(y: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            output = model.network(y.float(), 200 * t, class_labels=images.labels).sample.double()
        if kind != "learned":
            return output, None
        epsilon, variance = output.chunk(2, dim=1)
        return epsilon, (variance + 1) / 2

    terms, mean, log_variance = guided_diffusion(bars, kind, images.states(torch.arange(n)), noise, network)
    d = 64 * math.log(2)
    for i, term in enumerate(terms):
        assert torch.allclose(found.denoising[:, i] / d, term, atol=1e-4, rtol=1e-5)
    # The one difference is the distribution function of the decoder. Here it is the exact one of torch.
    x0, scale = images.states(torch.arange(n)), (-0.5 * log_variance).exp()
    low = torch.special.ndtr(scale * (x0 - 1 / 16 - mean)).where(x0 > -0.999, torch.zeros(()).double())
    high = torch.special.ndtr(scale * (x0 + 1 / 16 - mean)).where(x0 < 0.999, torch.ones(()).double())
    exactly = -(high - low).log().flatten(1).sum(1)
    assert torch.allclose(found.reconstruction / d, exactly / d, atol=1e-4)
    approximate = -tanh_decoder(x0, mean, log_variance, 1 / 16).flatten(1).sum(1)
    assert torch.allclose(found.reconstruction / d, approximate / d, atol=1e-2)


@pytest.mark.parametrize("kind", ["small", "large", "learned"])
def test_the_terms_of_a_learned_variance_are_those_of_guided_diffusion(kind: str) -> None:
    model = exact("mixture", shape=SHAPE)
    predict = model.evaluate

    def fraction(x: Tensor) -> Tensor:
        return torch.sigmoid(3 * x) * 1.2 - 0.1

    def evaluate(x: Tensor, sigma: Any, condition: Any) -> Prediction:
        return Prediction(predict(x, sigma, condition).x0, fraction(x))

    model.evaluate = evaluate  # type: ignore[method-assign]
    images, timesteps = load_images(model, None, 5), torch.tensor([0, 150, 400, 999])
    grid = torch.cat([model.levels[timesteps.flip(0)], torch.zeros(1, dtype=torch.float64)])
    found = bound_of(model, f"ddpm:variance={kind}", grid, images)
    noise = [normal(0, Purpose.LIKELIHOOD, torch.arange(5), i, model.shape) for i in range(4)]
    bars = 1 / (1 + model.levels[timesteps] ** 2)

    def network(y: Tensor, t: int) -> tuple[Tensor, Tensor]:
        sigma = float(model.levels[timesteps[t]])
        x = y * math.sqrt(1 + sigma**2)
        return (x - predict(x, sigma, {}).x0) / sigma, fraction(x)

    x0 = images.states(torch.arange(5))
    terms, mean, log_variance = guided_diffusion(bars, kind, x0, noise, network)
    for i, term in enumerate(terms):
        assert torch.allclose(found.denoising[:, i] / (6 * math.log(2)), term, rtol=1e-6)
    decoder = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    assert torch.allclose(found.reconstruction, -decoder.log_prob(x0).flatten(1).sum(1), rtol=1e-6)


def test_the_discretised_decoder_is_a_distribution() -> None:
    k = torch.arange(17).reshape(-1, 1, 1, 1)
    for mean, variance in ((0.1, 0.3), (-0.98, 1e-3), (3.0, 0.5), (0.0, 1e4)):
        p = (-discretised_nll(k, 17, torch.full((17, 1, 1, 1), mean, dtype=torch.float64), variance)).exp()
        assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    # Far in the tails, where Φ(b) - Φ(a) is 0 in float64, the value is that of mpmath.
    import mpmath

    mpmath.mp.dps = 60
    far = float(discretised_nll(k[3:4], 17, torch.ones(1, 1, 1, 1, dtype=torch.float64), 1e-3))
    low, high = ((mpmath.mpf(-1 + 3 / 8 + sign / 16) - 1) / mpmath.sqrt(mpmath.mpf(1e-3)) for sign in (-1, 1))
    assert far == pytest.approx(float(-mpmath.log(mpmath.ncdf(high) - mpmath.ncdf(low))), rel=1e-12)


# --- Images and grey levels -------------------------------------------------------------------------------------------


def test_dequantised_images_are_uniform_in_their_bins() -> None:
    images = load_images(exact("points"), "digits:split=held-out", 20)
    rows = torch.arange(20)
    x = images.dequantised(rows, 0, 0)
    assert images.levels == 17
    assert torch.equal(((x + 1) / 2 * 17).floor().long(), images.values)
    u = ((x + 1) / 2 * 17 - images.values).flatten()
    assert abs(float(u.mean()) - 0.5) < 4.5 / math.sqrt(12 * len(u))
    assert float(u.var()) == pytest.approx(1 / 12, rel=0.1)
    assert not torch.equal(x, images.dequantised(rows, 0, 1))
    assert torch.equal(x[3:5], images.dequantised(torch.tensor([3, 4]), 0, 0))


def test_grey_levels_are_checked() -> None:
    data = load_data("digits:split=held-out")
    assert data.grey_levels == 17
    assert load_images(exact("points"), "digits:split=held-out", None).values.max() == 16
    with pytest.raises(UserError, match="its pixels are not the 5 grey levels"):
        replace(data, grey_levels=5)


def test_images_without_grey_levels_have_no_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_data("digits:split=held-out")
    unknown = ImageSet("mine", "all", data.images, data.labels, 10, grey_levels=None)
    monkeypatch.setattr("samplerbench.likelihoods.images.load_data", lambda _: unknown)
    with pytest.raises(UserError, match="the number of grey levels of the data set mine is not known"):
        samplerbench.likelihood("ddpm", 2, data="mine", n=2)


# --- The whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "spec"), [("vlb", "ddpm"), ("nll", "pf-ode")])
def test_an_image_does_not_depend_on_the_batch_nor_on_the_number_of_images(method: Any, spec: str) -> None:
    settings: Any = {"method": method, "model": "digits", "training": False, "seed": 3}
    (whole,) = samplerbench.likelihood(spec, 3, n=7, **settings)
    for n, batch_size in ((7, 3), (4, 4)):
        (part,) = samplerbench.likelihood(spec, 3, n=n, batch_size=batch_size, **settings)
        assert part.per_image == pytest.approx(whole.per_image[:n], rel=1e-5)
    (other,) = samplerbench.likelihood(spec, 3, n=7, **settings | {"seed": 4})
    assert other.per_image != pytest.approx(whole.per_image, rel=1e-3)


def test_parts_of_the_images_have_the_terms_of_the_whole() -> None:
    """As several processes share them, in any order."""
    model = exact("mixture", shape=SHAPE)
    images, grid, x = load_images(model, None, 7), grid_of(model, 4), model.real(7)[0]
    solver, parts = sampler_of("pf-ode:solver=heun"), (torch.tensor([5, 6, 4]), torch.tensor([1, 0, 3, 2]))
    increasing = increasing_grid(solver, model, grid)

    def totals(rows: Tensor) -> tuple[Tensor, Tensor]:
        bound = bound_terms(model, sampler_of("ddpm"), grid, images, Inputs(7), rows, seed=9)
        ode = ode_terms(model, solver, increasing, x[rows], Inputs(7), rows, Divergence(1), seed=9)
        return bound.total, ode.total

    whole = totals(torch.arange(7))
    for rows in parts:
        for part, all_of_them in zip(totals(rows), whole, strict=True):
            assert torch.allclose(part, all_of_them[rows], rtol=1e-12)


def test_the_command_prints_the_terms(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["likelihood", "-s", "ddpm", "-s", "ddim:eta=1", "--steps", "2,4", "--n", "6"]
    with pytest.raises(SystemExit):
        main([*arguments, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [(r["method"], r["sampler"], r["steps"]) for r in rows] == [
        ("vlb", spec, steps) for spec in ("ddpm", "ddim:eta=1") for steps in (2, 4)
    ]
    for row in rows:
        terms = row["terms"]
        assert (row["n"], row["nfe"], row["data"]) == (6, row["steps"], "digits:split=held-out")
        assert len(terms["per_timestep"]) == row["steps"] - 1
        total = terms["prior"] + sum(terms["per_timestep"]) + terms["reconstruction"]
        assert row["bits_per_dim"] == pytest.approx(total)
        assert row["nats_per_dim"] == pytest.approx(total * math.log(2))
        assert row["training"]["data"] == "digits:split=train"
        assert row["training"]["gap"] == pytest.approx(row["bits_per_dim"] - row["training"]["bits_per_dim"])
        assert row["standard_error"] > 0
    # η = 1 is DDPM with the small variance.
    for one, other in zip(rows[:2], rows[2:], strict=True):
        assert one["terms"]["per_timestep"] == pytest.approx(other["terms"]["per_timestep"])
        assert one["terms"]["reconstruction"] == pytest.approx(other["terms"]["reconstruction"])
    with pytest.raises(SystemExit):
        main([*arguments, "--no-gap"])
    assert f"{rows[0]['bits_per_dim']:.4f}" in capsys.readouterr().out


def test_the_likelihood_of_an_exact_model_is_that_of_new_samples() -> None:
    """The value of a density: the mean is the entropy of the Gaussian, and the exact divergence takes d passes."""
    (found,) = samplerbench.likelihood(
        "pf-ode:solver=rk4", 60, method="nll", model="exact:gaussian,shape=1x2x3", n=200, probes="exact", dtype="fp64"
    )
    model = exact("gaussian", shape=SHAPE)
    entropy = 0.5 * (2 * math.pi * math.e * model.problem.variances).log().mean()
    assert found.standard_error is not None
    assert abs(found.nats_per_dim - float(entropy)) < 4.5 * found.standard_error * math.log(2)
    assert found.levels is None
    assert found.network_backward == 6 * found.nfe


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"samplers": ["ddpm", "ddim"]}, "sampler ddim reverses a forward process without noise"),
        ({"samplers": "analytic-dpm:form=ddim"}, "form=ddim reverses a forward process without noise"),
        ({"samplers": "real"}, "real is a generator and has no noise levels"),
        ({"samplers": "dpm++"}, "has no Gaussian reverse kernel"),
        ({"samplers": "pf-ode"}, "has no Gaussian reverse kernel"),
        ({"samplers": "ddpm", "method": "nll"}, "does not solve the probability-flow ODE from data to noise"),
        ({"samplers": "ddpm:variance=learned"}, "the model learned no variance"),
        ({"samplers": "ddpm", "method": "both"}, "choose vlb, nll or elbo"),
        ({"samplers": "ddpm", "n": 400}, "digits:split=held-out has only 355 images"),
        ({"samplers": "pf-ode", "method": "nll", "probes": "many"}, 'give a whole number or "exact"'),
        ({"samplers": "ddpm", "model": "exact:points"}, "does not say which images were held out"),
    ],
)
def test_wrong_input_is_one_line(arguments: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as raised:
        samplerbench.likelihood(**{"steps": 3, "n": 2} | arguments)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_latent_model_has_no_likelihood_of_images() -> None:
    model = replace(exact("gaussian", shape=SHAPE), autoencoder=object())
    with pytest.raises(UserError, match="its decoder has no density"):
        samplerbench.likelihood("ddpm", 2, model=model, n=2)


@pytest.mark.parametrize("wrong", [3, (torch.zeros(2, 1), 1.0), (torch.zeros(2, 1, 2, 3), "1")])
def test_a_kernel_of_another_form_is_one_line(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampler = exact("gaussian", shape=SHAPE), sampler_of("ddpm")
    monkeypatch.setattr(type(sampler), "transition", lambda *_: wrong)
    with pytest.raises(RunError, match=r"sampler ddpm: transition returned .* it must be None, or a mean"):
        bound_of(model, "ddpm", grid_of(model, 3), load_images(model, None, 2))


@pytest.mark.slow
def test_the_optimal_variance_has_the_lowest_bound_of_the_digits() -> None:
    specs = ["ddpm", "ddpm:variance=large", "analytic-dpm:y=none"]
    found = samplerbench.likelihood(specs, [10, 25], n=64, training=False)
    bits = {(one.sampler, one.steps): one.bits_per_dim for one in found}
    for steps in (10, 25):
        small, large, optimal = (bits[spec, steps] for spec in specs)
        assert optimal < min(small, large)
        assert small > 3 * large


@pytest.mark.slow
def test_the_included_network_with_a_learned_variance_is_a_folder_of_diffusers() -> None:
    from diffusers import DDPMPipeline

    from samplerbench.assets import asset

    pipeline = DDPMPipeline.from_pretrained(asset("digits-learned-variance"))
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert (pipeline.unet.config.in_channels, pipeline.unet.config.out_channels) == (1, 2)
    model = samplerbench.load_model("digits-learned-variance", device="cpu")
    assert (model.learned_variance, model.shape, model.data) == (True, (1, 8, 8), "digits:split=train")


@pytest.mark.slow
def test_the_learned_variance_has_a_lower_bound_than_both_fixed_ones() -> None:
    specs = ["ddpm", "ddpm:variance=large", "ddpm:variance=learned"]
    found = samplerbench.likelihood(specs, 50, model="digits-learned-variance", n=32, training=False)
    small, large, learned = (one.bits_per_dim for one in found)
    assert learned < large - 0.5
    assert small > 3 * large
