"""Every supported pipeline class: the same images as diffusers' own pipeline makes, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import CPU, run_images
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    LDMPipeline,
    PNDMScheduler,
    ScoreSdeVeScheduler,
    VQModel,
)
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from support.denoising import denoiser
from support.pipelines import (
    PROMPTS,
    SD_BETAS,
    SEED,
    STEPS,
    UNET_WEIGHTS,
    N,
    assert_same,
    configure,
    load,
    ours,
    seeded,
    start,
    theirs,
    tiny_autoencoder,
    tiny_stable_diffusion,
    tiny_transformer,
    tiny_unet,
    ve_pipeline,
)
from torch import Tensor, nn

from samplerbench import cli, registry
from samplerbench.bench import setup
from samplerbench.errors import UserError
from samplerbench.models import latent
from samplerbench.models.files import LoadOptions
from samplerbench.models.schedule import VP_SCHEDULERS, read_schedule
from samplerbench.sampling import Inputs
from samplerbench.sampling.driver import drive
from samplerbench.sampling.noise import Noise

pytestmark = pytest.mark.filterwarnings("ignore::Warning:diffusers")


# --- The schedule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}])
@pytest.mark.parametrize("name", VP_SCHEDULERS)
def test_levels_are_those_of_the_scheduler_s_own_table(name: str, config: dict[str, Any]) -> None:
    """The defaults are each class's own: Heun's β are others than the rest's, and only DDPM's and DDIM's clip."""
    made = getattr(diffusers, name)(**config)
    found = read_schedule(name, config, "x")
    bars = made.alphas_cumprod.double()
    torch.testing.assert_close(found.levels, ((1 - bars) / bars).sqrt(), rtol=1e-3, atol=0)
    assert found.prediction == made.config.prediction_type
    assert found.clip == (name in ("DDPMScheduler", "DDIMScheduler"))


def test_what_a_scheduler_does_not_take_is_ignored() -> None:
    plain = read_schedule("PNDMScheduler", {}, "x")
    found = read_schedule("PNDMScheduler", {"clip_sample": True, "rescale_betas_zero_snr": True}, "x")
    assert not found.clip
    assert torch.equal(found.levels, plain.levels)
    with pytest.raises(UserError, match="dynamic thresholding, which is not supported"):
        read_schedule("DDIMScheduler", {"thresholding": True}, "x")


def test_the_range_of_clipping_is_the_configuration_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = DDIMScheduler(clip_sample_range=0.5)
    pipeline = DDIMPipeline(tiny_unet(3), scheduler)
    pipeline.save_pretrained(tmp_path)
    model = load(tmp_path)
    expected = theirs(pipeline, start(model), monkeypatch, batch_size=N, use_clipped_model_output=True)
    assert float(expected.abs().max()) <= 0.5 + 1e-6
    assert_same(ours(model, "ddim", "leading"), expected)


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_only_an_interpolated_variance_is_one_we_can_use(tmp_path: Path, kind: str) -> None:
    """`learned` is the log variance itself, which is no share between the small and the large one."""
    DDIMPipeline(tiny_unet(1, out=2), DDPMScheduler(variance_type=kind)).save_pretrained(tmp_path)
    configure(tmp_path / "model_index.json", scheduler=["diffusers", "DDPMScheduler"])
    configure(tmp_path / "scheduler/scheduler_config.json", variance_type=kind)
    model = load(tmp_path)
    found = denoiser(model, None, N).predict(start(model), 1.0)
    assert model.learned_variance == (kind == "learned_range")
    assert (found.variance is None) == (kind == "learned")
    assert found.x0.shape == (N, 1, 8, 8)


# --- Pixels, variance exploding -----------------------------------------------------------------------------------


def test_levels_of_a_variance_exploding_model_are_geometric(tmp_path: Path) -> None:
    ve_pipeline(1).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.process.alpha(3.0) == 1
    assert (float(model.levels[0]), float(model.levels[-1])) == pytest.approx((0.02, 0.5))
    scheduler = ScoreSdeVeScheduler(sigma_min=0.02, sigma_max=0.5)
    torch.testing.assert_close(model.levels, scheduler.discrete_sigmas.double(), rtol=1e-5, atol=0)
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    assert float(model.encode(pixels).min()) >= 0
    torch.testing.assert_close(model.decode(model.encode(pixels)), pixels)
    assert model.prior(torch.ones(1), 0.5) == 0.5


