"""Text-to-image rectified flows: the same images as diffusers' own pipelines, independent of the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU
from safetensors.torch import save_file
from support.pipelines import PROMPTS, STEPS, configure, load
from support.text_flows import aura_flow, flux, lumina2, qwen_image, sana, sd3, z_image
from support.text_pipelines import TOLERANCE, check_batches, difference, our_images, pipeline_images, start

from samplerbench.bench import setup
from samplerbench.errors import UserError
from samplerbench.models.files import LoadOptions

pytestmark = pytest.mark.filterwarnings("ignore::Warning:diffusers")

TIMES = np.linspace(1.0, 1 / STEPS, STEPS)
"""The times before the shift, which most pipelines use by default."""


@pytest.mark.parametrize("with_t5", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_stable_diffusion_3_equals_its_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_t5: bool) -> None:
    pipeline = sd3(tmp_path, with_t5)
    pipeline.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", prompts=tuple(PROMPTS), negative_prompt="fog")
    assert (model.shape, model.image_shape) == ((4, 8, 8), (3, 16, 16))
    assert (model.identity["shift"], model.identity["autoencoder shift"]) == (3.0, 0.06)
    call: dict[str, Any] = {"guidance_scale": 4.0, "negative_prompt": ["fog"] * 3, "sigmas": TIMES}
    expected = pipeline_images(pipeline, start(model), monkeypatch, height=16, width=16, **call)
    assert difference(our_images(model, "ddim", "flow", guidance="cfg:scale=4"), expected) <= TOLERANCE
    assert model.identity["text encoder 3"] == "none" or with_t5
    if with_t5:
        check_batches(model, "ddim", "flow", guidance="cfg:scale=4")


def test_what_the_transformer_cannot_take_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    sd3(tmp_path).save_pretrained(tmp_path / "model")
    with pytest.raises(
        UserError, match=r"embeddings for latents of at most 32x32 .* but they are 8x40; use a smaller `i"
    ):
        load(tmp_path / "model", show=True, image_size=(16, 80))
    configure(tmp_path / "model/transformer/config.json", pooled_projection_dim=16)
    with pytest.raises(UserError, match=r"pooled_projection_dim of the network is 16, but .* have 20 channels\."):
        load(tmp_path / "model", prompts=tuple(PROMPTS))


@pytest.mark.parametrize(
    "guidance", [None, pytest.param(6.0, marks=pytest.mark.slow), pytest.param("schnell", marks=pytest.mark.slow)]
)
def test_flux_equals_its_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guidance: float | str | None
) -> None:
    """With the embedded guidance scale, its default, or none of it; always with true CFG."""
    pipeline = flux(tmp_path, guidance != "schnell")
    pipeline.save_pretrained(tmp_path / "model")
    scale = guidance if isinstance(guidance, float) else None
    size = (16, 24)
    options: dict[str, Any] = {"prompts": tuple(PROMPTS), "negative_prompt": "fog", "image_size": size}
    model = load(tmp_path / "model", embedded_guidance=scale, **options)
    assert (model.shape, model.image_shape) == ((4, 8, 12), (3, 16, 24))
    assert model.identity["embedded guidance"] == {None: 3.5, 6.0: 6.0, "schnell": None}[guidance]
    call: dict[str, Any] = {"true_cfg_scale": 4.0, "negative_prompt": ["fog"] * 3, "height": 16, "width": 24}
    call |= {"guidance_scale": scale or 3.5, "latents": None}
    expected = pipeline_images(pipeline, start(model), monkeypatch, **call)
    assert difference(our_images(model, "ddim", "flow", guidance="cfg:scale=4"), expected) <= TOLERANCE
    if guidance is None:
        check_batches(model, "ddim", "flow", guidance="cfg:scale=4")
        assert load(tmp_path / "model", show=True).shape == (4, 128, 128)
    if guidance == "schnell":
        with pytest.raises(UserError, match=r"embedded_guidance=2\.0: the network of .* has no embedded guidance"):
            load(tmp_path / "model", embedded_guidance=2.0, **options)


@pytest.mark.slow
def test_sana_equals_its_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = sana()
    pipeline.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", prompts=tuple(PROMPTS), image_size=(32, 32))
    assert model.identity["timestep scale"] == 0.5
    assert model.identity["instruction"].startswith("Given a user prompt")
    call: dict[str, Any] = {"guidance_scale": 4.5, "height": 32, "width": 32, "use_resolution_binning": False}
    expected = pipeline_images(pipeline, start(model), monkeypatch, sigmas=TIMES, **call)
    assert difference(our_images(model, "ddim", "flow", guidance="cfg:scale=4.5"), expected) <= TOLERANCE
    check_batches(model, "ddim", "flow", guidance="cfg:scale=4.5")


@pytest.mark.slow
def test_aura_flow_equals_its_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = aura_flow()
    pipeline.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", prompts=tuple(PROMPTS))
    call: dict[str, Any] = {"guidance_scale": 3.5, "height": 16, "width": 16, "sigmas": TIMES}
    expected = pipeline_images(pipeline, start(model), monkeypatch, **call)
    assert difference(our_images(model, "ddim", "flow", guidance="cfg:scale=3.5"), expected) <= TOLERANCE
    check_batches(model, "ddim", "flow", guidance="cfg:scale=3.5")


@pytest.mark.slow
def test_lumina_2_equals_its_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its network is given 1 - t and returns -v."""
    pipeline = lumina2()
    pipeline.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", prompts=tuple(PROMPTS))
    call: dict[str, Any] = {"guidance_scale": 4.0, "height": 16, "width": 16, "cfg_normalization": False}
    expected = pipeline_images(pipeline, start(model), monkeypatch, **call)
    assert difference(our_images(model, "ddim", "flow", guidance="cfg:scale=4"), expected) <= TOLERANCE
    call |= {"cfg_normalization": True}
    expected = pipeline_images(pipeline, start(model), monkeypatch, **call)
    normalised = our_images(model, "ddim", "flow", guidance="cfg-norm:scale=4,over=width")
    assert difference(normalised, expected) <= TOLERANCE
    check_batches(model, "ddim", "flow", guidance="cfg-norm:scale=4,over=width")


