"""The exact posterior, and the methods for inverse problems in the regimes in which they are exact."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.denoising import denoiser
from torch import Tensor

from samplerbench import registry
from samplerbench.errors import UserError
from samplerbench.models import exact_posterior
from samplerbench.models.exact import ExactModel, exact
from samplerbench.models.model import Model
from samplerbench.models.sample import bind, start_batch
from samplerbench.sampling import Guidance, Inputs
from samplerbench.sampling.guidance import bind_guidance
from samplerbench.sampling.meter import Meter
from samplerbench.sampling.spacing import make_grid

LINEAR = [
    *("inpaint:mask=half", "inpaint:mask=random,rate=0.6,sigma=0.2", "super-resolution:factor=2", "blur:width=0.8"),
    *("denoise:sigma=0.5", "compressed-sensing:sigma=0.1"),
]


def observed(model: Model, spec: str, n: int = 3) -> Any:
    return model.observed(registry.parse("task", spec), model.real(n)[0])


def matrix(model: Model) -> Tensor:
    """A as a matrix (m, d), column by column."""
    assert model.observation is not None
    d = math.prod(model.shape)
    return model.observation.operator.forward(torch.eye(d, dtype=torch.float64).reshape(d, *model.shape)).flatten(1).T


def observation(model: Model, n: int = 1) -> Tensor:
    return model.inputs(torch.arange(n), Inputs(n)).tensors["observation"]


def guidance(spec: str) -> Guidance:
    made: Guidance = registry.parse("guidance", spec)
    return made


def states(model: ExactModel, sigma: float) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(3, *model.shape, generator=generator, dtype=torch.float64)
    return model.real(6)[0][3:].double() + sigma * z


# --- The posterior ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [LINEAR[0], *(pytest.param(s, marks=pytest.mark.slow) for s in LINEAR[1:])])
def test_the_posterior_of_a_gaussian_is_that_of_the_precisions(spec: str) -> None:
    """Λ = C⁻¹ + AᵀA/σ_y², m = Λ⁻¹ (C⁻¹ μ + Aᵀ y/σ_y²): another form than the one in the code."""
    model = observed(exact("gaussian"), spec)
    a, y = matrix(model), observation(model)[0].flatten()
    v, mean, noise = model.problem.variances[0], model.problem.means[0], model.observation.sigma**2
    covariance = torch.linalg.inv(torch.diag(1 / v) + a.T @ a / noise)
    moments = exact_posterior(model, "a test").moments(observation(model)[0])
    torch.testing.assert_close(moments.covariance, covariance, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(moments.mean, covariance @ (mean / v + a.T @ y / noise), rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_the_denoiser_of_a_mixture_is_the_integral() -> None:
    """E[x₀ | x, y] of two pixels, by quadrature on a fine grid; also with a label."""
    model = observed(exact("mixture", shape="1x1x2", components=3, width=0.4), "inpaint:mask=half,sigma=0.3", 4)
    points = torch.linspace(-4, 4, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(points, points)
    problem = model.problem
    y = observation(model, 4)
    for sigma in (0.2, 2.0):
        x = model.real(4)[0].flip(0) * (1 + sigma)
        for labels in (None, torch.tensor([0, 1, 1, 0])):
            level = torch.full((4,), sigma, dtype=torch.float64)
            made = exact_posterior(model, "a test").predict(x, level, y, labels).flatten(1)
            scores = problem.log_components(grid, torch.zeros(len(grid), dtype=torch.float64))
            for i in range(4):
                label = None if labels is None else labels[i].expand(len(grid))
                prior = problem.of_labels(scores, label).logsumexp(1)
                noisy = -0.5 * (x[i].flatten() - grid).square().sum(1) / sigma**2
                weights = (prior + noisy - 0.5 * (y[i].flatten() - grid[:, 0]) ** 2 / 0.09).softmax(0)
                torch.testing.assert_close(made[i], weights @ grid, atol=1e-7, rtol=0)


def test_the_denoiser_of_pure_noise_is_the_posterior_mean() -> None:
    model = observed(exact("mixture"), "blur:width=0.8")
    posterior = exact_posterior(model, "a test")
    y = observation(model)
    x = torch.zeros(1, *model.shape, dtype=torch.float64)
    far = posterior.predict(x, torch.tensor([1e7], dtype=torch.float64), y)
    torch.testing.assert_close(far.flatten(), posterior.moments(y[0]).mean, atol=1e-8, rtol=0)


@pytest.mark.parametrize("spec", ["inpaint:sigma=0.2", "super-resolution:factor=2,sigma=0"])
def test_draws_have_the_moments_of_the_posterior(spec: str) -> None:
    model = observed(exact("mixture", shape="1x4x4"), spec)
    posterior, y = exact_posterior(model, "a test"), observation(model)[0]
    n = 20_000
    moments, draws = posterior.moments(y), posterior.draws(y, n)
    deviation = moments.covariance.diagonal().clamp(min=0).sqrt()
    assert bool(((draws.mean(0) - moments.mean).abs() <= 5 * deviation / math.sqrt(n) + 1e-9).all())
    product = torch.outer(deviation, deviation)
    # The standard error of a covariance is at most √(kurtosis/n) of the product of the deviations.
    assert bool(((draws.T.cov() - moments.covariance).abs() <= 10 * product / math.sqrt(n) + 1e-9).all())
    if "sigma=0" in spec.split(",")[-1:]:
        again = model.observation.operator.forward(draws[:50].reshape(50, *model.shape))
        torch.testing.assert_close(again, y.expand_as(again), atol=1e-9, rtol=0)


# --- The methods where they are exact --------------------------------------------------------------------------------

ISOTROPIC = 0.09
"""The variance of every pixel of the isotropic Gaussian."""


def problem(kind: str) -> ExactModel:
    model = exact("gaussian")
    if kind == "isotropic":
        model.problem.variances.fill_(ISOTROPIC)
    return model


EXACT = [
    *(("mmps:iterations=80", "diagonal", spec) for spec in LINEAR),
    *(("tmpd", "diagonal", spec) for spec in ("inpaint:mask=half", "denoise:sigma=0.5", "inpaint:sigma=0")),
    *(("ddnm", "diagonal", spec) for spec in ("inpaint:mask=half,sigma=0", "inpaint:mask=random,sigma=0")),
    *(("ddnm", "isotropic", spec) for spec in ("super-resolution:factor=2,sigma=0", "blur:width=0.6,sigma=0")),
    ("diffpir", "diagonal", "inpaint:sigma=0"),
    *((f"pigdm:variance={ISOTROPIC}", "isotropic", spec) for spec in LINEAR),
]


QUICK = ("inpaint:mask=half", "denoise:sigma=0.5", "inpaint:mask=half,sigma=0", "blur:width=0.6,sigma=0")
"""The tasks of the README's command; CI tests the others besides."""