def test_reverse_diffusion_equals_the_score_sde_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = ve_pipeline(correct_steps=0)
    pipeline.save_pretrained(tmp_path)
    model = load(tmp_path)
    step_noise = Noise(SEED, torch.arange(N), model.shape, torch.float32)
    monkeypatch.setattr(sys.modules[ScoreSdeVeScheduler.__module__], "randn_tensor", lambda *_, **__: step_noise())
    expected = theirs(pipeline, start(model), monkeypatch, batch_size=N)
    assert_same(ours(model, "reverse-diffusion", "geometric"), expected)


def test_predictor_corrector_equals_the_score_sde_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image, as its norms are means over the batch. It corrects at σ_max too, before the first prediction."""
    pipeline = ve_pipeline(correct_steps=1, snr=0.12)
    pipeline.save_pretrained(tmp_path)
    model = load(tmp_path)
    index = torch.tensor([0])
    step_noise = Noise(SEED, index, model.shape, torch.float32)
    monkeypatch.setattr(sys.modules[ScoreSdeVeScheduler.__module__], "randn_tensor", lambda *_, **__: step_noise())
    expected = theirs(pipeline, start(model, 1), monkeypatch, batch_size=1)

    noise = Noise(SEED, index, model.shape, torch.float32)
    denoise, grid = denoiser(model, None, 1), registry.parse("spacing", "geometric").grid(model.levels, STEPS)
    x, z, sigma = model.prior(start(model, 1), 0.5), noise(), 0.5
    score = (denoise(x, sigma) - x) / sigma**2
    size = 2 * (0.12 * z.norm() / score.norm()) ** 2
    x = drive(registry.parse("sampler", "pc:snr=0.12"), denoise, x + size * score + (2 * size).sqrt() * z, grid, noise)
    assert_same(model.decode(x).clamp(-1, 1), expected)


# --- Latents ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [AutoencoderKL, VQModel])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_latent_diffusion_equals_its_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: type, prediction: str
) -> None:
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction, **SD_BETAS)
    pipeline = LDMPipeline(tiny_autoencoder(cls=cls, scaling_factor=0.4), tiny_unet(), scheduler)
    pipeline.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert (model.shape, model.image_shape) == ((4, 8, 8), (3, 16, 16))
    assert_same(ours(model, "ddim", "leading"), theirs(pipeline, start(model), monkeypatch, batch_size=N))


def test_class_conditional_latents_are_guided(tmp_path: Path) -> None:
    """diffusers' pipeline has no classes, so its loop is written out here."""
    unet, vae = tiny_unet(num_class_embeds=4), tiny_autoencoder(1)
    nn.init.normal_(unet.class_embedding.weight, std=3)
    scheduler = DDIMScheduler(clip_sample=False, **SD_BETAS)
    LDMPipeline(vae, unet, scheduler).save_pretrained(tmp_path)
    (tmp_path / "samplerbench.json").write_text(json.dumps({"classes": 3, "null_label": 3}))
    model = load(tmp_path)
    assert (model.classes, model.null, model.image_shape) == (3, True, (1, 16, 16))
    labels = torch.tensor([2, 0, 1])
    scheduler.set_timesteps(STEPS)
    x = start(model)
    with torch.no_grad():
        for t in scheduler.timesteps:
            given, none = (unet(x, t, class_labels=c).sample for c in (labels, torch.full((N,), 3)))
            x = scheduler.step(none + 3 * (given - none), t, x).prev_sample
        expected = vae.decode(x / vae.config.scaling_factor).sample.clamp(-1, 1)
    assert_same(ours(model, "ddim", "leading", labels, guidance="cfg:scale=3"), expected)


@pytest.fixture
def latent_folder(tmp_path: Path) -> Path:
    """Latents of grey 8x8 images, which know that they are digits."""
    unet = tiny_unet(size=4)
    vae = tiny_autoencoder(1, scaling_factor=0.7, shift_factor=0.3)
    LDMPipeline(vae, unet, DDIMScheduler(clip_sample=False, **SD_BETAS)).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "samplerbench.json").write_text(json.dumps({"data": {"name": "digits"}}))
    return tmp_path / "model"


