"""Latent diffusion from training to samples: the autoencoder's objective, its scale, and its prior as a baseline."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, make_cell, run_images
from diffusers import AutoencoderKL, LDMPipeline
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from samplerbench import cli, registry
from samplerbench.bench import engine, prepare, request, setup
from samplerbench.data import ImageSet, load_data
from samplerbench.data.pixels import dequantise
from samplerbench.errors import UserError
from samplerbench.models import Model
from samplerbench.sampling import Inputs, Noise
from samplerbench.sampling.generator import bind_generator
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.training import loop
from samplerbench.training.autoencoder import (
    AutoencoderSettings,
    AutoencoderTask,
    Autoencoding,
    divergences,
    sample_deviation,
)
from samplerbench.training.latent import LatentUNetTask
from samplerbench.training.loop import StepRandom, TrainSettings, fit
from samplerbench.training.unet import UNetSettings, UNetTask

SMALL = AutoencoderSettings(channels=(8, 8), groups=4, latent_channels=2)
NETWORK = UNetSettings(channels=(8, 8), groups=4, head_dim=4, attention=())
SHORT = TrainSettings(steps=8, batch_size=16, warmup=2, checkpoint_every=3, ema_decay=0.9, lr=2e-3, cpu=True)


@pytest.fixture(scope="module")
def data() -> ImageSet:
    return load_data("digits")


@pytest.fixture(scope="module")
def autoencoder(data: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the digits: 2x4x4 latents."""
    out = tmp_path_factory.mktemp("autoencoder")
    torch.manual_seed(0)
    fit(AutoencoderTask(data, SMALL), data, SHORT, out)
    return out


@pytest.fixture(scope="module")
def latent_model(data: ImageSet, autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latent")
    torch.manual_seed(0)
    fit(LatentUNetTask(data, NETWORK, str(autoencoder)), data, replace(SHORT, sample_every=8), out)
    return out


def card(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "samplerbench.json").read_text("utf-8"))


def randomness(batch: int) -> StepRandom:
    return StepRandom(0, 0, slice(0, batch), batch, CPU)


# --- The autoencoder ------------------------------------------------------------------------------------------------


class Scripted(nn.Module):
    """Stands in for the autoencoder's pass: answers with these."""

    def __init__(self, decoded: Tensor, mean: Tensor, log_variance: Tensor) -> None:
        super().__init__()
        self.answer = (decoded, mean, log_variance)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.answer