@pytest.mark.parametrize(
    ("method", "kind", "spec"),
    [pytest.param(*one, marks=[] if one[2] in QUICK else [pytest.mark.slow]) for one in EXACT],
)
def test_a_method_is_the_posterior_denoiser_where_its_assumption_holds(method: str, kind: str, spec: str) -> None:
    model = observed(problem(kind), spec)
    for sigma in (0.05, 0.5, 4.0, 100.0):
        x = states(model, sigma)
        exact_one = denoiser(model, None, 3, guidance("exact"))(x, sigma)
        # Conjugate gradients lose digits with the condition number.
        torch.testing.assert_close(denoiser(model, None, 3, guidance(method))(x, sigma), exact_one, atol=1e-8, rtol=0)


def test_diffpir_is_exact_for_a_flat_prior() -> None:
    """With λ = 1, x₀ given x has variance σ², as where the data is much wider than σ: the error falls as σ²/v."""
    model = observed(problem("isotropic"), "super-resolution:factor=2,sigma=0.01")
    errors = []
    for sigma in (0.01, 0.005):
        x = states(model, sigma)
        exact_one = denoiser(model, None, 3, guidance("exact"))(x, sigma)
        errors.append(float((denoiser(model, None, 3, guidance("diffpir:scale=1"))(x, sigma) - exact_one).abs().max()))
    assert errors[0] < 1e-3
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize(
    ("method", "spec"),
    [
        ("ddnm", "denoise:sigma=0.5"),
        ("pigdm", "blur:width=0.8"),
        ("tmpd", "blur:width=0.8"),
        ("mmps", "blur:width=0.8"),
    ],
)
def test_a_method_differs_where_its_assumption_does_not_hold(method: str, spec: str) -> None:
    model = observed(exact("gaussian"), spec)
    x = states(model, 1.0)
    made, exact_one = (denoiser(model, None, 3, guidance(g))(x, 1.0) for g in (method, "exact"))
    assert float((made - exact_one).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("method", "spec"),
    [
        ("exact", "compressed-sensing"),
        pytest.param("mmps:iterations=40", "compressed-sensing", marks=pytest.mark.slow),
        ("tmpd", "inpaint"),
        ("ddnm", "inpaint:sigma=0"),
        ("diffpir", "inpaint:sigma=0"),
        (f"pigdm:variance={ISOTROPIC}", "super-resolution:factor=2"),
    ],
)
def test_a_sampler_ends_at_the_posterior(method: str, spec: str) -> None:
    """The ODE of a Gaussian is affine: the mean of the start ends at the posterior mean, to 1e-3 of its deviation.

    So do 64 states whose covariance is that of the start. They end with the covariance of the posterior, except that
    the last step from the smallest level σ to 0 is E[x₀ | x], which leaves C (C + σ² I)⁻¹ C of it.
    """
    model = observed(problem("isotropic" if "pigdm" in method else "diagonal"), spec, 1)
    sampler = registry.parse("sampler", "dpm++:order=3")
    sigmas = make_grid(registry.parse("spacing", "karras"), model.levels, 100)
    moments = exact_posterior(model, "a test").moments(observation(model)[0])
    d, top = len(moments.mean), float(sigmas[0])
    # At noise level σ the posterior has the covariance C + σ² I = L Lᵀ.
    root = torch.linalg.cholesky(moments.covariance + top**2 * torch.eye(d, dtype=torch.float64))
    x = torch.cat([moments.mean[None], moments.mean + root.T]).reshape(d + 1, *model.shape)
    index = torch.arange(d + 1)
    bound = bind_guidance(guidance(method), model)
    batch = start_batch(model, bind(model, sampler, sigmas), sigmas, index, guidance=bound, x=x)
    final = batch.states().flatten(1)
    deviation = moments.covariance.diagonal().clamp(min=1e-12).sqrt()
    wide = deviation > 1e-4  # σ_y = 0 fixes pixels; the last level of the grid is not 0
    assert float(((final[0] - moments.mean).abs() / deviation)[wide].max()) < 1e-3
    map_ = (final[1:] - final[0]).T  # the affine map applied to the columns of L
    last = moments.covariance + float(sigmas[-2]) ** 2 * torch.eye(d, dtype=torch.float64)
    expected = moments.covariance @ torch.linalg.solve(last, moments.covariance)
    error = (map_ @ map_.T - expected).abs() / torch.outer(deviation, deviation).clamp(min=1e-8)
    assert float(error[wide][:, wide].max()) < 5e-3


