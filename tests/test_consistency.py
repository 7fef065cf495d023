"""Consistency models, LCM and TCD: the sampler and the models against diffusers' schedulers and pipelines."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Half, run_images
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from support.denoising import denoiser
from support.pipelines import (
    PROMPTS,
    SD_BETAS,
    SEED,
    N,
    assert_same,
    configure,
    load,
    seeded,
    start,
    tiny_stable_diffusion,
    tiny_unet,
)
from torch import Tensor, nn

from samplerbench import registry
from samplerbench.errors import UserError
from samplerbench.models.guidance_embedding import guidance_scale_embedding
from samplerbench.models.preconditioning import DISCRETE, consistency, latent_consistency
from samplerbench.models.schedule import read_schedule
from samplerbench.models.timesteps import timestep_at
from samplerbench.sampling import Denoiser, Noise, Prediction, Sigma
from samplerbench.sampling.driver import drive
from samplerbench.sampling.process import VARIANCE_EXPLODING, VARIANCE_PRESERVING

pytestmark = pytest.mark.filterwarnings("ignore::Warning:diffusers")

SHAPE = (1, 4, 4)
INDEX = torch.arange(N)


def draws(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Noise:
    """The noise of the steps. A new source begins with the first draw again."""
    return Noise(SEED, INDEX, shape, dtype)


def replay(monkeypatch: pytest.MonkeyPatch, scheduler: type, noise: Noise) -> None:
    """Let a scheduler of diffusers draw its noise from `noise`."""
    monkeypatch.setattr(sys.modules[scheduler.__module__], "randn_tensor", lambda *_, **__: noise())


def output(y: Tensor, t: float) -> Tensor:
    """A network: it depends on every pixel and on the time."""
    return torch.tanh(y.roll(1, -1) * 0.7 + 0.3 * y + math.cos(t / 300))


class Network(Denoiser):
    """The denoiser of `output`, with a preconditioning of a discrete model."""

    def __init__(self, prediction: str, levels: Tensor, boundary: bool) -> None:
        self.levels, self.process = levels, VARIANCE_PRESERVING
        known, base = levels.tolist(), DISCRETE[prediction]
        self.scalings = latent_consistency(base, lambda s: timestep_at(known, s)) if boundary else base

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        t = timestep_at(self.levels.tolist(), float(sigma))
        return Prediction(self.scalings.denoised(output(self.scalings.input(x, sigma), t), x, sigma))

    def rows(self, index: Tensor) -> Denoiser:
        return self


def exact_tables(scheduler: Any) -> Any:
    """A scheduler with its tables in float64, so that the comparison is not limited by their rounding."""
    config = {key: scheduler.config[key] for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}
    levels = read_schedule("DDIMScheduler", config, "x").levels
    scheduler.alphas_cumprod = 1 / (1 + levels**2)
    return scheduler


# --- The sampler --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_lcm_is_that_of_diffusers_at_every_step(monkeypatch: pytest.MonkeyPatch, prediction: str, steps: int) -> None:
    scheduler = exact_tables(LCMScheduler(prediction_type=prediction))
    replay(monkeypatch, LCMScheduler, draws())
    levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    grid = registry.parse("spacing", "lcm").grid(levels, steps)
    sampler = registry.parse("sampler", "consistency")
    y = draws()()
    x = y * math.sqrt(1 + float(grid[0]) ** 2)
    scheduler.set_timesteps(steps)
    run = sampler.steps(Network(prediction, levels, boundary=True), x, grid, draws())
    for t, sigma, step in zip(scheduler.timesteps, grid[1:], run, strict=True):
        found = scheduler.step(output(y, int(t)), int(t), y)  # an int, so that c_out is not rounded to float32
        torch.testing.assert_close(step.x0, found.denoised, rtol=0, atol=1e-11)
        y = found.prev_sample
        torch.testing.assert_close(step.x / math.sqrt(1 + float(sigma) ** 2), y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.35, 0.8])
def test_tcd_is_that_of_diffusers_at_every_step(monkeypatch: pytest.MonkeyPatch, prediction: str, gamma: float) -> None:
    """It ends at timestep 0, and ours at σ = 0: its last state is that of our last D and the same direction."""
    scheduler = exact_tables(TCDScheduler(prediction_type=prediction))
    replay(monkeypatch, TCDScheduler, draws())
    levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    steps = 6
    grid = registry.parse("spacing", "lcm").grid(levels, steps)
    sampler = registry.parse("sampler", f"consistency:gamma={gamma}")
    y = draws()()
    before = x = y * math.sqrt(1 + float(grid[0]) ** 2)
    scheduler.set_timesteps(steps)
    run = sampler.steps(Network(prediction, levels, boundary=False), x, grid, draws())
    for t, sigma, step in zip(scheduler.timesteps, grid[1:], run, strict=True):
        y = scheduler.step(output(y, int(t)), t, y, eta=gamma).prev_sample
        if sigma > 0:
            torch.testing.assert_close(step.x / math.sqrt(1 + float(sigma) ** 2), y, rtol=0, atol=1e-11)
            before = step.x
    assert step.x0 is not None
    torch.testing.assert_close(step.x, step.x0, rtol=0, atol=0)
    end, last = float(levels[0]), float(grid[-2])
    expected = (step.x0 + end / last * (before - step.x0)) / math.sqrt(1 + end**2)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_consistency_models_are_sampled_as_by_diffusers_at_every_step(
    monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    scheduler = CMStochasticIterativeScheduler()
    replay(monkeypatch, CMStochasticIterativeScheduler, draws())
    scalings = consistency(0.5, 0.002)

    class Model(Half):
        levels, process = torch.linspace(0.002, 80, 40).double(), VARIANCE_EXPLODING

        def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
            t = 250 * math.log(float(sigma))
            x0 = scalings.denoised(output(scalings.input(x, sigma), t), x, sigma)
            return Prediction(x0.clamp(-1, 1))

    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    scheduler.sigmas[-1] = 0.002  # rounded to float32, its last step adds noise of 1e-6
    grid = torch.cat([scheduler.sigmas[:-1], torch.zeros(1, dtype=torch.float64)])
    theirs = ours = draws()() * float(grid[0])
    sampler = registry.parse("sampler", "consistency:sigma_min=0.002")
    run = sampler.steps(Model(), ours, grid, draws())
    for t, sigma, step in zip(scheduler.timesteps, grid[:-1], run, strict=True):
        scaled = scheduler.scale_model_input(theirs, t)
        theirs = scheduler.step(output(scaled, 250 * math.log(float(sigma))), t, theirs).prev_sample
        torch.testing.assert_close(step.x, theirs, rtol=0, atol=1e-9)


def test_gamma_0_is_ddim_and_draws_no_noise(digits: Any) -> None:
    grid = registry.parse("spacing", "lcm").grid(digits.levels, 5)
    x = digits.prior(start(digits), float(grid[0]))
    noise = draws(digits.shape, torch.float32)
    ends = [
        drive(registry.parse("sampler", spec), denoiser(digits, None, N), x, grid, noise)
        for spec in ("consistency:gamma=0", "ddim")
    ]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-5)
    assert noise.draws == 0


@pytest.mark.parametrize("scheduler", [LCMScheduler, TCDScheduler])
@pytest.mark.parametrize("original", [50, 40, 30])
def test_the_spacing_is_that_of_diffusers_for_every_number_of_steps(scheduler: Any, original: int) -> None:
    made = scheduler(original_inference_steps=original)
    levels = torch.linspace(0.01, 100, 1000).double()
    spacing = registry.parse("spacing", f"lcm:original_steps={original}")
    for steps in range(1, original + 1):
        made.set_timesteps(steps)
        found = spacing.grid(levels, steps)
        assert torch.equal(found[:-1], levels[made.timesteps])
        assert found[-1] == 0
    # More steps than diffusers allows: all timesteps.
    assert torch.equal(spacing.grid(levels, 1000)[:-1], levels.flip(0))
    assert torch.equal(spacing.grid(levels[:20], 4)[:-1], levels[[19, 14, 9, 4]])


# --- Consistency models -------------------------------------------------------------------------------------------


def consistency_pipeline(**more: Any) -> ConsistencyModelPipeline:
    unet = tiny_unet(3, num_class_embeds=4, **more)
    nn.init.normal_(unet.class_embedding.weight, std=3)
    return ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler())


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_consistency_models_equal_their_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    pipeline = consistency_pipeline()
    pipeline.save_pretrained(tmp_path)
    model = load(tmp_path)
    labels = torch.tensor([2, 0, 3])
    assert (model.classes, model.null, model.shape, len(model.levels)) == (4, False, (3, 8, 8), 40)
    assert model.notes["its own sampler"] == "consistency:sigma_min=0.002"
    replay(monkeypatch, CMStochasticIterativeScheduler, draws(model.shape, torch.float32))
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(N, labels.tolist(), steps, latents=start(model), output_type="pt").images * 2 - 1
    spec = model.notes["its own sampler"]
    ours = run_images(model, spec, "lcm", steps, N, labels, seed=SEED)
    assert_same(ours, made)
    assert float((ours - made).abs().max()) <= 1e-4
    other = run_images(model, spec, "lcm", steps, N, labels.flip(0), seed=SEED)
    assert float((other - made).abs().max()) > 0.01


def test_custom_timesteps_are_a_list_of_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps on ImageNet-64: timesteps 22 and 0 of 40 are σ = 80 and 1.38 (Song et al. 2023, appendix C)."""
    pipeline = consistency_pipeline()
    pipeline.save_pretrained(tmp_path)
    model = load(tmp_path)
    replay(monkeypatch, CMStochasticIterativeScheduler, draws(model.shape, torch.float32))
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(N, [1, 1, 1], timesteps=[22, 0], latents=start(model), output_type="pt").images * 2 - 1
    levels = [float(model.levels[-1]), float(model.levels[39 - 22])]
    assert levels == pytest.approx([80, 1.382], abs=1e-3)
    spacing = f"list:{levels[0]!r};{levels[1]!r}"
    ours = run_images(model, "consistency:sigma_min=0.002", spacing, 2, N, torch.tensor([1, 1, 1]), seed=SEED)
    assert float((ours - made).abs().max()) <= 1e-4


