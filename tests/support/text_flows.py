"""Small random text-to-image rectified flows of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler
from support.pipelines import save_tokenizer, seeded, tiny_autoencoder
from support.text_pipelines import LETTERS, awake, clip, listening, t5, t5_tokenizer
from torch import nn
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}


def sd3(root: Path, with_t5: bool = True) -> diffusers.StableDiffusion3Pipeline:
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=12 + 8,
        out_channels=4,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    network = awake(network.eval(), std=0.2, head="proj_out", head_std=0.4)
    return diffusers.StableDiffusion3Pipeline(
        transformer=listening(network, "context", "add_"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_autoencoder(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clip(16, 12),
        tokenizer=save_tokenizer(root / "made0"),
        text_encoder_2=clip(24, 8),
        tokenizer_2=save_tokenizer(root / "made1"),
        text_encoder_3=t5(48) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )


def flux(root: Path, guidance_embeds: bool) -> diffusers.FluxPipeline:
    network = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    network = awake(network.eval(), std=0.2, head="proj_out", head_std=0.3)
    return diffusers.FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **DYNAMIC if guidance_embeds else {}),
        vae=tiny_autoencoder(scaling_factor=0.4, shift_factor=0.1),
        text_encoder=clip(16),
        tokenizer=save_tokenizer(root / "made0"),
        text_encoder_2=t5(32),
        tokenizer_2=t5_tokenizer(),
        transformer=listening(network, "context_embedder", "text_embedder", std=0.3),
    )


def gemma_tokenizer() -> GemmaTokenizer:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS, "\n"]
    return GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def gemma(width: int = 16) -> nn.Module:
    config = Gemma2Config(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
    )
    return listening(seeded(lambda: Gemma2Model(config)), "proj", std=0.2)


def sana() -> diffusers.SanaPipeline:
    network = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        patch_size=1,
        timestep_scale=0.5,
    )
    network = awake(network.eval(), std=0.2, head="proj_out", head_std=0.2)
    blocks: dict[str, Any] = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    for half in ("encoder", "decoder"):
        blocks |= {f"{half}_block_out_channels": (8, 8), f"{half}_layers_per_block": (1, 1)}
        blocks |= {f"{half}_qkv_multiscales": ((), ())}
    vae = seeded(lambda: diffusers.AutoencoderDC(latent_channels=4, scaling_factor=0.4, **blocks))
    nn.init.normal_(vae.decoder.conv_out.weight, std=0.1)
    return diffusers.SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma(),
        vae=vae,
        transformer=listening(network, "attn2", "caption_projection"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
