"""Guidance: what it computes, what it costs, and that it composes with every sampler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import run_images
from support.denoising import denoiser, labelled
from support.samplers import own_samplers
from torch import Tensor, nn

from samplerbench import registry
from samplerbench.models import LoadedClassifier, Model
from samplerbench.models.exact import exact
from samplerbench.sampling import ConditionalDenoiser, Prediction, Sigma, per_sample
from samplerbench.sampling.guidance import bind_guidance
from samplerbench.sampling.meter import Meter
from samplerbench.sampling.process import VARIANCE_PRESERVING

SAMPLERS = own_samplers(needs_task=False)
NEW_SAMPLERS = ("er-sde", "res", "restart", "sa-solver")
GUIDANCES = ("cfg", "cfg-norm", "classifier")
NEW_GUIDANCES = ("apg", "cfg-rescale", "interval:low=0.01,high=20")
"""What needs a folder of weights has tests of its own."""
QUICK = {
    *((s, g) for s in SAMPLERS if s not in NEW_SAMPLERS for g in GUIDANCES),
    *((s, "cfg") for s in NEW_SAMPLERS),
    *(("ddim", g) for g in NEW_GUIDANCES),
}
"""The pairs of the README's command. CI tests all of them."""
PAIRS = [(s, g) for s in (*SAMPLERS, "pf-ode:solver=rk45") for g in (*GUIDANCES, *NEW_GUIDANCES)]
METHODS = ["exact", "dps", "mmps"]
"""Methods of inverse problems: without a gradient, with one, and with several."""
LEVEL = 1.3


@pytest.fixture
def noisy(digits: Model) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return math.sqrt(1 + LEVEL**2) * torch.randn(4, *digits.shape, generator=generator)


def guided(model: Model, spec: str, labels: Tensor | None, x: Tensor) -> Tensor:
    """D of the guided model at one level."""
    with torch.no_grad():
        return denoiser(model, labels, len(x), registry.parse("guidance", spec))(x, LEVEL)


# --- Classifier-free ------------------------------------------------------------------------------------------------


def test_cfg_at_scale_1_is_the_conditional_model(digits: Model, labels: Tensor, noisy: Tensor) -> None:
    with torch.no_grad():
        conditional = denoiser(digits, labels[:4], 4)(noisy, LEVEL)
    assert torch.equal(guided(digits, "cfg:scale=1", labels[:4], noisy), conditional)


def test_cfg_at_scale_0_is_the_model_without_labels(digits: Model, labels: Tensor, noisy: Tensor) -> None:
    with torch.no_grad():
        unconditional = denoiser(digits, None, 4)(noisy, LEVEL)
        conditional = denoiser(digits, labels[:4], 4)(noisy, LEVEL)
    assert torch.equal(guided(digits, "cfg:scale=0", labels[:4], noisy), unconditional)
    assert (unconditional - conditional).abs().max() > 0.05


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_cfg_is_linear_in_its_scale(digits: Model, labels: Tensor, noisy: Tensor, scale: float) -> None:
    free, given = (guided(digits, f"cfg:scale={g}", labels[:4], noisy) for g in (0, 1))
    found = guided(digits, f"cfg:scale={scale}", labels[:4], noisy)
    torch.testing.assert_close(found, free + scale * (given - free), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("scale", "cost"), [(0, 1), (1, 1), (0.5, 2), (2, 2)])
def test_cfg_costs_two_evaluations_where_it_needs_both(
    digits: Model, labels: Tensor, noisy: Tensor, scale: float, cost: int
) -> None:
    with Meter(digits.network) as meter:
        guided(digits, f"cfg:scale={scale}", labels[:4], noisy)
    assert meter.network == cost * len(noisy)


# --- By a classifier ------------------------------------------------------------------------------------------------


def classifier(model: Model) -> LoadedClassifier:
    """The one that comes with the model."""
    found = model.own_classifier()
    assert found is not None
    return found


class TwoGaussians(ConditionalDenoiser):
    """Class k is N(μ_k, s²) with the prior weight w_k. D, the conditional D and the label's posterior are all exact."""

    MEANS, WEIGHTS, DEVIATION = torch.tensor([-0.8, 0.5]).double(), torch.tensor([0.3, 0.7]).double(), 0.4

    def __init__(self, labels: Tensor) -> None:
        self.labels, self.inputs = labels, labelled(labels)
        self.levels, self.process = torch.logspace(-2, 2, 50).double(), VARIANCE_PRESERVING

    def _log_joint(self, x: Tensor, sigma: Sigma) -> Tensor:
        """log w_k N(x; μ_k, s²+σ²) up to a constant, (B, 2)."""
        variance = self.DEVIATION**2 + per_sample(sigma, x)[:, None] ** 2
        return self.WEIGHTS.log() - (x.flatten(1) - self.MEANS) ** 2 / (2 * variance)

    def _means(self, x: Tensor, sigma: Sigma) -> Tensor:
        """E[x₀ | x, k], (B, 2)."""
        share = self.DEVIATION**2 / (self.DEVIATION**2 + per_sample(sigma, x)[:, None] ** 2)
        return self.MEANS + share * (x.flatten(1) - self.MEANS)

    def conditional(self, x: Tensor, sigma: Sigma) -> Prediction:
        return Prediction(self._means(x, sigma).gather(1, self.labels[:, None]).reshape(x.shape))

    def unconditional(self, x: Tensor, sigma: Sigma) -> Prediction:
        posterior = self._log_joint(x, sigma).softmax(1)
        return Prediction((posterior * self._means(x, sigma)).sum(1).reshape(x.shape))

    predict = conditional

    def both(self, x: Tensor, sigma: Sigma) -> tuple[Prediction, Prediction]:
        return self.unconditional(x, sigma), self.conditional(x, sigma)

    def pullback(self, x: Tensor, sigma: Sigma, *, conditional: bool = True) -> Any:
        raise NotImplementedError

    @property
    def classifier(self) -> LoadedClassifier:
        """The label's exact posterior as a classifier."""
        return LoadedClassifier(nn.Identity(), "", self._log_joint, 2)

    def rows(self, index: Tensor) -> ConditionalDenoiser:
        return TwoGaussians(self.labels[index])