def test_a_consistency_model_is_the_identity_at_its_smallest_level(tmp_path: Path) -> None:
    consistency_pipeline().save_pretrained(tmp_path)
    configure(tmp_path / "scheduler/scheduler_config.json", clip_denoised=False, sigma_min=0.01)
    model, x = load(tmp_path), torch.randn(N, 3, 8, 8)
    torch.testing.assert_close(denoiser(model, torch.zeros(N).long(), N)(x, 0.01), x, rtol=0, atol=1e-6)
    assert float(model.levels[0]) == 0.01
    assert not model.clip


def test_what_consistency_models_refuse(tmp_path: Path) -> None:
    consistency_pipeline().save_pretrained(tmp_path)
    scheduler = tmp_path / "scheduler/scheduler_config.json"
    configure(scheduler, sigma_min=90.0)
    with pytest.raises(UserError, match="sigma_min 90 must be less than sigma_max 80"):
        load(tmp_path)
    configure(scheduler, sigma_min="small")
    with pytest.raises(UserError, match="sigma_min is 'small'; it must be a number"):
        load(tmp_path)
    configure(tmp_path / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    with pytest.raises(UserError, match="scheduler DDIMScheduler; only CMStochasticIterativeScheduler is supported"):
        load(tmp_path)
    with pytest.raises(UserError, match="`embedded_guidance` requires a text-to-image model"):
        load(tmp_path, embedded_guidance=3.0)


# --- Latent consistency models ------------------------------------------------------------------------------------


def latent_consistency_pipeline(folder: Path, **config: Any) -> LatentConsistencyModelPipeline:
    """A `LatentConsistencyModelPipeline` whose network listens to the guidance scale."""
    plain = tiny_stable_diffusion(folder, LCMScheduler(**config))
    settings = {key: value for key, value in plain.unet.config.items() if not key.startswith("_")}
    unet = seeded(lambda: UNet2DConditionModel(**settings | {"time_cond_proj_dim": 10}), "conv_out")
    for name, parameter in unet.named_parameters():
        if ("attn2" in name or "cond_proj" in name) and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5)
    return LatentConsistencyModelPipeline(
        **{part: getattr(plain, part) for part in ("vae", "text_encoder", "tokenizer", "scheduler")},
        unet=unet,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize(
    ("steps", "scale", "prediction"),
    [
        pytest.param(1, None, "epsilon", marks=pytest.mark.slow),
        (4, 3.0, "epsilon"),
        pytest.param(4, None, "v_prediction", marks=pytest.mark.slow),
    ],
)
def test_latent_consistency_models_equal_their_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt_file: str, steps: int, scale: float | None, prediction: str
) -> None:
    pipeline = latent_consistency_pipeline(tmp_path, prediction_type=prediction)
    pipeline.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", prompts=prompt_file, embedded_guidance=scale)
    assert model.identity["embedded guidance"] == (scale or 8.5)
    assert model.identity["timestep scaling"] == 10
    replay(monkeypatch, LCMScheduler, draws(model.shape, torch.float32))
    pipeline.set_progress_bar_config(disable=True)
    given = {} if scale is None else {"guidance_scale": scale}
    made = pipeline(PROMPTS, num_inference_steps=steps, latents=start(model), output_type="pt", **given).images * 2 - 1
    ours = run_images(model, "consistency", None, steps, N, torch.arange(N), seed=SEED).clamp(-1, 1)
    assert_same(ours, made)
    assert float((ours - made).abs().max()) <= 1e-4
    other = load(tmp_path / "model", prompts=prompt_file, embedded_guidance=1.0)
    assert (
        float((run_images(other, "consistency", None, steps, N, torch.arange(N), seed=SEED) - ours).abs().max()) > 0.01
    )