# --- Costs and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "backward"),
    [
        ("exact", 0),
        ("ddnm", 0),
        ("diffpir", 0),
        ("pigdm", 1),
        ("dps", 1),
        ("tmpd", 2),
        ("mmps", 2),
        ("mmps:iterations=3", 4),
    ],
)
def test_evaluations_and_backward_passes_are_counted(method: str, backward: int) -> None:
    model = observed(exact("mixture"), "inpaint")
    x = states(model, 1.0)
    with Meter(model.network) as meter:
        denoiser(model, None, 3, guidance(method))(x, 1.0)
    assert (meter.network, meter.network_backward) == (3, 3 * backward)


def test_dps_moves_by_its_step_of_1000() -> None:
    """An ancestral DDPM step from level s to t has the coefficient 1 - t²/s² of D, which is β/σ² there to O(β)."""
    model = observed(exact("gaussian"), "inpaint")
    base = exact("gaussian")
    level, below = float(model.levels[500]), float(model.levels[499])
    x = states(model, level)
    moved = denoiser(model, None, 3, guidance("dps"))(x, level) - denoiser(base, None, 3)(x, level)
    leaf = x.clone().requires_grad_(True)
    residual = observation(model, 3) - model.observation.operator.forward(denoiser(base, None, 3)(leaf, level))
    (gradient,) = torch.autograd.grad(residual.flatten(1).norm(dim=1).sum(), leaf)
    # The paper's step of the variance-preserving states y = α x: y_t moves by -ζ ∂‖·‖/∂y_s.
    paper = -gradient / base.alpha(level) / base.alpha(below)
    torch.testing.assert_close((1 - below**2 / level**2) * moved, paper, rtol=0.02, atol=1e-6)


def test_a_method_without_a_task_is_refused() -> None:
    with pytest.raises(UserError, match=r"guidance dps requires a task, such as task=\"inpaint\"\."):
        bind_guidance(guidance("dps"), exact("gaussian"))


@pytest.mark.parametrize("method", ["exact", "ddnm", "diffpir", "pigdm", "tmpd", "mmps"])
def test_a_linear_method_refuses_a_task_that_is_not(method: str) -> None:
    with pytest.raises(UserError, match=f"guidance {method} requires a linear task, and clip is not linear."):
        bind_guidance(guidance(method), observed(exact("gaussian"), "clip"))


@pytest.mark.slow
def test_the_exact_posterior_is_refused_where_it_is_not_known() -> None:
    with pytest.raises(UserError, match="available for the problems gaussian and mixture, not for points"):
        bind_guidance(guidance("exact"), observed(exact("points"), "inpaint"))
    from support.interface_plugins import FlowGaussian, Observed

    flow = FlowGaussian().load(torch.device("cpu"), torch.float64)
    with pytest.raises(UserError, match="guidance exact requires a problem whose posterior is known: use the model"):
        bind_guidance(guidance("exact"), observed(flow, "inpaint"))
    with pytest.raises(UserError, match="this model defines its own observations"):
        Observed().load(torch.device("cpu"), torch.float64).observed(
            registry.parse("task", "inpaint"), torch.zeros(1, 1, 8, 8)
        )
