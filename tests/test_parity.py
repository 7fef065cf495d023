"""Our samplers against each other, and against diffusers' schedulers fed the same noise.

Coordinates: x = x_vp/√ᾱ. The prior √(1+σ²) z is thus z in diffusers' coordinates, a step's z is the same z in both,
and the image at σ = 0 needs no conversion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, run_images
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm
from torch import Tensor

from samplerbench.bench import setup
from samplerbench.models import Model
from samplerbench.sampling.noise import Noise, Purpose, normal
from samplerbench.sampling.process import VARIANCE_EXPLODING

N, STEPS, SEED = 12, 50, 3
TOLERANCE = 1e-3  # the issue's: diffusers keeps its tables in float32
EMBEDDED = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}

FeedNoise = Callable[[Model], Noise]


@pytest.fixture
def feed_noise(monkeypatch: pytest.MonkeyPatch) -> FeedNoise:
    """Makes diffusers draw its step noise from our stream, and returns the stream."""

    def feed(model: Model) -> Noise:
        noise = Noise(SEED, torch.arange(N), model.shape, torch.float32)
        for module in (scheduling_ddim, scheduling_ddpm):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise())
        return noise

    return feed


@torch.no_grad()
def diffusers_images(model: Model, scheduler: Any, labels: Tensor | None, **step_arguments: Any) -> Tensor:
    """What diffusers' own loop makes of our prior with the model's network."""
    scheduler.set_timesteps(STEPS)
    x = normal(SEED, Purpose.PRIOR, torch.arange(N), 0, model.shape).float()
    given = None if labels is None else labels[:N]
    for t in scheduler.timesteps:
        output = model.network(x, t, class_labels=given).sample
        x = scheduler.step(output, t, x, **step_arguments).prev_sample
    return x


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def test_the_prior_has_the_variance_of_the_forward_process(digits: Model) -> None:
    """x₀ + σ z of data with variance 1 is √(1+σ²) z: plain z in diffusers' coordinates. A VE model starts from σ z."""
    z = torch.randn(2, *digits.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(digits.prior(z, 0.75), 1.25 * z)
    exploding = dataclasses.replace(digits, process=VARIANCE_EXPLODING)
    torch.testing.assert_close(exploding.prior(z, 0.75), 0.75 * z)


# --- Against each other ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("spacing", ["leading", "trailing", "karras"])
@pytest.mark.parametrize(
    ("ours", "same"), [("ddim:eta=1", "ddpm"), ("ddim", "pf-ode:solver=euler")], ids=["ancestral", "ode"]
)
def test_two_names_of_one_method_agree_to_rounding(
    digits: Model, labels: Tensor, ours: str, same: str, spacing: str
) -> None:
    a, b = (run_images(digits, spec, spacing, 20, N, labels, seed=SEED) for spec in (ours, same))
    assert difference(a, b) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "same"), [("ddim:eta=1", "ddpm"), ("ddim", "pf-ode:solver=euler")], ids=["ancestral", "ode"]
)
def test_what_is_left_between_them_is_rounding(labels: Tensor, ours: str, same: str) -> None:
    exact = setup.load_model("digits", CPU, "fp64")
    a, b = (run_images(exact, spec, "leading", 20, N, labels, seed=SEED) for spec in (ours, same))
    assert difference(a, b) <= 1e-12


# --- Against diffusers, the embedded model --------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", pytest.param("trailing", marks=pytest.mark.slow)])
@pytest.mark.parametrize("eta", [0.0, pytest.param(0.5, marks=pytest.mark.slow), 1.0])
def test_ddim_equals_diffusers(digits: Model, labels: Tensor, feed_noise: FeedNoise, eta: float, spacing: str) -> None:
    feed_noise(digits)
    theirs = diffusers_images(digits, DDIMScheduler(**EMBEDDED, timestep_spacing=spacing), labels, eta=eta)
    ours = run_images(digits, f"ddim:eta={eta}", spacing, STEPS, N, labels, seed=SEED)
    assert difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize(
    ("variance", "spacing"),
    [
        ("small", "leading"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("small", "trailing"), ("large", "leading"))),
    ],
)
def test_ddpm_equals_diffusers(
    digits: Model, labels: Tensor, feed_noise: FeedNoise, variance: str, spacing: str
) -> None:
    feed_noise(digits)
    scheduler = DDPMScheduler(**EMBEDDED, timestep_spacing=spacing, variance_type=f"fixed_{variance}")
    theirs = diffusers_images(digits, scheduler, labels)
    ours = run_images(digits, f"ddpm:variance={variance}", spacing, STEPS, N, labels, seed=SEED)
    assert difference(ours, theirs) <= TOLERANCE


