"""Guidance in an interval, with rescaling and with projection: closed forms, diffusers' functions, and the cost."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_images
from diffusers import UNet2DModel
from diffusers.guiders.adaptive_projected_guidance import AdaptiveProjectedGuidance, MomentumBuffer, normalized_guidance
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from support.denoising import denoiser
from torch import Tensor

import samplerbench
from samplerbench import registry
from samplerbench.errors import UserError
from samplerbench.models import Model
from samplerbench.models.exact import ExactModel, exact
from samplerbench.sampling import SIGMA_INFINITY, ConditionalDenoiser, Inputs, Noise
from samplerbench.sampling.driver import drive
from samplerbench.sampling.guidance import bind_guidance
from samplerbench.sampling.meter import Meter

LABELS = torch.tensor([0, 1, 0, 1, 1, 0])
SIGMAS = (20.0, 5.0, 2.0, 1.0, 0.5, 0.1)


@pytest.fixture(scope="module")
def model() -> ExactModel:
    return exact("mixture", shape="2x3x3", width=0.5)


@pytest.fixture(scope="module")
def states(model: ExactModel) -> list[Tensor]:
    """One state for each level of SIGMAS."""
    generator = torch.Generator().manual_seed(0)
    return [math.sqrt(1 + s**2) * torch.randn(6, *model.shape, generator=generator).double() for s in SIGMAS]


def parts(model: Model, x: Tensor, sigma: Any) -> tuple[Tensor, Tensor]:
    """(D_u, D_c)."""
    denoise = model.denoiser(Inputs(len(x), LABELS[: len(x)]))
    assert isinstance(denoise, ConditionalDenoiser)
    return denoise.unconditional(x, sigma).x0, denoise.conditional(x, sigma).x0


def guided(model: Model, spec: str, x: Tensor, sigma: Any) -> Tensor:
    return denoiser(model, LABELS[: len(x)], len(x), registry.parse("guidance", spec))(x, sigma)


def counted(model: Model, call: Callable[[], Any]) -> int:
    with Meter(model.network) as meter:
        call()
    return meter.network


# --- In an interval -------------------------------------------------------------------------------------------------


def test_the_interval_has_guidance_inside_and_the_conditional_model_outside(
    model: ExactModel, states: list[Tensor]
) -> None:
    """Both ends belong to it."""
    inside = {5.0, 2.0, 1.0, 0.5}
    for sigma, x in zip(SIGMAS, states, strict=True):
        free, given = parts(model, x, sigma)
        expected = free + 3 * (given - free) if sigma in inside else given
        result = guided(model, "interval:low=0.5,high=5,scale=3", x, sigma)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
        assert (sigma in inside) == (not torch.equal(result, given))


def test_without_an_upper_end_all_higher_levels_are_guided(model: ExactModel, states: list[Tensor]) -> None:
    for sigma, x in zip(SIGMAS, states, strict=True):
        plain = guided(model, "cfg:scale=3" if sigma >= 1 else "cfg:scale=1", x, sigma)
        assert torch.equal(guided(model, "interval:low=1,high=none,scale=3", x, sigma), plain)


def test_one_level_per_sample(model: ExactModel) -> None:
    """Each row has the prediction and the evaluations of its own level, also as a part of the batch."""
    sigma = torch.tensor([20.0, 4.0, 1.0, 0.1, 0.3, 2.0], dtype=torch.float64)
    x = torch.randn(6, *model.shape, generator=torch.Generator().manual_seed(1)).double()
    spec = "interval:low=0.2,high=3"
    denoise = denoiser(model, LABELS, 6, registry.parse("guidance", spec))
    alone = torch.cat([denoise.rows(torch.tensor([i]))(x[i : i + 1], float(sigma[i])) for i in range(6)])
    torch.testing.assert_close(denoise(x, sigma), alone, rtol=0, atol=1e-12)
    assert counted(model, lambda: denoise(x, sigma)) == 6 + 3  # three rows are inside
    part = torch.tensor([5, 0, 2])
    torch.testing.assert_close(denoise.rows(part)(x[part], sigma[part]), alone[part], rtol=0, atol=1e-12)


def test_evaluations_outside_are_saved(digits: Model, labels: Tensor) -> None:
    """Eight steps, of which the three at σ = 2, 1 and 0.5 are guided: 8 + 3 evaluations per image."""
    spacing = "list:levels=80;20;5;2;1;0.5;0.2;0.1"
    spec = "interval:low=0.5,high=2,scale=3"
    with Meter(digits.network) as meter:
        images = run_images(digits, "ddim", spacing, 8, 4, labels, guidance=spec)
    assert meter.network == (8 + 3) * 4
    assert not torch.equal(images, run_images(digits, "ddim", spacing, 8, 4, labels, guidance="cfg:scale=3"))


def test_a_classifier_in_an_interval(digits: Model, labels: Tensor) -> None:
    """The needs of the guidance, its networks and its identity are those of the interval."""
    spec = "interval/classifier:low=0.5,high=2,scale=3"
    guidance = bind_guidance(registry.parse("guidance", spec), digits)
    inner = bind_guidance(registry.parse("guidance", "classifier:scale=3"), digits)
    assert guidance is not None
    assert inner is not None
    assert (guidance.needs_labels, guidance.differentiates, guidance.classes) == (True, True, inner.classes)
    assert guidance.identity == inner.identity != {}
    x = torch.randn(2, *digits.shape, generator=torch.Generator().manual_seed(0))
    for sigma, same in ((1.0, "classifier:scale=3"), (5.0, "cfg:scale=1")):
        with torch.no_grad():
            results = [
                denoiser(digits, labels[:2], 2, registry.parse("guidance", s))(x * (1 + sigma), sigma)
                for s in (spec, same)
            ]
        assert torch.equal(*results)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("interval:low=2,high=1", "low = 2 is not below high = 1"),
        ("interval/interval:low=1", "it cannot contain itself"),
        ("interval/cgf", 'no guidance "cgf"'),
        ("interval:scale=-1", "scale=-1: it must be at least 0"),
    ],
)
def test_a_wrong_interval(spec: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        registry.parse("guidance", spec)


def test_the_spec_of_an_interval_is_read_again() -> None:
    spec = "interval/classifier:low=0.5,high=none,scale=3"
    guidance = registry.parse("guidance", spec)
    assert guidance.spec == spec
    assert registry.parse("guidance", guidance.spec) == guidance


# --- With rescaling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaling_is_that_of_diffusers(model: ExactModel, states: list[Tensor], prediction: str, phi: float) -> None:
    """diffusers rescales the output of the network: ε, v or x₀."""
    plain = model.denoiser(Inputs(6, LABELS))
    plain.prediction = prediction  # type: ignore[assignment]
    denoise = registry.parse("guidance", f"cfg-rescale:scale=4,phi={phi}").guide(plain)
    for sigma, x in zip(SIGMAS, states, strict=True):
        alpha, z = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)

        def output(x0: Tensor, x: Tensor = x, sigma: float = sigma, alpha: float = alpha, z: float = z) -> Tensor:
            eps = (x - x0) / sigma
            return {"epsilon": eps, "v_prediction": alpha * eps - z * x0, "sample": x0}[prediction]

        free, given = (output(part) for part in parts(model, x, sigma))
        theirs = rescale_noise_cfg(free + 4 * (given - free), given, phi)
        ours = output(denoise(x, sigma))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_flow_rescales_its_velocity(states: list[Tensor]) -> None:
    """v = (y - D)/t with y = (1-t) x."""
    model = exact("mixture", shape="2x3x3", process="flow")
    for sigma, x in zip(SIGMAS, states, strict=True):
        t = sigma / (1 + sigma)
        free, given = (((1 - t) * x - part) / t for part in parts(model, x, sigma))
        theirs = rescale_noise_cfg(free + 4 * (given - free), given, 0.7)
        ours = ((1 - t) * x - guided(model, "cfg-rescale:scale=4", x, sigma)) / t
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# --- With projection ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eta", "momentum", "threshold"), [(0.0, -0.5, 0.0), (0.3, -0.75, 0.4), (1.0, 0.0, 0.2), (0.0, 0.5, 1.0)]
)
def test_projection_is_that_of_diffusers_along_a_trajectory(
    model: ExactModel, states: list[Tensor], eta: float, momentum: float, threshold: float
) -> None:
    """The function of its guider in the paper's form, whose scale is g - 1, with its momentum over the levels."""
    spec = f"apg:scale=4,eta={eta},momentum={momentum},threshold={threshold}"
    denoise = denoiser(model, LABELS, 6, registry.parse("guidance", spec))
    buffer = MomentumBuffer(momentum)
    for sigma, x in zip(SIGMAS, states, strict=True):
        free, given = parts(model, x, sigma)
        theirs = normalized_guidance(given, free, 3.0, buffer, eta, threshold, use_original_formulation=True)
        torch.testing.assert_close(denoise(x, sigma), theirs, rtol=1e-9, atol=1e-9)