def test_images_do_not_depend_on_batches_or_chunks(latent_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(latent_folder)
    decoded: list[int] = []
    assert model.autoencoder is not None
    model.autoencoder.decoder.register_forward_pre_hook(lambda _, given: decoded.append(len(given[0])))
    whole = ours(model, "ddim", None)
    assert decoded == [N]
    assert float((whole - ours(model, "ddim", None, batch_size=2)).abs().max()) <= 1e-5
    decoded.clear()
    monkeypatch.setattr(latent, "PIXELS_AT_ONCE", 2 * 8 * 8)
    assert float((whole - ours(model, "ddim", None)).abs().max()) <= 1e-5
    assert decoded == [2, 1]


def test_real_images_are_encoded_to_the_posterior_s_mode(latent_folder: Path) -> None:
    model = load(latent_folder)
    vae = AutoencoderKL.from_pretrained(latent_folder / "vqvae")
    from samplerbench.data import load_data

    states, labels = model.real(5)
    assert states.shape == (5, 4, 4, 4)
    assert labels is not None
    data = load_data("digits")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:5]
    with torch.no_grad():
        mode = vae.encode(data.images[order].float() / 127.5 - 1).latent_dist.mode()
        torch.testing.assert_close(states, (mode - 0.3) * 0.7)
        torch.testing.assert_close(model.decode(states), vae.decode(mode).sample)
    with pytest.raises(UserError, match="the images have shape 1x9x8, but the model requires 1x8x8"):
        model.encode(torch.zeros(1, 1, 9, 8))


def test_the_decoder_is_counted_and_timed_apart(latent_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", "digits", "--features", "digits-cnn", "--n", "7", "--batch-size", "3", "--steps", "4"]
    given = ["--model", str(latent_folder), "--out", str(latent_folder / "out")]
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "-s", "ddim", "-s", "heun", *arguments, *given, "--json"])
    assert not ended.value.code
    ddim, heun = json.loads(capsys.readouterr().out)
    assert (ddim["nfe"], heun["nfe"]) == (4, 7)
    assert (ddim["decoder_passes"], heun["decoder_passes"]) == (1, 1)
    assert ddim["decoder_seconds"] > 0
    with pytest.raises(SystemExit):
        cli.main(["run", "-s", "ddim", *arguments, *given])
    assert "decoder" in capsys.readouterr().out


def test_decoding_is_not_in_the_seconds_of_sampling(latent_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from samplerbench.models.latent import Autoencoder

    decode = Autoencoder.decode

    def slow(self: Autoencoder, latents: Tensor) -> Tensor:
        import time

        time.sleep(0.3)
        return decode(self, latents)

    monkeypatch.setattr(Autoencoder, "decode", slow)
    out = latent_folder / "out"
    arguments = ["--data", "digits", "--features", "digits-cnn", "--n", "6", "--batch-size", "3", "--steps", "1"]
    with pytest.raises(SystemExit):
        cli.main(["run", "-s", "ddim", *arguments, "--model", str(latent_folder), "--out", str(out)])
    (record,) = (json.loads(f.read_text("utf-8")) for f in out.glob("*.json"))
    assert record["decoder_seconds"] >= 0.6
    assert record["seconds"] < 0.6


def test_the_decoder_keeps_the_state_s_precision(latent_folder: Path) -> None:
    """--dtype is of the network: what it costs in quality is not mixed up with what a coarse decoder costs."""
    for dtype, expected in (("bf16", torch.float32), ("fp64", torch.float64)):
        model = setup.load_model(str(latent_folder), CPU, dtype)
        assert model.autoencoder is not None
        assert next(model.autoencoder.module.parameters()).dtype == expected
        assert model.network.conv_in.weight.dtype == model.dtype
        assert run_images(model, "ddim", None, 2, 2, None).dtype == expected


# --- Transformers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "scale"), [(8, 4.0), (8, 1.0), (4, 2.5)])
def test_diffusion_transformers_equal_their_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: int, scale: float
) -> None:
    scheduler = DDIMScheduler(clip_sample=False, beta_end=0.006)
    pipeline = DiTPipeline(tiny_transformer(out), tiny_autoencoder(), scheduler)
    pipeline.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert (model.classes, model.null, model.learned_variance) == (1000, True, out == 8)
    labels = [7, 999, 0]
    expected = theirs(pipeline, start(model), monkeypatch, class_labels=labels, guidance_scale=scale)
    assert_same(ours(model, "ddim", "leading", torch.tensor(labels), guidance=f"cfg:scale={scale}"), expected)
    unguided = ours(model, "ddim", "leading", torch.tensor(labels))
    assert (float((unguided - expected).abs().max()) > 0.01) == (scale != 1)
    unlabelled = run_images(model, "ddim", "leading", STEPS, N, None, seed=SEED).clamp(-1, 1)
    assert float((unlabelled - unguided).abs().max()) > 0.01


