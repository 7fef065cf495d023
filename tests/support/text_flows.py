"""Small random text-to-image rectified flows of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlamaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from support.pipelines import save_tokenizer, seeded, tiny_autoencoder
from support.text_pipelines import LETTERS, awake, clip, listening, t5, t5_tokenizer

DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}


def sd3(root: Path, with_t5: bool = True) -> diffusers.StableDiffusion3Pipeline:
    torch.manual_seed(0)
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
    torch.manual_seed(0)
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
    torch.manual_seed(0)
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


def llama_tokenizer() -> LlamaTokenizer:
    words = ["<unk>", "<s>", "</s>", "<pad>", "▁", *LETTERS]
    return LlamaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], pad_token="<pad>")


def umt5(width: int = 16) -> nn.Module:
    config = UMT5Config(vocab_size=128, d_model=width, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    return listening(seeded(lambda: UMT5EncoderModel(config)), "Attention", "DenseReluDense", std=0.2)


def aura_flow() -> diffusers.AuraFlowPipeline:
    torch.manual_seed(0)
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    network = awake(network.eval(), std=0.15, head="proj_out", head_std=0.3)
    return diffusers.AuraFlowPipeline(
        tokenizer=llama_tokenizer(),
        text_encoder=umt5(),
        vae=tiny_autoencoder(scaling_factor=0.6),
        transformer=listening(network, "context_embedder", std=1.0),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def lumina2() -> diffusers.Lumina2Pipeline:
    torch.manual_seed(0)
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 32, 32),
        cap_feat_dim=16,
    )
    network = awake(network.eval(), std=0.2, head="norm_out.linear_2", head_std=0.4)
    return diffusers.Lumina2Pipeline(
        transformer=listening(network, "caption_embedder", std=0.5),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=tiny_autoencoder(scaling_factor=0.4, shift_factor=0.1),
        text_encoder=gemma(),
        tokenizer=gemma_tokenizer(),
    )


def qwen_tokenizer() -> Qwen2Tokenizer:
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", "Ċ", *LETTERS]
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


QWEN_TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
}


def qwen_image() -> diffusers.QwenImagePipeline:
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(
        text_config=QWEN_TEXT | {"rope_scaling": rope, "rope_parameters": rope}, vision_config=vision
    )
    encoder = listening(seeded(lambda: Qwen2_5_VLForConditionalGeneration(config)), "language_model", "proj", std=0.2)
    torch.manual_seed(0)
    network = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    network = awake(network.eval(), std=0.2, head="proj_out", head_std=0.3)
    vae = seeded(
        lambda: diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 2.0, 0.5, 1.0],
        )
    )
    return diffusers.QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC, shift_terminal=0.02),
        vae=vae,
        text_encoder=encoder,
        tokenizer=qwen_tokenizer(),
        transformer=listening(network, "txt_in", std=0.5),
    )


def z_image() -> diffusers.ZImagePipeline:
    torch.manual_seed(0)
    network = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 4, 8],
        axes_lens=[512, 32, 32],
    )
    network = awake(network.eval(), std=0.1)
    # diffusers rounds the time to float32, which a network that listens to it strongly would amplify.
    network = listening(network, "t_embedder", "adaLN", std=0.02)
    encoder = seeded(lambda: Qwen3Model(Qwen3Config(**QWEN_TEXT, head_dim=8)))
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return diffusers.ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_autoencoder(scaling_factor=0.4, shift_factor=0.1),
        text_encoder=listening(encoder, "proj", std=0.2),
        tokenizer=tokenizer,
        transformer=listening(network, "cap_embedder", std=0.5),
    )


TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is "
    "defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
"""A chat template in the manner of Qwen3, for messages with a role and a content."""