def test_diffusers_guider_in_its_default_form_has_one_projected_update_more(
    model: ExactModel, states: list[Tensor]
) -> None:
    """It adds g updates to D_u instead of g - 1 to D_c: D_c - D_u is not projected there. With η = 1 they agree."""
    free, given = parts(model, states[2], SIGMAS[2])
    for eta, same in ((1.0, True), (0.0, False)):
        guider = AdaptiveProjectedGuidance(4.0, None, 0.0, eta=eta)
        theirs = guider.forward(given, free).pred
        ours = guided(model, f"apg:scale=4,momentum=0,eta={eta}", states[2], SIGMAS[2])
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9) == same


def test_without_projection_it_is_classifier_free_guidance(model: ExactModel, states: list[Tensor]) -> None:
    for sigma, x in zip(SIGMAS, states, strict=True):
        ours = guided(model, "apg:scale=4,eta=1,momentum=0", x, sigma)
        torch.testing.assert_close(ours, guided(model, "cfg:scale=4", x, sigma), rtol=0, atol=1e-12)


def test_the_update_is_orthogonal_to_the_conditional_prediction(model: ExactModel, states: list[Tensor]) -> None:
    for sigma, x in zip(SIGMAS, states, strict=True):
        _, given = parts(model, x, sigma)
        update = guided(model, "apg:scale=4,momentum=0,threshold=0.5", x, sigma) - given
        assert (update * given).flatten(1).sum(1).abs().max() <= 1e-9
        assert update.flatten(1).norm(dim=1).max() <= 3 * 0.5 + 1e-9


