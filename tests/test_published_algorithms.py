"""What is claimed of published algorithms, against the algorithms themselves, written again in their coordinates.

The corrector's α_i (Song et al. 2021, SDE), classifier guidance's algorithms 1 and 2 (Dhariwal & Nichol 2021), and
whether x₀ is clipped before it is guided or after.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from support.denoising import denoiser, labelled
from torch import Tensor

from samplerbench import registry
from samplerbench.models import LoadedClassifier, classifier_of
from samplerbench.models.exact import ExactModel, exact
from samplerbench.models.model import Bound
from samplerbench.sampling import ConditionalDenoiser, Guidance, ModelView, Noise, Prediction, Sigma, per_sample
from samplerbench.sampling.driver import drive
from samplerbench.sampling.guidance import bind_guidance
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.process import VARIANCE_EXPLODING

BATCH, SEED, SCALE = 8, 5, 2.0
INDEX, LABELS = torch.arange(BATCH), torch.arange(BATCH) % 2
BETAS = np.linspace(1e-4, 0.02, 1000)
BARS = np.cumprod(1 - BETAS)
"""ᾱ of the exact problems' schedule, from β, as the papers have it."""


@pytest.fixture(scope="module")
def model() -> ExactModel:
    return exact("mixture", shape="1x2x2")


def step_noise(model: ExactModel) -> Noise:
    return Noise(SEED, INDEX, model.shape, torch.float64)


def start(model: ExactModel) -> Tensor:
    """The papers' x_T ~ N(0, 1)."""
    return normal(SEED, Purpose.PRIOR, INDEX, 0, model.shape)


def ours(model: ExactModel, spec: str, steps: int, guidance: Guidance | None = None) -> Tensor:
    """Our final state on trailing timesteps."""
    grid = registry.parse("spacing", "trailing").grid(model.levels, steps)
    denoise = denoiser(model, None if guidance is None else LABELS, BATCH, guidance)
    sampler = registry.parse("sampler", spec)
    return drive(sampler, denoise, model.prior(start(model), float(grid[0])), grid, step_noise(model))


def timesteps(steps: int) -> list[int]:
    return [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]


def chain(steps: int) -> Iterator[tuple[int, float, float]]:
    """(timestep, ᾱ_t, ᾱ of the next one; 1 after the last)."""
    times = timesteps(steps)
    for t, following in itertools.zip_longest(times, times[1:]):
        yield t, float(BARS[t]), 1.0 if following is None else float(BARS[following])


def network(model: ExactModel, x: Tensor, bar: float, labels: Tensor | None = None) -> Tensor:
    """x₀ predicted from the variance-preserving state x."""
    return denoiser(model, labels, BATCH)(x / math.sqrt(bar), math.sqrt((1 - bar) / bar))


def gradient(model: ExactModel, x: Tensor, bar: float) -> Tensor:
    """∇ log p(y | x) with respect to the variance-preserving state."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        sigma = torch.full((BATCH,), math.sqrt((1 - bar) / bar), dtype=torch.float64)
        log_p = model.own_classifier().logits(leaf / math.sqrt(bar), sigma).log_softmax(1)[INDEX, LABELS].sum()
    return torch.autograd.grad(log_p, leaf)[0]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# --- The corrector --------------------------------------------------------------------------------------------------


def test_pc_is_algorithms_3_and_5_of_the_full_chain(model: ExactModel) -> None:
    """α_i is 1 - β_i, β_i of the schedule itself; the first steps of a thousand, of which each corrects at i."""
    noise, x = step_noise(model), start(model)
    grid = registry.parse("spacing", "trailing").grid(model.levels, 1000)
    sampler = registry.parse("sampler", "pc")
    run = sampler.steps(denoiser(model, None, BATCH), model.prior(x, float(grid[0])), grid, step_noise(model))
    for i, step in zip(range(998, 990, -1), run, strict=False):
        beta, bar = BETAS[i + 1], BARS[i + 1]
        score = -(x - math.sqrt(bar) * network(model, x, bar)) / (1 - bar)
        x = (2 - math.sqrt(1 - beta)) * x + beta * score + math.sqrt(beta) * noise()
        bar = BARS[i]
        score, z = -(x - math.sqrt(bar) * network(model, x, bar)) / (1 - bar), noise()
        r = z.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1)
        epsilon = (2 * (1 - BETAS[i]) * (0.16 * r) ** 2).reshape(-1, 1, 1, 1)
        x = x + epsilon * score + (2 * epsilon).sqrt() * z
        torch.testing.assert_close(step.x * math.sqrt(bar), x, rtol=0, atol=1e-10)


def test_pc_on_a_variance_exploding_model_is_algorithm_4_without_alpha(model: ExactModel) -> None:
    exploding = replace(model, process=VARIANCE_EXPLODING)
    levels = [50.0, 20.0, 6.0, 1.5, 0.3, 0.0]
    noise, x = step_noise(model), 50.0 * start(model)
    denoise = denoiser(model, None, BATCH)
    for s, t in itertools.pairwise(levels):
        variance, score = s**2 - t**2, (denoise(x, s) - x) / s**2
        x = x + variance * score + (math.sqrt(variance) * noise() if t else 0)
        if t:
            score, z = (denoise(x, t) - x) / t**2, noise()
            r = z.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1)
            epsilon = (2 * (0.16 * r) ** 2).reshape(-1, 1, 1, 1)
            x = x + epsilon * score + (2 * epsilon).sqrt() * z
    grid = torch.tensor(levels, dtype=torch.float64)
    found = drive(
        registry.parse("sampler", "pc"), denoiser(exploding, None, BATCH), 50.0 * start(model), grid, step_noise(model)
    )
    assert difference(found, x) <= 1e-11


# --- Algorithms 1 and 2 of classifier guidance ----------------------------------------------------------------------


def algorithm_1(model: ExactModel, steps: int, variance: str) -> Tensor:
    """x_{t-1} ~ N(μ + g Σ ∇ log p(y | x_t), Σ), Σ of Ho et al. 2020; the last step is μ's."""
    noise, x = step_noise(model), start(model)
    for _, bar, following in chain(steps):
        x0, beta = network(model, x, bar), 1 - bar / following
        mean = math.sqrt(following) * beta / (1 - bar) * x0 + math.sqrt(1 - beta) * (1 - following) / (1 - bar) * x
        v = beta * (1 - following) / (1 - bar) if variance == "small" else beta
        mean = mean + SCALE * v * gradient(model, x, bar)
        x = mean + math.sqrt(v) * noise() if following < 1 else mean
    return x