def test_diffusers_adds_noise_in_the_last_step_of_fixed_large_under_trailing(
    digits: Model, labels: Tensor, feed_noise: FeedNoise
) -> None:
    """The one departure. Algorithm 2 of Ho et al. 2020 ends without noise; diffusers asks for timestep > 0 instead.

    Under `trailing` the last timestep is 19, so √(1-ᾱ₁₉) z is left in its images. The small variance is 0 there.
    """
    noise = feed_noise(digits)
    scheduler = DDPMScheduler(**EMBEDDED, timestep_spacing="trailing", variance_type="fixed_large")
    theirs = diffusers_images(digits, scheduler, labels)
    assert noise.draws == STEPS
    z = normal(SEED, Purpose.STEP, torch.arange(N), STEPS - 1, digits.shape).float()
    left = (1 - scheduler.alphas_cumprod[scheduler.timesteps[-1]]).sqrt() * z

    ours = run_images(digits, "ddpm:variance=large", "trailing", STEPS, N, labels, seed=SEED)
    assert difference(ours, theirs - left) <= TOLERANCE
    assert difference(ours, theirs) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_clipped_samplers_equal_diffusers(digits: Model, labels: Tensor, feed_noise: FeedNoise, name: str) -> None:
    feed_noise(digits)
    clipped = dataclasses.replace(digits, clip=True)
    config = EMBEDDED | {"clip_sample": True, "timestep_spacing": "trailing"}
    if name == "ddpm":
        theirs = diffusers_images(digits, DDPMScheduler(**config), labels)
    else:
        # By default diffusers' DDIM clips x₀ but steps along the ε of the x₀ that it did not clip, so x₀ and ε no
        # longer make x. We clip D, and ε = (x - D)/σ follows; that is its use_clipped_model_output.
        theirs = diffusers_images(digits, DDIMScheduler(**config), labels, use_clipped_model_output=True)
    ours = run_images(clipped, name, "trailing", STEPS, N, labels, seed=SEED)
    assert difference(ours, theirs) <= TOLERANCE
    assert difference(ours, run_images(digits, name, "trailing", STEPS, N, labels, seed=SEED)) > 0.01


# --- Against diffusers, other kinds of checkpoint -------------------------------------------------------------------


def tiny_checkpoint(folder: Path, scheduler: Any, learned: bool = False) -> Model:
    """A random U-Net of a few channels, saved by diffusers and loaded by us."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=2 if learned else 1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    # The default initialisation answers nearly the same to everything; this one answers with about ±1.
    torch.nn.init.normal_(network.conv_out.weight, std=0.2)
    DDPMPipeline(unet=network, scheduler=scheduler).save_pretrained(folder)
    return setup.load_model(str(folder), CPU, "fp32")


def test_learned_variance_equals_diffusers(tmp_path: Path, feed_noise: FeedNoise) -> None:
    # Clipped, since the ε of an untrained network would let x₀ grow to hundreds.
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=True, timestep_spacing="leading")
    model = tiny_checkpoint(tmp_path, scheduler, learned=True)
    feed_noise(model)
    theirs = diffusers_images(model, scheduler, None)
    ours = run_images(model, "ddpm:variance=learned", "leading", STEPS, N, None, seed=SEED)
    assert difference(ours, theirs) <= TOLERANCE
    for other in ("small", "large"):
        fixed = run_images(model, f"ddpm:variance={other}", "leading", STEPS, N, None, seed=SEED)
        assert difference(ours, fixed) > 0.01


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_predictions_equal_diffusers(tmp_path: Path, prediction: str) -> None:
    config = {"prediction_type": prediction, "clip_sample": False, "timestep_spacing": "leading"}
    model = tiny_checkpoint(tmp_path, DDPMScheduler(**config))
    theirs = diffusers_images(model, DDIMScheduler(**config), None)
    ours = run_images(model, "ddim", "leading", STEPS, N, None, seed=SEED)
    assert difference(ours, theirs) <= TOLERANCE
    assert theirs.std() > 0.1