@pytest.mark.parametrize("dimension", [10, 11, 256])
@pytest.mark.parametrize("scale", [1.0, 7.5, 8.5])
def test_the_embedding_of_the_guidance_scale_is_diffusers_own(dimension: int, scale: float) -> None:
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    expected = embed(None, torch.tensor(scale - 1).repeat(1), dimension)  # type: ignore[arg-type]
    torch.testing.assert_close(guidance_scale_embedding(scale, dimension), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_stock_pipeline_with_an_lcm_scheduler_has_the_boundary_condition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt_file: str
) -> None:
    """As with LCM-LoRA merged into the weights. A small scaling makes the condition visible."""
    pipeline = tiny_stable_diffusion(tmp_path, LCMScheduler(timestep_scaling=0.001))
    pipeline.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", prompts=prompt_file)
    assert type(pipeline) is StableDiffusionPipeline
    replay(monkeypatch, LCMScheduler, draws(model.shape, torch.float32))
    pipeline.set_progress_bar_config(disable=True)
    made = (
        pipeline(PROMPTS, num_inference_steps=3, guidance_scale=1.0, latents=start(model), output_type="pt").images * 2
        - 1
    )
    ours = run_images(model, "consistency", None, 3, N, torch.arange(N), seed=SEED).clamp(-1, 1)
    assert float((ours - made).abs().max()) <= 1e-4
    configure(tmp_path / "model/scheduler/scheduler_config.json", timestep_scaling=10.0)
    usual = load(tmp_path / "model", prompts=prompt_file)
    assert usual.identity["timestep scaling"] == 10
    other = run_images(usual, "consistency", None, 3, N, torch.arange(N), seed=SEED).clamp(-1, 1)
    assert float((other - made).abs().max()) > 0.01