@pytest.mark.slow
def test_qwen_image_equals_its_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scheduler has a dynamic shift and a last time, and its autoencoder is one of videos."""
    pipeline = qwen_image()
    pipeline.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", prompts=tuple(PROMPTS), negative_prompt="fog", image_size=(16, 24))
    assert (model.shape, model.image_shape) == ((4, 8, 12), (3, 16, 24))
    call: dict[str, Any] = {"height": 16, "width": 24, "latents": None}
    expected = pipeline_images(pipeline, start(model), monkeypatch, **call)
    assert difference(our_images(model, "ddim", "flow"), expected) <= TOLERANCE
    call |= {"true_cfg_scale": 4.0, "negative_prompt": ["fog"] * 3}
    expected = pipeline_images(pipeline, start(model), monkeypatch, **call)
    normalised = our_images(model, "ddim", "flow", guidance="cfg-norm:scale=4,over=patch")
    assert difference(normalised, expected) <= TOLERANCE
    plain = our_images(model, "ddim", "flow", guidance="cfg:scale=4")
    assert float((plain - normalised).abs().max()) > 1e-3
    check_batches(model, "ddim", "flow", guidance="cfg-norm:scale=4,over=patch")


@pytest.mark.slow
def test_z_image_equals_its_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its network is given 1 - t and returns -v; its guidance scale is one less than that of `cfg`."""
    pipeline = z_image()
    pipeline.save_pretrained(tmp_path / "model")
    # A chat template is a program. The one in the checkpoint is not run.
    (tmp_path / "model/tokenizer/chat_template.jinja").write_text("{{ 1 / 0 }}", encoding="utf-8")
    model = load(tmp_path / "model", prompts=tuple(PROMPTS), negative_prompt="fog", image_size=(16, 16))
    call: dict[str, Any] = {"guidance_scale": 3.0, "height": 16, "width": 16, "negative_prompt": ["fog"] * 3}
    expected = pipeline_images(pipeline, start(model), monkeypatch, **call)
    assert difference(our_images(model, "ddim", "flow", guidance="cfg:scale=4"), expected) <= TOLERANCE
    check_batches(model, "ddim", "flow", guidance="cfg:scale=4")
    call |= {"cfg_normalization": True, "negative_prompt": ["fog"] * 3}  # the pipeline changes the list
    expected = pipeline_images(pipeline, start(model), monkeypatch, **call)
    normalised = our_images(model, "ddim", "flow", guidance="cfg-norm:scale=4,over=sample,shrink=true")
    assert difference(normalised, expected) <= TOLERANCE


