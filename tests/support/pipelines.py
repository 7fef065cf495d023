"""Small random pipelines of diffusers, and what they and our samplers make of the same noise."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, run_images
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

from samplerbench.bench import setup
from samplerbench.models import Model
from samplerbench.models.files import LoadOptions
from samplerbench.sampling.noise import Purpose, normal

N, STEPS, SEED = 3, 6, 5
TOLERANCE = 2e-4  # in pixels of [-1, 1], before they are quantised: diffusers keeps its tables in float32
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PROMPTS = ["a red cat", "two dogs", "the sea at midnight"]


def seeded(make: Callable[[], nn.Module], out: str | None = None) -> Any:
    """A random module; `out` is its last layer, which the default initialisation leaves almost silent."""
    torch.manual_seed(0)
    module = make()
    if out is not None:
        nn.init.normal_(module.get_submodule(out).weight, std=0.2)
    return module.eval()


def tiny_unet(channels: int = 4, out: int | None = None, size: int = 8, **more: Any) -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": size}
    channels_out = out or channels
    return seeded(
        lambda: UNet2DModel(in_channels=channels, out_channels=channels_out, **blocks, **sizes, **more), "conv_out"
    )


def tiny_autoencoder(channels: int = 3, latents: int = 4, cls: type = AutoencoderKL, **more: Any) -> Any:
    """From images to latents of half the side."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": latents}
    return seeded(
        lambda: cls(in_channels=channels, out_channels=channels, **blocks, **sizes, **more), "decoder.conv_out"
    )


def tiny_transformer(out: int = 8) -> DiTTransformer2DModel:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "patch_size": 2}
    return seeded(lambda: DiTTransformer2DModel(in_channels=4, out_channels=out, norm_num_groups=4, **sizes))


def save_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer of single letters: no merges."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 16, "tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"})
    )
    return CLIPTokenizer.from_pretrained(folder)


def tiny_stable_diffusion(folder: Path, scheduler: Any) -> StableDiffusionPipeline:
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = save_tokenizer(folder / "made")
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    unet = seeded(
        lambda: UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        "conv_out",
    )
    # An untrained network hardly listens to the text; this one does.
    for name, parameter in unet.named_parameters():
        if "attn2" in name and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5)
    return StableDiffusionPipeline(
        vae=tiny_autoencoder(),
        text_encoder=seeded(lambda: CLIPTextModel(config)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load(folder: Path, **options: Any) -> Model:
    return setup.load_model(str(folder), CPU, "fp32", LoadOptions(**options))


def start(model: Model, n: int = N) -> Tensor:
    """The z that our run of sample 0 … n-1 begins with."""
    return normal(SEED, Purpose.PRIOR, torch.arange(n), 0, model.shape).float()


def ours(model: Model, sampler: str, spacing: str | None, labels: Tensor | None = None, **more: Any) -> Tensor:
    return run_images(model, sampler, spacing, STEPS, N, labels, seed=SEED, **more).clamp(-1, 1)


def theirs(pipeline: Any, z: Tensor, monkeypatch: pytest.MonkeyPatch, **call: Any) -> Tensor:
    """What the pipeline itself makes of z, in [-1, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    module = sys.modules[type(pipeline).__module__]
    with monkeypatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *_, **__: z.clone(), raising=False)
        images = pipeline(num_inference_steps=STEPS, output_type="np", **call).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


def assert_same(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    between = b.abs() < 0.999
    assert int(between.sum()) >= 20, "all is clipped, so there is nothing to compare"
    assert float(b[between].std()) > 0.1
    assert float((a - b).abs().max()) <= TOLERANCE


def ve_pipeline(correct_steps: int, **more: Any) -> ScoreSdeVePipeline:
    unet = tiny_unet(3, time_embedding_type="fourier", center_input_sample=True)
    return ScoreSdeVePipeline(
        unet, ScoreSdeVeScheduler(sigma_min=0.02, sigma_max=0.5, correct_steps=correct_steps, **more)
    )


def configure(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def save_pipelines(root: Path) -> Path:
    """Save one folder of each kind, and a file of prompts."""
    scheduler = DDIMScheduler(clip_sample=False, **SD_BETAS)
    LDMPipeline(tiny_autoencoder(), tiny_unet(), scheduler).save_pretrained(root / "latent")
    DiTPipeline(tiny_transformer(), tiny_autoencoder(), scheduler).save_pretrained(root / "transformer")
    tiny_stable_diffusion(root, scheduler).save_pretrained(root / "text")
    ve_pipeline(1).save_pretrained(root / "ve")
    (root / "prompts.txt").write_text("a cat\n")
    return root