def algorithm_2(model: ExactModel, steps: int, limit: float = math.inf) -> Tensor:
    """ε̂ = ε - √(1-ᾱ) g ∇ log p, then DDIM. x₀ is clipped to ±limit first, as in guided-diffusion, which then takes
    the ε of the clipped x₀ and does not clip the guided one."""
    x = start(model)
    for _, bar, following in chain(steps):
        x0 = network(model, x, bar).clamp(-limit, limit)
        epsilon = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar) - math.sqrt(1 - bar) * SCALE * gradient(model, x, bar)
        x0 = (x - math.sqrt(1 - bar) * epsilon) / math.sqrt(bar)
        x = math.sqrt(following) * x0 + math.sqrt(1 - following) * epsilon
    return x


@dataclass(frozen=True)
class KnowsTheStep(Guidance):
    """D + g (α_t/α_s) v/(1 - t²/s²) ∇ log p, told the grid and the sampler's variance, which no guidance is."""

    needs_labels: ClassVar[bool] = True
    classifier: ClassVar[LoadedClassifier]
    grid: ClassVar[list[float]] = []
    variance: ClassVar[str] = "small"

    def bind(self, model: ModelView) -> KnowsTheStep:
        return self.with_state(classifier=classifier_of(model, ""))

    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        s = float(sigma)
        t = self.grid[self.grid.index(s) + 1]
        small, large = t**2 * (1 - t**2 / s**2), (1 + t**2) * (s**2 - t**2) / (1 + s**2)
        scale = math.sqrt((1 + s**2) / (1 + t**2))
        shift = scale * (small if self.variance == "small" else large) / (1 - t**2 / s**2)
        if self.variance == "large":
            assert shift == pytest.approx(s**2 / scale)  # as the docstring of `classifier` has it
        score = self.classifier.score(x, per_sample(sigma, x), denoise.inputs.labels)
        return Prediction(denoise.unconditional(x, sigma).x0 + SCALE * shift * score)


def classifier(**changes: Any) -> Guidance:
    return replace(registry.parse("guidance", "classifier"), scale=SCALE, **changes)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_algorithm_1_depends_on_the_step_and_the_reverse_variance(
    model: ExactModel, monkeypatch: pytest.MonkeyPatch, variance: str
) -> None:
    grid = registry.parse("spacing", "trailing").grid(model.levels, 7).tolist()
    monkeypatch.setattr(KnowsTheStep, "grid", grid)
    monkeypatch.setattr(KnowsTheStep, "variance", variance)
    found = ours(model, f"ddpm:variance={variance}", 7, KnowsTheStep())
    assert difference(found, algorithm_1(model, 7, variance)) <= 1e-10


def test_classifier_is_algorithm_2_and_not_algorithm_1(model: ExactModel) -> None:
    assert difference(ours(model, "ddim", 10, classifier()), algorithm_2(model, 10)) <= 1e-10
    apart = [difference(ours(model, "ddpm", n, classifier()), algorithm_1(model, n, "small")) for n in (5, 500)]
    assert apart[0] > 0.3
    assert apart[1] < apart[0] / 3