@pytest.mark.parametrize("kind", ["transformer", "text", "ve"])
def test_every_kind_runs_in_bfloat16(saved_pipelines: Path, kind: str) -> None:
    options = LoadOptions(prompts=str(saved_pipelines / "prompts.txt")) if kind == "text" else LoadOptions()
    model = setup.load_model(str(saved_pipelines / kind), CPU, "bf16", options)
    labels = None if kind == "ve" else torch.zeros(2, dtype=torch.int64)
    guidance = "none" if labels is None else "cfg:scale=2"
    images = run_images(model, "ddim", None, 2, 2, labels, guidance=guidance)
    assert images.isfinite().all()
    assert (images.shape, images.dtype) == ((2, *model.image_shape), torch.float32)


def test_a_transformer_s_learned_variance_is_used_by_ddpm(tmp_path: Path) -> None:
    DiTPipeline(tiny_transformer(), tiny_autoencoder(), DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "transformer/config.json").read_text("utf-8"))
    older = {"_class_name": "Transformer2DModel", "cross_attention_dim": None, "num_vector_embeds": None}
    (tmp_path / "transformer/config.json").write_text(json.dumps(config | older))
    index = json.loads((tmp_path / "model_index.json").read_text("utf-8"))
    index["transformer"] = ["diffusers", "Transformer2DModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    model = load(tmp_path)
    labels = torch.tensor([1, 2, 3])
    found = denoiser(model, labels, N).predict(start(model), 1.0)
    output = model.network(
        start(model) / 2**0.5, timestep=torch.full((N,), float(model.timestep(1.0))), class_labels=labels
    ).sample
    torch.testing.assert_close(found.variance, (output[:, 4:] + 1) / 2)


# --- Text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "negative", "scheduler", "sampler", "spacing"),
    [
        ("epsilon", None, DDIMScheduler(clip_sample=False, steps_offset=1, **SD_BETAS), "ddim", "leading:offset=1"),
        (
            "v_prediction",
            "a dog",
            DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type="v_prediction", **SD_BETAS),
            "ddim",
            "leading:offset=1",
        ),
        (
            "sample",
            None,
            DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type="sample", **SD_BETAS),
            "ddim",
            "leading:offset=1",
        ),
        (
            "epsilon",
            "a dog",
            DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False, **SD_BETAS),
            "diffusers/DDIMScheduler:steps_offset=1,set_alpha_to_one=false",
            None,
        ),
        (
            "epsilon",
            None,
            PNDMScheduler(skip_prk_steps=True, steps_offset=1, **SD_BETAS),
            "diffusers/PNDMScheduler:skip_prk_steps=true,steps_offset=1",
            None,
        ),
    ],
)
def test_stable_diffusion_equals_its_pipeline(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompt_file: str,
    prediction: str,
    negative: str | None,
    scheduler: Any,
    sampler: str,
    spacing: str | None,
) -> None:
    pipeline = tiny_stable_diffusion(tmp_path, scheduler)
    pipeline.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", prompts=prompt_file, negative_prompt=negative)
    assert (model.classes, model.null, model.identity["prediction"]) == (3, True, prediction)
    order = [2, 0, 1]
    told: dict[str, Any] = {"prompt": [PROMPTS[i] for i in order], "guidance_scale": 5.0}
    told |= {} if negative is None else {"negative_prompt": [negative] * N}
    expected = theirs(pipeline, start(model), monkeypatch, latents=start(model), **told)
    assert_same(ours(model, sampler, spacing, torch.tensor(order), guidance="cfg:scale=5"), expected)
    other = ours(model, sampler, spacing, torch.tensor([0, 1, 2]), guidance="cfg:scale=5")
    assert float((other - expected).abs().max()) > 0.01