@pytest.mark.parametrize("alone", [False, True], ids=["one-level", "level-per-sample"])
def test_an_exact_classifier_on_the_unconditional_model_gives_the_conditional_model(alone: bool) -> None:
    """Bayes' rule: ∇ log p(x | y) = ∇ log p(x) + ∇ log p(y | x)."""
    n = 64
    problem = TwoGaussians(torch.arange(n) % 2)
    x = 1.5 * torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    sigma: Sigma = torch.linspace(0.1, 4, n).double() if alone else 0.7
    guidance = registry.parse("guidance", "classifier").with_state(classifier=problem.classifier)
    found = guidance.predict(problem, x, sigma).x0
    torch.testing.assert_close(found, problem.conditional(x, sigma).x0, rtol=0, atol=1e-12)
    assert (found - problem.unconditional(x, sigma).x0).abs().max() > 0.1


def test_the_classifier_adds_scale_times_its_score(digits: Model, labels: Tensor, noisy: Tensor) -> None:
    free, once, thrice = (guided(digits, f"classifier:scale={g}", labels[:4], noisy) for g in (0, 1, 3))
    torch.testing.assert_close(thrice - free, 3 * (once - free), rtol=0, atol=1e-5)
    score = classifier(digits).score(noisy, per_sample(LEVEL, noisy), labels[:4])
    torch.testing.assert_close(once - free, LEVEL**2 * score, rtol=0, atol=1e-5)


def test_the_score_is_the_gradient_of_the_log_probability(digits: Model, labels: Tensor, noisy: Tensor) -> None:
    """Against central differences, along the score itself."""
    loaded, given = classifier(digits), labels[:4]
    score = loaded.score(noisy, per_sample(LEVEL, noisy), given)
    along = score / score.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)

    def log_p(x: Tensor) -> Tensor:
        logits = loaded.logits(x, torch.full((len(x),), LEVEL).double())
        return logits.double().log_softmax(1)[torch.arange(len(x)), given]

    h = 1e-2
    slope = (log_p(noisy + h * along) - log_p(noisy - h * along)) / (2 * h)
    torch.testing.assert_close(slope, score.flatten(1).norm(dim=1).double(), rtol=1e-2, atol=1e-4)


def test_both_passes_of_the_classifier_are_counted(digits: Model, labels: Tensor, noisy: Tensor) -> None:
    guidance = bind_guidance(registry.parse("guidance", "classifier"), digits)
    assert guidance is not None
    with Meter(digits.network, guidance.networks) as meter, torch.no_grad():
        denoiser(digits, labels[:4], 4, guidance)(noisy, LEVEL)
    assert (meter.network, meter.classifier_forward, meter.classifier_backward) == (4, 4, 4)


def test_the_classifier_can_guide_the_conditional_prediction(digits: Model, labels: Tensor, noisy: Tensor) -> None:
    free, added = (guided(digits, spec, labels[:4], noisy) for spec in ("classifier:scale=0", "classifier"))
    with torch.no_grad():
        conditional = denoiser(digits, labels[:4], 4)(noisy, LEVEL)
    found = guided(digits, "classifier:conditional=true", labels[:4], noisy)
    torch.testing.assert_close(found, conditional + (added - free), rtol=0, atol=1e-5)


# --- With every sampler ---------------------------------------------------------------------------------------------


def test_every_guidance_is_in_a_pair() -> None:
    entries = [e for e in registry.entries("guidance") if not registry.get("guidance", e.name).needs_task]
    registered = {entry.name for entry in entries}
    assert registered - {registry.split(g)[0] for _, g in PAIRS} == {"autoguidance", "image-classifier"}


@pytest.mark.parametrize(
    ("sampler", "guidance"),
    [pytest.param(*pair, marks=[] if pair in QUICK else [pytest.mark.slow]) for pair in PAIRS],
)
def test_every_guidance_works_with_every_sampler(digits: Model, labels: Tensor, sampler: str, guidance: str) -> None:
    images = run_images(digits, sampler, None, 3, 4, labels, guidance=guidance)
    assert images.shape == (4, *digits.shape)
    assert images.isfinite().all()
    unguided = run_images(digits, sampler, None, 3, 4, labels)
    assert not torch.equal(images, unguided)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampler", [*SAMPLERS, *own_samplers(needs_task=True)])
def test_every_method_of_inverse_problems_works_with_every_sampler(sampler: str, method: str) -> None:
    model = exact("mixture")
    observed = model.observed(registry.parse("task", "denoise:sigma=0.5"), model.real(4)[0])
    images = run_images(observed, sampler, None, 3, 4, None, guidance=method)
    assert images.shape == (4, *model.shape)
    assert images.isfinite().all()
    free = observed if registry.get("sampler", sampler).needs_task else model
    unguided = run_images(free, sampler, None, 3, 4, None)
    assert not torch.equal(images, unguided)