# --- Clipping and guiding -------------------------------------------------------------------------------------------

LIMIT = 0.4
"""Well inside the mixture's own range, so that clipping does something at every level."""


@pytest.fixture
def clipping(model: ExactModel) -> ExactModel:
    return replace(model, clip=True, clip_range=LIMIT)


def test_clip_before_is_guided_diffusions_order(clipping: ExactModel) -> None:
    expected = algorithm_2(replace(clipping, clip=False), 10, LIMIT)
    found = ours(clipping, "ddim", 10, classifier(clip="before"))
    assert difference(found, expected) <= 1e-10
    assert float(found.abs().max()) > LIMIT  # the guided x₀ is not clipped
    assert difference(found, ours(clipping, "ddim", 10, classifier())) > 0.05


@pytest.mark.parametrize("spec", ["classifier", "cfg"])
def test_clip_after_is_diffusers_order(clipping: ExactModel, spec: str) -> None:
    """The scheduler is given the guided ε, and clips."""
    plain, x = replace(clipping, clip=False), start(clipping)
    made = DDIMScheduler(trained_betas=BETAS, timestep_spacing="trailing", clip_sample=True, clip_sample_range=LIMIT)
    made.alphas_cumprod = torch.from_numpy(BARS)
    made.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    made.set_timesteps(10)
    assert made.timesteps.tolist() == timesteps(10)
    for t, bar, _ in chain(10):
        free = (x - math.sqrt(bar) * network(plain, x, bar)) / math.sqrt(1 - bar)
        if spec == "classifier":
            epsilon = free - math.sqrt(1 - bar) * SCALE * gradient(plain, x, bar)
        else:
            given = (x - math.sqrt(bar) * network(plain, x, bar, LABELS)) / math.sqrt(1 - bar)
            epsilon = free + SCALE * (given - free)
        x = made.step(epsilon, t, x, use_clipped_model_output=True).prev_sample
    found = ours(clipping, "ddim", 10, replace(registry.parse("guidance", spec), scale=SCALE))
    assert difference(found, x) <= 1e-10
    assert float(found.abs().max()) <= LIMIT


def score_of_the_image(denoise: Bound, x: Tensor) -> Tensor:
    """∇ₓ log p(y | D(x, 1.3)), without labels."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        x0 = denoise.unconditional(leaf, 1.3).x0
        log_p = denoise.model.own_image_classifier().logits(x0, per_sample(0.0, x)).log_softmax(1)[INDEX, LABELS].sum()
    return torch.autograd.grad(log_p, leaf)[0]


Parts = Callable[[Bound, Tensor], tuple[Tensor, Tensor]]
GUIDANCES: dict[str, Parts] = {
    "cfg": lambda d, x: ((both := d.both(x, 1.3))[0].x0.clamp(-LIMIT, LIMIT), both[1].x0.clamp(-LIMIT, LIMIT)),
    "classifier": lambda d, x: (
        d.unconditional(x, 1.3).x0.clamp(-LIMIT, LIMIT),
        d.model.own_classifier().score(x, per_sample(1.3, x), LABELS),
    ),
    "image-classifier": lambda d, x: (
        d.unconditional(x, 1.3).x0.clamp(-LIMIT, LIMIT),
        score_of_the_image(d, x),
    ),
}


@pytest.mark.parametrize("spec", GUIDANCES)
def test_every_guidance_has_the_choice_and_the_protocol_tells_it(clipping: ExactModel, spec: str) -> None:
    plain = Bound(replace(clipping, clip=False), labelled(LABELS))
    x = 1.6 * start(clipping)
    guidance = replace(registry.parse("guidance", spec), scale=SCALE)
    before = replace(guidance, clip="before")
    first, second = GUIDANCES[spec](plain, x)
    expected = first + SCALE * ((second - first) if spec == "cfg" else 1.3**2 * second)
    guided = denoiser(clipping, LABELS, BATCH, before)
    assert difference(guided(x, 1.3), expected) <= 1e-12
    assert difference(guided.rows(INDEX[2:5])(x[2:5], 1.3), expected[2:5]) <= 1e-12
    after = bind_guidance(guidance, plain.model).guide(plain)(x, 1.3).clamp(-LIMIT, LIMIT)
    assert difference(denoiser(clipping, LABELS, BATCH, guidance)(x, 1.3), after) == 0
    assert difference(after, expected) > 0.01
    assert guidance.spec == f"{spec}:scale={SCALE:g}" or guidance.spec == spec
    assert before.spec.endswith("clip=before")
    unclipped = replace(clipping, clip=False)
    first, second = (denoiser(unclipped, LABELS, BATCH, g)(x, 1.3) for g in (before, guidance))
    assert torch.equal(first, second)