def test_the_momentum_belongs_to_a_trajectory(model: ExactModel, states: list[Tensor]) -> None:
    """A second batch, and a solution that returns to a higher level, start without momentum."""
    guidance = registry.parse("guidance", "apg")
    one, two = (denoiser(model, LABELS, 6, guidance) for _ in range(2))
    first = one(states[0], SIGMAS[0])
    second = one(states[1], SIGMAS[1])
    assert torch.equal(two(states[0], SIGMAS[0]), first)
    assert not torch.equal(guided(model, "apg", states[1], SIGMAS[1]), second)  # it has no momentum yet
    assert torch.equal(one(states[0], SIGMAS[0]), first)  # σ increased
    assert torch.equal(one(states[1], SIGMAS[1]), second)


def test_the_momentum_of_each_row_is_its_own(model: ExactModel, states: list[Tensor]) -> None:
    """Rows that are evaluated apart, in another order and at other levels have the same predictions."""
    guidance = registry.parse("guidance", "apg")
    whole, other = (denoiser(model, LABELS, 6, guidance) for _ in range(2))
    expected = [whole(x, sigma) for sigma, x in zip(SIGMAS, states, strict=True)]
    for rows in (torch.tensor([4, 1, 0]), torch.tensor([2, 5, 3])):
        part = other.rows(rows)
        for sigma, x, wanted in zip(SIGMAS, states, expected, strict=True):
            torch.testing.assert_close(part(x[rows], sigma), wanted[rows], rtol=0, atol=1e-12)


def test_with_momentum_images_do_not_depend_on_the_batches(digits: Model, labels: Tensor) -> None:
    whole, split = (run_images(digits, "heun", None, 3, 4, labels, guidance="apg", batch_size=size) for size in (4, 3))
    torch.testing.assert_close(whole, split, rtol=0, atol=1e-5)


# --- CFG++ ----------------------------------------------------------------------------------------------------------

LEVELS = torch.tensor([20.0, 7.0, 2.5, 1.0, 0.4, 0.1, 0.0], dtype=torch.float64)


def sampled(model: Model, sampler: str, guidance: str, levels: Tensor = LEVELS) -> Tensor:
    x = levels[0] * torch.randn(6, *model.shape, generator=torch.Generator().manual_seed(2)).double()
    noise = Noise(5, torch.arange(6), model.shape, torch.float64)
    denoise = denoiser(model, LABELS, 6, registry.parse("guidance", guidance))
    return drive(registry.parse("sampler", sampler), denoise, x, levels, noise)


def test_cfg_pp_is_ddim_with_a_scale_for_each_step(model: ExactModel) -> None:
    """x' = D_λ + (σ'/σ)(x - D_u) is a step of DDIM with g = λ σ/(σ-σ') (Chung et al. 2024, section 3.3)."""
    scale = 0.6
    x = LEVELS[0] * torch.randn(6, *model.shape, generator=torch.Generator().manual_seed(2)).double()
    for s, t in pairwise(LEVELS.tolist()):
        free, given = parts(model, x, s)
        guided_x0 = free + scale * s / (s - t) * (given - free)
        x = guided_x0 + t / s * (x - guided_x0)
    result = sampled(model, "ddim:cfg_pp=true", f"cfg:scale={scale}")
    torch.testing.assert_close(result, x, rtol=0, atol=1e-10)
    assert (result - sampled(model, "ddim", f"cfg:scale={scale}")).abs().max() > 1e-2