def test_the_boundary_condition_is_the_same_for_a_batch_of_levels(tmp_path: Path) -> None:
    DDIMPipeline(tiny_unet(1), DDIMScheduler()).save_pretrained(tmp_path)
    configure(tmp_path / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    configure(tmp_path / "scheduler/scheduler_config.json", clip_sample=False, timestep_scaling=0.01)
    model = load(tmp_path)
    denoise, x = denoiser(model, None, N), start(model)
    sigmas = torch.tensor([float(model.levels[0]), 0.37, 25.0], dtype=torch.float64)
    rows = [denoise(x[i : i + 1], float(s)) for i, s in enumerate(sigmas)]
    torch.testing.assert_close(denoise(x, sigmas), torch.cat(rows), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows[0], x[:1] / math.sqrt(1 + float(sigmas[0]) ** 2), rtol=0, atol=1e-6)


def test_what_latent_consistency_models_refuse(tmp_path: Path, prompt_file: str) -> None:
    tiny_stable_diffusion(tmp_path, DDIMScheduler(**SD_BETAS)).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"embedded_guidance=3.0 requires a distilled network"):
        load(tmp_path / "model", prompts=prompt_file, embedded_guidance=3.0)
    with pytest.raises(UserError, match="clip_sample of an LCMScheduler is not supported"):
        read_schedule("LCMScheduler", {"clip_sample": True}, "x")