def test_latents_are_packed_as_in_diffusers() -> None:
    from diffusers import FluxPipeline

    from samplerbench.models.flow_text import pack, unpack

    y = torch.randn(2, 3, 4, 6)
    assert torch.equal(pack(y), FluxPipeline._pack_latents(y, 2, 3, 4, 6))
    assert torch.equal(unpack(pack(y), 4, 6), y)


@pytest.mark.slow
def test_a_lora_of_a_wrapped_transformer_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    pipeline = flux(tmp_path, guidance_embeds=False)
    pipeline.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    layer = "transformer.transformer_blocks.0.attn.to_v"
    factors = {f"{layer}.lora_A.weight": torch.randn(2, 32), f"{layer}.lora_B.weight": torch.randn(32, 2) / 10}
    save_file(factors, tmp_path / "lora.safetensors")
    options: dict[str, Any] = {"prompts": tuple(PROMPTS), "image_size": (16, 16)}
    plain = our_images(load(tmp_path / "model", **options), "ddim", "flow")
    model = load(tmp_path / "model", **options, lora=(f"{tmp_path}/lora.safetensors:0.7",))
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    pipeline.fuse_lora(lora_scale=0.7)
    expected = pipeline_images(pipeline, start(model), monkeypatch, height=16, width=16, latents=None)
    ours = our_images(model, "ddim", "flow")
    assert difference(ours, expected) <= TOLERANCE
    assert float((ours - plain).abs().max()) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp64"])
@pytest.mark.parametrize(
    "make",
    [
        lambda root: sd3(root),
        lambda root: flux(root, guidance_embeds=True),
        lambda root: sana(),
        lambda root: lumina2(),
        lambda root: aura_flow(),
        lambda root: qwen_image(),
        lambda root: z_image(),
    ],
    ids=["sd3", "flux", "sana", "lumina2", "aura_flow", "qwen_image", "z_image"],
)
def test_every_flow_runs_in_other_precisions(tmp_path: Path, make: Callable[[Path], Any], dtype: str) -> None:
    """In float64 the images are near those in float32, so neither the state nor the time is rounded on the way."""
    make(tmp_path).save_pretrained(tmp_path / "model")
    options = LoadOptions(prompts=tuple(PROMPTS), image_size=(32, 32))
    model = setup.load_model(str(tmp_path / "model"), CPU, dtype, options)
    assert {p.dtype for p in model.network.parameters()} == {model.dtype}
    images = our_images(model, "ddim", "flow", guidance="cfg:scale=2")
    assert images.isfinite().all()
    assert images.dtype == (torch.float64 if dtype == "fp64" else torch.float32)
    if dtype == "fp64":
        model = setup.load_model(str(tmp_path / "model"), CPU, "fp32", options)
        single = our_images(model, "ddim", "flow", guidance="cfg:scale=2")
        assert difference(single.double(), images) <= 10 * TOLERANCE