def test_prompts_are_encoded_once_and_drawn_like_labels(tmp_path: Path, prompt_file: str) -> None:
    pipeline = tiny_stable_diffusion(tmp_path, DDIMScheduler(clip_sample=False, **SD_BETAS))
    pipeline.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", prompts=prompt_file)
    tokens = pipeline.tokenizer(PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = pipeline.text_encoder(tokens.input_ids)[0]
    torch.testing.assert_close(model.condition(Inputs(2, prompts=torch.tensor([1, 1])))["text"], hidden[[1, 1]])
    assert setup.label_classes(model, [None]) == 3
    assert model.notes["truncated prompts"] == "1"
    given, none = ours(model, "ddim", "leading:offset=1", torch.arange(N)), ours(model, "ddim", "leading:offset=1")
    assert float((given - none).abs().max()) > 0.01


@pytest.mark.slow
def test_everything_that_fixes_the_images_is_in_the_protocol(tmp_path: Path, prompt_file: str) -> None:
    pipeline = tiny_stable_diffusion(tmp_path, DDIMScheduler(clip_sample=False, **SD_BETAS))
    folder = tmp_path / "model"
    pipeline.save_pretrained(folder)

    def identity(**options: Any) -> dict[str, Any]:
        return load(folder, **{"prompts": prompt_file, **options}).identity

    plain = identity()
    assert identity() == plain
    other = tmp_path / "other.txt"
    other.write_text("a red cat\ntwo dogs\nthe sea\n")
    assert differing(plain, identity(prompts=str(other))) == {"prompts"}
    assert differing(plain, identity(negative_prompt="fog")) == {"negative prompt"}
    changes: dict[str, Callable[[], None]] = {
        "weights": lambda: nudge(folder / UNET_WEIGHTS),
        "autoencoder weights": lambda: nudge(folder / "vae/diffusion_pytorch_model.safetensors"),
        "text encoder": lambda: nudge(folder / "text_encoder/model.safetensors"),
        "scaling factor": lambda: configure(folder / "vae/config.json", scaling_factor=0.5),
        "betas": lambda: configure(folder / "scheduler/scheduler_config.json", beta_end=0.013),
        "prediction": lambda: configure(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction"),
        "clip": lambda: configure(folder / "scheduler/scheduler_config.json", clip_sample=True),
    }
    for field, change in changes.items():
        change()
        found = identity()
        assert differing(plain, found) == {field}
        plain = found


def differing(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    assert a.keys() == b.keys()
    return {key for key in a if a[key] != b[key]}


def nudge(file: Path) -> None:
    """One tensor of a weights file, a little larger."""
    weights = load_file(file)
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 0.001}, file, {"format": "pt"})


def test_older_configurations_leave_out_what_is_the_default(saved_pipelines: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved_pipelines / "text", tmp_path / "model")
    for file, names in (
        ("unet/config.json", ("in_channels", "out_channels", "num_class_embeds")),
        ("vae/config.json", ("latent_channels", "scaling_factor", "shift_factor")),
        ("scheduler/scheduler_config.json", ("num_train_timesteps", "prediction_type", "variance_type")),
    ):
        settings = json.loads((folder / file).read_text("utf-8"))
        (folder / file).write_text(json.dumps({k: v for k, v in settings.items() if k not in names}))
    found, whole = load(folder, show=True), load(saved_pipelines / "text", show=True)
    assert differing(found.identity, whole.identity) == {"source"}
    assert found.shape == whole.shape


@pytest.mark.slow
def test_a_tokenizer_of_two_files_is_the_same_as_one_of_one(saved_pipelines: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved_pipelines / "text", tmp_path / "model")
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(saved_pipelines / "made", folder / "tokenizer")
    (folder / "tokenizer/tokenizer.json").unlink(missing_ok=True)
    inputs = Inputs(1, prompts=torch.tensor([0]))
    prompts = str(saved_pipelines / "prompts.txt")
    first, second = (load(f, prompts=prompts).condition(inputs)["text"] for f in (folder, saved_pipelines / "text"))
    assert torch.equal(first, second)
    (folder / "tokenizer/merges.txt").unlink()
    with pytest.raises(UserError, match=r"is incomplete: tokenizer/vocab.json or tokenizer/merges.txt is missing"):
        load(folder, prompts=prompts)


# --- Variants, revisions and the hub ------------------------------------------------------------------------------


@pytest.fixture
def pixel_folder(tmp_path: Path) -> Path:
    DDIMPipeline(tiny_unet(1), DDIMScheduler()).save_pretrained(tmp_path / "pixel")
    return tmp_path / "pixel"


def test_a_variant_s_own_weights_are_loaded(pixel_folder: Path) -> None:
    plain = load(pixel_folder)
    other = seeded(lambda: tiny_unet(1))
    nn.init.constant_(other.conv_out.bias, 2.0)
    other.save_pretrained(pixel_folder / "unet", variant="non_ema")
    nn.init.constant_(other.conv_out.bias, 3.0)
    other.save_pretrained(pixel_folder / "unet_ema")
    biases = [float(load(pixel_folder, variant=v).network.conv_out.bias) for v in (None, "non_ema", "ema")]
    assert biases[1:] == [2, 3]
    assert biases[0] not in (2, 3)
    assert load(pixel_folder).identity == plain.identity
    found = load(pixel_folder, variant="non_ema").identity
    assert differing(plain.identity, found) == {"variant", "weights"}
    with pytest.raises(UserError, match="has no variant fp16; available variants: non_ema, ema"):
        load(pixel_folder, variant="fp16")
    (pixel_folder / UNET_WEIGHTS).unlink()
    with pytest.raises(UserError, match="only the variants non_ema are available; select one with `variant`"):
        load(pixel_folder)


def test_sharded_weights_are_loaded_and_hashed(pixel_folder: Path) -> None:
    whole = load(pixel_folder)
    (pixel_folder / UNET_WEIGHTS).unlink()
    tiny_unet(1).save_pretrained(pixel_folder / "unet", max_shard_size="8KB")
    shards = sorted((pixel_folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    sharded = load(pixel_folder)
    assert torch.equal(sharded.network.conv_in.weight, whole.network.conv_in.weight)
    before = sharded.identity["weights"]
    nudge(shards[-1])
    assert load(pixel_folder).identity["weights"] != before


def cached_repository(folder: Path, cache: Path, commit: str = "a" * 40) -> None:
    """The folder as the hub's own cache has it, as owner/tiny at main and at the tag v1."""
    root = cache / "models--owner--tiny"
    shutil.copytree(folder, root / "snapshots" / commit)
    (root / "refs").mkdir()
    for ref in ("main", "v1"):
        (root / "refs" / ref).write_text(commit)


def test_the_cache_serves_offline(pixel_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_repository(pixel_folder, tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision in (None, "v1"):
        model = setup.load_model("owner/tiny", CPU, "fp32", LoadOptions(offline=True, revision=revision))
        assert model.identity["revision"] == "a" * 40
        assert model.identity["weights"] == load(pixel_folder).identity["weights"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert setup.load_model("owner/tiny", CPU, "fp32").identity["source"] == "owner/tiny"
    for options in (LoadOptions(), LoadOptions(revision="v2")):
        source = "owner/tiny" if options.revision else "owner/absent"
        with pytest.raises(
            UserError, match="is not in the local cache and offline mode is on; download its folder"
        ) as error:
            setup.load_model(source, CPU, "fp32", options)
        assert "\n" not in str(error.value)


def test_a_hub_that_is_out_of_reach_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        UserError, match=r"the hub cannot be reached \(OSError\); download its folder \(model_index.json, and"
    ):
        setup.load_model("owner/tiny", CPU, "fp32")


def test_only_the_weights_that_are_read_are_fetched(pixel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: list[list[str]] = []

    def snapshot(*_: Any, allow_patterns: list[str], **__: Any) -> str:
        asked.append(allow_patterns)
        return str(pixel_folder)

    configure(pixel_folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    setup.load_model("owner/tiny", CPU, "fp32")
    stem = "unet/diffusion_pytorch_model"
    files = [f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{stem}.bin", "safety_checker/model.safetensors"]
    files += ["tiny.safetensors", "unet/config.json", f"{stem}-00001-of-00002.safetensors"]
    assert list(filter_repo_objects(files, allow_patterns=asked[0])) == ["unet/config.json"]
    wanted = [f"{stem}.safetensors", "unet/config.json", f"{stem}-00001-of-00002.safetensors"]
    assert list(filter_repo_objects(files, allow_patterns=asked[1])) == wanted
