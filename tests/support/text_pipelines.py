"""Small random text-to-image pipelines of diffusers, with tokenizers of single letters."""

from __future__ import annotations

import string
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import run_images
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from samplerbench.models import Model
from samplerbench.sampling.meter import Meter
from samplerbench.sampling.noise import Purpose, normal
from support.pipelines import PROMPTS, SD_BETAS, SEED, STEPS, N, save_tokenizer, seeded, tiny_autoencoder

TOLERANCE = 1e-4
"""Maximum difference of a pixel in [-1, 1], in float32."""
ORDER = [2, 0, 1]
LETTERS = string.ascii_letters + string.digits + string.punctuation


def clip_config(width: int, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        **more,
    )


def clip(width: int, projection: int | None = None) -> nn.Module:
    """A CLIP text encoder, with a projection if its width is given."""
    if projection is None:
        return seeded(lambda: CLIPTextModel(clip_config(width)))
    return seeded(lambda: CLIPTextModelWithProjection(clip_config(width, projection_dim=projection)))


def t5_tokenizer() -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=special + [(letter, -3.0) for letter in LETTERS], extra_ids=0)


def t5(width: int = 16) -> T5EncoderModel:
    config = T5Config(
        vocab_size=128, d_model=width, d_kv=8, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    module = seeded(lambda: T5EncoderModel(config))
    for name, parameter in module.named_parameters():  # its own initialisation is almost silent
        if parameter.ndim == 2 and "shared" not in name:
            nn.init.normal_(parameter, std=0.2)
    return module


def listening(network: Any, *names: str, std: float = 0.5) -> Any:
    """An untrained network hardly listens to the text; this one does."""
    torch.manual_seed(1)
    for name, parameter in network.named_parameters():
        if any(part in name for part in names) and parameter.ndim == 2:
            nn.init.normal_(parameter, std=std)
    return network


def awake(network: Any, std: float = 0.05, head: str | None = None, head_std: float = 0.2) -> Any:
    """A transformer without layers of zeros, which the default initialisation has."""
    torch.manual_seed(2)
    for parameter in network.parameters():
        if parameter.ndim == 1 and float(parameter.detach().abs().max()) == 0:
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim >= 2:
            nn.init.normal_(parameter, std=std if parameter.ndim == 2 else 0.2)
    if head is not None:
        nn.init.normal_(network.get_submodule(head).weight, std=head_std)
    return network


def xl(root: Path, scheduler: Any, **more: Any) -> diffusers.StableDiffusionXLPipeline:
    unet = seeded(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=16 + 24,
            attention_head_dim=4,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 12,
        ),
        "conv_out",
    )
    tokenizers = [save_tokenizer(root / f"made{i}") for i in range(2)]
    return diffusers.StableDiffusionXLPipeline(
        vae=tiny_autoencoder(),
        text_encoder=clip(16),
        text_encoder_2=clip(24, 12),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=listening(unet, "attn2", "add_embedding"),
        scheduler=scheduler,
        add_watermarker=False,
        **more,
    )


def pixart(cls: str, sample_size: int = 8, **more: Any) -> Any:
    torch.manual_seed(0)
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        norm_num_groups=4,
        cross_attention_dim=24,
        sample_size=sample_size,
        patch_size=2,
        caption_channels=16,
        **more,
    )
    network = awake(network.eval(), head="proj_out")
    return getattr(diffusers, cls)(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=tiny_autoencoder(),
        transformer=listening(network, "attn2", "caption_projection"),
        scheduler=ddim(beta_schedule="linear"),
    )


def ddim(**more: Any) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(**SD_BETAS | {"clip_sample": False, "steps_offset": 1} | more)


def start(model: Model, n: int = N) -> Tensor:
    """The z that our run of sample 0 … n-1 begins with."""
    return normal(SEED, Purpose.PRIOR, torch.arange(n), 0, model.shape).float()


def pipeline_images(pipeline: Any, z: Tensor, monkeypatch: pytest.MonkeyPatch, **call: Any) -> Tensor:
    """The images of the pipeline itself for the prompts in ORDER, in [-1, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    module = sys.modules[type(pipeline).__module__]
    told: dict[str, Any] = {"latents": z.clone()}
    told |= {"prompt": [PROMPTS[i] for i in ORDER], "num_inference_steps": STEPS, "output_type": "np"}
    with monkeypatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *_, **__: z.clone(), raising=False)
        images = pipeline(**told | call).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


def our_images(model: Model, sampler: str, spacing: str | None, order: list[int] | None = None, **more: Any) -> Tensor:
    labels = torch.tensor(ORDER if order is None else order)
    return run_images(model, sampler, spacing, STEPS, len(labels), labels, seed=SEED, **more).clamp(-1, 1)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of images that are not all clipped."""
    assert a.shape == b.shape
    between = b.abs() < 0.999
    assert int(between.sum()) >= 100, "all is clipped, so there is nothing to compare"
    assert float(b[between].std()) > 0.05
    return float((a - b).abs().max())


def check_batches(model: Model, sampler: str, spacing: str | None, **more: Any) -> None:
    """An image depends neither on its batch nor on the prompts in it, and every evaluation is counted."""
    with Meter(model.network) as meter:
        whole = our_images(model, sampler, spacing, batch_size=3, **more)
    assert meter.network == 3 * 6 * 2
    assert difference(our_images(model, sampler, spacing, batch_size=1, **more), whole) <= 2e-5
    other = our_images(model, sampler, spacing, [2, 1, 0], **more)
    assert float((other[0] - whole[0]).abs().max()) <= 2e-5
    assert float((other[1] - whole[1]).abs().max()) > 1e-3, "the network does not depend on the prompt"