def test_ancestral_cfg_pp_is_that_of_comfyui(model: ExactModel) -> None:
    """x' = D + σ_down (x - D_u)/σ + σ_up z."""
    x = LEVELS[0] * torch.randn(6, *model.shape, generator=torch.Generator().manual_seed(2)).double()
    noise = Noise(5, torch.arange(6), model.shape, torch.float64)
    for s, t in pairwise(LEVELS.tolist()):
        free, given = parts(model, x, s)
        up = t * math.sqrt(1 - t**2 / s**2)
        x = free + 0.6 * (given - free) + math.sqrt(t**2 - up**2) * (x - free) / s
        x = x + up * noise() if t > 0 else x
    result = sampled(model, "ddim:eta=1,cfg_pp=true", "cfg:scale=0.6")
    torch.testing.assert_close(result, x, rtol=0, atol=1e-10)


def test_cfg_pp_from_infinity(states: list[Tensor]) -> None:
    """The first step from t = 1 of a flow is D + σ' z, as for every guidance."""
    flow = exact("mixture", shape="2x3x3", process="flow")
    levels = torch.tensor([SIGMA_INFINITY, 2.0], dtype=torch.float64)
    x = SIGMA_INFINITY * torch.randn(6, *flow.shape, generator=torch.Generator().manual_seed(2)).double()
    free, given = parts(flow, x, SIGMA_INFINITY)
    expected = free + 0.6 * (given - free) + 2.0 * x / SIGMA_INFINITY
    torch.testing.assert_close(sampled(flow, "ddim:cfg_pp=true", "cfg:scale=0.6", levels), expected)


@pytest.mark.parametrize("guidance", ["cfg:scale=1", "classifier"])
def test_cfg_pp_requires_the_unconditional_prediction(model: ExactModel, guidance: str) -> None:
    with pytest.raises(UserError, match="cfg_pp=true requires"):
        sampled(model, "ddim:cfg_pp=true", guidance)


# --- By a second model ----------------------------------------------------------------------------------------------

WEAK = "problem=mixture,shape=2x3x3,width=0.9"


def test_autoguidance_extrapolates_from_the_second_model(model: ExactModel, states: list[Tensor]) -> None:
    weak = exact("mixture", shape="2x3x3", width=0.9)
    for sigma, x in zip(SIGMAS, states, strict=True):
        good, bad = (parts(m, x, sigma)[1] for m in (model, weak))
        result = guided(model, f"autoguidance/exact:scale=2.5,{WEAK}", x, sigma)
        torch.testing.assert_close(result, bad + 2.5 * (good - bad), rtol=0, atol=1e-12)
        assert torch.equal(guided(model, f"autoguidance/exact:scale=1,{WEAK}", x, sigma), good)


def test_a_second_checkpoint_is_loaded_counted_and_identified(digits: Model, labels: Tensor, tmp_path: Path) -> None:
    """A folder with other weights: D₂ is its own prediction, and its hash is part of the protocol."""
    folder = tmp_path / "weak"
    shutil.copytree(Path(samplerbench.__file__).parent / "assets/digits", folder)
    network = UNet2DModel.from_pretrained(folder / "unet")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    network.save_pretrained(folder / "unet")
    weak = samplerbench.load_model(str(folder), device="cpu")

    guidance = bind_guidance(registry.parse("guidance", f"autoguidance:model={folder},scale=1.5"), digits)
    assert guidance is not None
    assert guidance.identity["second model's weights"] == weak.identity["weights"] != digits.identity["weights"]
    x = torch.randn(2, *digits.shape, generator=generator)
    inputs = Inputs(2, labels[:2])
    with torch.no_grad(), Meter(digits.network, guidance.networks) as meter:
        result = digits.denoiser(inputs, guidance)(x, 1.0)
    assert (meter.network, meter.classifier_forward) == (2, 2)
    with torch.no_grad():
        good, bad = digits.denoiser(inputs)(x, 1.0), weak.denoiser(inputs)(x, 1.0)
    assert (good - bad).abs().max() > 1e-2
    torch.testing.assert_close(result, bad + 1.5 * (good - bad), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("autoguidance", "requires a second model"),
        ("autoguidance/exact:problem=mixture,shape=1x2x2", r"has the state \(1, 2, 2\), but the model has \(2, 3, 3\)"),
        ("autoguidance/exact:problem=mixture,shape=2x3x3,process=flow", "has the forward process rectified flow"),
        ("autoguidance/exact:problem=gaussian,shape=2x3x3", "has the number of classes"),
        ("autoguidance:model=no-such-folder/here", "no-such-folder"),
    ],
)
def test_a_wrong_second_model(model: ExactModel, spec: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        bind_guidance(registry.parse("guidance", spec), model)