def test_the_loss_is_the_evidence_lower_bound_of_a_gaussian_decoder(data: ImageSet) -> None:
    """With kl = 2s²: (2s²/d)·(-log N(x; x̂, s²) + KL) up to the constant s² log 2πs²."""
    s, batch = 0.2, 6
    images, decoded = dequantise(data.images[:batch]), torch.randn(batch, 1, 8, 8) / 3
    mean, log_variance = torch.randn(2, batch, 2, 4, 4)
    task = AutoencoderTask(data, replace(SMALL, kl=2 * s**2))
    loss = task.loss(Scripted(decoded, mean, log_variance), images, None, randomness(batch))
    posterior = Independent(Normal(mean, (log_variance / 2).exp()), 3)
    prior = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 3)
    likelihood = Independent(Normal(decoded, s), 3).log_prob(images)
    bound = (likelihood - kl_divergence(posterior, prior)).mean()
    expected = -2 * s**2 / 64 * bound - s**2 * math.log(2 * math.pi * s**2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert task.parts()["KL"].item() == pytest.approx(kl_divergence(posterior, prior).mean().item(), rel=1e-5)


def test_l1_is_the_mean_absolute_error(data: ImageSet) -> None:
    images, decoded, nothing = dequantise(data.images[:4]), torch.randn(4, 1, 8, 8), torch.zeros(4, 2, 4, 4)
    task = AutoencoderTask(data, replace(SMALL, error="l1"))  # N(0, 1) is the prior itself: no divergence
    loss = task.loss(Scripted(decoded, nothing, nothing), images, None, randomness(4))
    assert loss.item() == pytest.approx((decoded - images).abs().mean().item(), rel=1e-6)


def test_the_divergence_of_each_image_is_torchs() -> None:
    mean, log_variance = torch.randn(2, 5, 2, 3, 3)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(divergences(mean, log_variance), expected)


def test_the_deviation_is_that_of_the_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = 2 * torch.randn(1000, 2, generator=generator).double() + 1
    variance = torch.rand(1000, 2, generator=generator).double()
    samples = mean + variance.sqrt() * torch.randn(500, 1000, 2, generator=generator).double()
    assert sample_deviation(mean, variance) == pytest.approx(samples.std().item(), rel=3e-3)


def test_one_pass_samples_the_posterior_with_the_noise_it_is_given(autoencoder: Path, data: ImageSet) -> None:
    network = AutoencoderKL.from_pretrained(autoencoder)
    images, noise = dequantise(data.images[:3]), torch.randn(3, 2, 4, 4)
    with torch.no_grad():
        decoded, mean, log_variance = Autoencoding(network)(images, noise)
        posterior = network.encode(images).latent_dist
        expected = network.decode(posterior.mean + torch.exp(posterior.logvar / 2) * noise).sample
    torch.testing.assert_close(decoded, expected)
    assert torch.equal(mean, posterior.mean)
    assert torch.equal(log_variance, posterior.logvar)


def test_the_folder_is_a_diffusers_autoencoder_whose_scaled_latents_have_variance_one(
    autoencoder: Path, data: ImageSet
) -> None:
    network, found = AutoencoderKL.from_pretrained(autoencoder, use_safetensors=True), card(autoencoder)
    images = dequantise(data.images)
    with torch.no_grad():
        posterior = network.encode(images).latent_dist
        latents = posterior.sample(torch.Generator().manual_seed(1)) * network.config.scaling_factor
        error = (network.decode(posterior.mode()).sample - images).square().mean().item()
        divergence = posterior.kl().mean().item()
    assert latents.std().item() == pytest.approx(1, rel=0.02)
    assert found["scaling_factor"] == network.config.scaling_factor
    assert found["reconstruction_mse"] == pytest.approx(error, rel=1e-4)
    assert found["kl_nats_per_image"] == pytest.approx(divergence, rel=1e-4)
    assert (found["what"], found["latent_shape"], found["data"]["name"]) == ("autoencoder", [2, 4, 4], "digits")


def test_a_run_that_was_stopped_and_resumed_is_the_uninterrupted_run(
    autoencoder: Path, data: ImageSet, tmp_path: Path
) -> None:
    class Stopped(AutoencoderTask):
        left = 6

        def loss(self, network: nn.Module, images: Tensor, labels: Tensor | None, random: StepRandom) -> Tensor:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return super().loss(network, images, labels, random)

    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        fit(Stopped(data, SMALL), data, SHORT, tmp_path)
    torch.manual_seed(99)
    assert fit(AutoencoderTask(data, SMALL), data, SHORT, tmp_path).resumed
    weights = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (autoencoder / weights).read_bytes()
    with pytest.raises(UserError, match=r"was made with kl 0\.001; use the same settings"):
        fit(AutoencoderTask(data, replace(SMALL, kl=0.1)), data, SHORT, tmp_path)


def test_the_log_says_what_the_loss_is_made_of(
    data: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(AutoencoderTask(data, SMALL), data, replace(SHORT, steps=1, sample_every=1), tmp_path)
    line = capsys.readouterr().out
    assert "training autoencoder: step 1/1  loss " in line
    assert "  l2 " in line
    assert "  KL " in line
    # Five rows of ten images, each above its reconstructions.
    width, height = Image.open(tmp_path / "samples" / "step-000001.png").size
    assert width == height


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"channels": (8, 10)}, "channels=(8, 10): give multiples of groups=4"),
        ({"channels": (8,) * 5}, "an autoencoder of 5 resolutions needs sides that are multiples of 16"),
    ],
)
def test_an_autoencoder_that_cannot_be_built_is_refused(data: ImageSet, change: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        AutoencoderTask(data, replace(SMALL, **change))
    assert line in str(caught.value)


# --- The U-Net on its latents ---------------------------------------------------------------------------------------


def test_the_network_learns_fresh_scaled_samples_of_the_posterior(
    data: ImageSet, autoencoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def record(self: UNetTask, network: nn.Module, images: Tensor, *_: Any) -> Tensor:
        seen.append(images)
        return images.mean()

    monkeypatch.setattr(UNetTask, "loss", record)
    task, batch = LatentUNetTask(data, NETWORK, str(autoencoder)), 4000
    network = AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        posterior = network.encode(dequantise(data.images[7:8])).latent_dist
    moments = task.inputs(data, torch.full((batch,), 7), CPU)
    task.loss(task.network, moments, None, randomness(batch))
    (latents,) = seen
    scale = network.config.scaling_factor
    standard = (latents - scale * posterior.mean) / (scale * posterior.std)
    # 32 means of 4,000 standard normal numbers, and their variances: within five standard errors.
    assert standard.mean(0).abs().max() < 5 / math.sqrt(batch)
    assert (standard.var(0) - 1).abs().max() < 5 * math.sqrt(2 / batch)


def test_the_folder_is_an_ldm_pipeline_and_a_model(latent_model: Path, autoencoder: Path, data: ImageSet) -> None:
    pipeline = LDMPipeline.from_pretrained(latent_model)
    index = json.loads((latent_model / "model_index.json").read_text("utf-8"))
    assert (index["_class_name"], index["vqvae"]) == ("LDMPipeline", ["diffusers", "AutoencoderKL"])
    assert (pipeline.unet.config.num_class_embeds, pipeline.scheduler.config.clip_sample) == (11, False)
    assert pipeline.vqvae.config.scaling_factor == card(autoencoder)["scaling_factor"]
    model = setup.load_model(str(latent_model), CPU, "fp32")
    assert (model.shape, model.image_shape) == ((2, 4, 4), (1, 8, 8))
    assert (model.classes, model.null, model.clip, model.data) == (10, True, False, "digits")
    images = run_images(model, "ddim", None, 3, 4, torch.arange(4), guidance="cfg")
    assert images.shape == (4, 1, 8, 8)
    assert images.isfinite().all()
    # Ten by ten images of 8 pixels, four times as large, two apart: not the 4 pixels of the latents.
    assert Image.open(latent_model / "samples" / "step-000008.png").size == (342, 342)


def test_colour_images_of_28_pixels_have_7x7_latents(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (24, 3, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    data = ImageSet("noise", "all", pixels, None, None)
    first, second = tmp_path / "autoencoder", tmp_path / "latent"
    settings = replace(SMALL, channels=(4, 8, 8), latent_channels=3)
    fit(AutoencoderTask(data, settings), data, replace(SHORT, steps=1, batch_size=4), first)
    unconditional = replace(NETWORK, channels=(8,), class_conditional=False)
    task = LatentUNetTask(data, unconditional, str(first))
    fit(task, data, replace(SHORT, steps=1, batch_size=4), second)
    pipeline = LDMPipeline.from_pretrained(second)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    assert pipeline(1, generator=generator, num_inference_steps=2, output_type="np").images.shape == (1, 28, 28, 3)
    model = setup.load_model(str(second), CPU, "fp32")
    assert (model.shape, model.image_shape) == ((3, 7, 7), (3, 28, 28))
    with pytest.raises(UserError, match="the latents of noise are 7x7; a U-Net of 2 resolutions needs square latents"):
        LatentUNetTask(data, replace(unconditional, channels=(8, 8)), str(first))
    with pytest.raises(UserError, match="is of images with 3 channels; digits has 1"):
        LatentUNetTask(load_data("digits"), NETWORK, str(first))


@pytest.mark.parametrize("option", ["learn_variance", "clip_sample", "flip"])
def test_what_is_of_images_is_refused_for_latents(data: ImageSet, autoencoder: Path, option: str) -> None:
    with pytest.raises(UserError, match=f"`{option}` applies to images, but `autoencoder`"):
        LatentUNetTask(data, replace(NETWORK, **{option: True}), str(autoencoder))


def test_what_is_no_autoencoder_is_one_line(data: ImageSet, latent_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`samplerbench train autoencoder` makes one"):
        LatentUNetTask(data, NETWORK, str(tmp_path))
    with pytest.raises(UserError) as caught:
        LatentUNetTask(data, NETWORK, str(latent_model / "unet"))
    assert "AutoencoderKL" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_autoencoder_does_not_resume_a_checkpoint(data: ImageSet, latent_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    fit(AutoencoderTask(data, SMALL), data, replace(SHORT, steps=1), tmp_path)
    with pytest.raises(UserError, match="was made with autoencoder"):
        fit(LatentUNetTask(data, NETWORK, str(tmp_path)), data, SHORT, latent_model)


# --- The baseline: the autoencoder's own samples --------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(latent_model: Path) -> Model:
    return setup.load_model(str(latent_model), CPU, "fp32")


def test_the_baseline_is_the_decoders_answer_to_standard_normal_latents(model: Model, latent_model: Path) -> None:
    network = AutoencoderKL.from_pretrained(latent_model / "vqvae")
    z = normal(3, Purpose.STEP, torch.arange(5), 0, (2, 4, 4)).float()
    with torch.no_grad():
        expected = network.decode(z).sample
    found = run_images(model, "autoencoder-prior", None, 4, 5, torch.arange(5), seed=3, batch_size=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_it_is_one_row_without_evaluations_steps_or_guidance(
    model: Model, make_session: Callable[..., engine.Session], latent_model: Path
) -> None:
    record = engine.run_cell(make_session(model=model), make_cell(model, "autoencoder-prior", None, 4)).record
    assert (record["nfe"], record["steps"], record["spacing"], record["guidance"]) == (0, None, None, None)
    grid = request.Grid(["ddim", "autoencoder-prior"], [2, 3], [], ["cfg", "none"])
    prepared = prepare.prepare(request.Request([grid], model=str(latent_model)), "cpu")
    assert [cell.title for cell in prepared.cells] == [
        *(f"ddim{guided}, {steps} steps" for guided in (" + cfg", "") for steps in (2, 3)),
        "autoencoder-prior",
    ]
    within = prepare.prepare(request.Request([grid.replace(steps=[], nfe=[7])], model=str(latent_model)), "cpu")
    assert [c.title for c in within.cells if c.method.spec == "autoencoder-prior"] == ["autoencoder-prior"]


def test_a_model_of_pixels_refuses_it_before_anything_runs() -> None:
    asked = request.Request([request.Grid(["ddim", "autoencoder-prior"], [2])], model="digits")
    with pytest.raises(UserError, match="draws from an autoencoder's prior, and this model works in pixel space"):
        prepare.prepare(asked, "cpu")


def test_its_latents_have_the_scale_of_the_models_states(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the diffusion was trained on has variance one; N(0, I) in the autoencoder's own latents has scale²."""
    generator = bind_generator(registry.parse("generator", "autoencoder-prior"), model)
    assert model.autoencoder is not None
    decoded: list[torch.Tensor] = []
    monkeypatch.setattr(model, "decode", lambda x: (decoded.append(x), x)[1])
    generator.images(torch.arange(3), Inputs(3), 4)
    (states,) = decoded
    z = Noise(4, torch.arange(3), model.shape, torch.float32)()
    torch.testing.assert_close(states, model.autoencoder.scale * z)


# --- The command line -----------------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_both_stages_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = str(tmp_path / "autoencoder"), str(tmp_path / "latent")
    short = ("--steps", "2", "--batch-size", "4", "--cpu")
    assert command("train", "autoencoder", "--out", first, "--channels", "8,8", "--latent-channels", "3", *short) == 0
    assert command("train", "unet", "--latents", first, "--out", second, "--channels", "16", *short) == 0
    assert setup.load_model(second, CPU, "fp32").shape == (3, 4, 4)
    assert capsys.readouterr().out.splitlines()[-1] == second


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("unet", {"steps": 20_000, "warmup": 500}),
        ("autoencoder", {"steps": 5000}),
        ("classifier", {"steps": 5000, "batch_size": 256, "weight_decay": 0.05}),
        ("features", {"steps": 3000, "weight_decay": 0.05}),
    ],
)
def test_every_command_has_its_defaults_and_hands_on_what_it_is_given(
    name: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TrainSettings] = []

    def fit(
        task: object, data: object, settings: TrainSettings, out: Path, command: object, held_out: object
    ) -> loop.TrainResult:
        assert held_out is None
        seen.append(settings)
        return loop.TrainResult(settings.steps, 0, 0.0, 0.0, False)

    monkeypatch.setattr(loop, "fit", fit)
    assert command("train", name, "--out", str(tmp_path)) == 0
    common = {"batch_size": 128, "lr": 1e-3, "warmup": 200, "ema_decay": 0.999, "checkpoint_every": 1000}
    assert asdict(seen[0]) == asdict(TrainSettings(**(common | changes)))
    given = {"steps": 7, "lr": 0.5, "schedule": "constant", "ema_decay": 0.5, "seed": 3, "mixed_precision": "bf16"}
    flags = [f"--{'ema' if key == 'ema_decay' else key.replace('_', '-')}={value}" for key, value in given.items()]
    assert command("train", name, "--out", str(tmp_path), "--cpu", *flags) == 0
    assert asdict(seen[1]) == asdict(TrainSettings(**(common | changes | given | {"cpu": True})))


def test_only_what_makes_pictures_takes_sample_every(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", "classifier", "--out", str(tmp_path), "--sample-every", "5") == 2
    assert "--sample-every" in capsys.readouterr().err
