"""Small random pipelines of rectified flows, each with the text embeddings that replace its text encoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor

from support.pipelines import seeded, tiny_autoencoder

N = 3
SIDE = 32
"""Height and width of the images. The latents have half of it, or less."""
DYNAMIC: dict[str, Any] = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}


def embeddings(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(seed))


def loud(make: Any) -> Any:
    """A random transformer whose output depends on everything: no layer starts at zero."""
    module = seeded(make)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1, generator=generator)
    return module


def flux_transformer(pooled: int = 8) -> FluxTransformer2DModel:
    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
    widths = {"in_channels": 16, "joint_attention_dim": 16, "pooled_projection_dim": pooled}
    return loud(lambda: FluxTransformer2DModel(patch_size=1, num_layers=1, num_single_layers=1, **sizes, **widths))


def tiny_flux(**scheduler: Any) -> tuple[FluxPipeline, dict[str, Any]]:
    """Packed latents; always passes `sigmas` and `mu`."""
    vae = tiny_autoencoder(scaling_factor=0.4, shift_factor=0.1)
    scheduler = {"use_dynamic_shifting": True} | scheduler
    pipeline = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(**scheduler), vae, None, None, None, None, flux_transformer()
    )
    call = {"prompt_embeds": embeddings(6, 16), "pooled_prompt_embeds": embeddings(8), "guidance_scale": 1.0}
    return pipeline, call


def sd3_transformer() -> SD3Transformer2DModel:
    sizes = {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16, "num_layers": 1}
    widths = {"in_channels": 4, "out_channels": 4, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    return loud(lambda: SD3Transformer2DModel(sample_size=8, patch_size=2, pos_embed_max_size=16, **sizes, **widths))


def tiny_sd3(**scheduler: Any) -> tuple[StableDiffusion3Pipeline, dict[str, Any]]:
    """Passes neither `sigmas` nor `mu` by default."""
    vae = tiny_autoencoder(scaling_factor=1.5, shift_factor=0.06)
    stock = FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler))
    pipeline = StableDiffusion3Pipeline(sd3_transformer(), stock, vae, None, None, None, None, None, None)
    call = {"prompt_embeds": embeddings(5, 32), "pooled_prompt_embeds": embeddings(32)}
    negative = {"negative_prompt_embeds": embeddings(5, 32, seed=3), "negative_pooled_prompt_embeds": embeddings(32)}
    return pipeline, call | negative | {"guidance_scale": 4.0}


def tiny_lumina2() -> tuple[Lumina2Pipeline, dict[str, Any]]:
    """The network is given 1 - t and returns -v."""
    transformer = loud(
        lambda: Lumina2Transformer2DModel(
            sample_size=4,
            in_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=2,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(128, 128, 128),
            cap_feat_dim=8,
        )
    )
    stock = FlowMatchEulerDiscreteScheduler(shift=6.0)
    pipeline = Lumina2Pipeline(transformer, stock, tiny_autoencoder(shift_factor=0.1), None, None)
    masks = {name: torch.ones(N, 5, dtype=torch.bool) for name in ("prompt", "negative_prompt")}
    call: dict[str, Any] = {f"{name}_attention_mask": mask for name, mask in masks.items()}
    return pipeline, call | {
        "prompt_embeds": embeddings(5, 8),
        "negative_prompt_embeds": embeddings(5, 8, seed=3),
        "guidance_scale": 4.0,
    }


def cogview4_transformer() -> CogView4Transformer2DModel:
    sizes = {"attention_head_dim": 8, "num_attention_heads": 2, "num_layers": 1, "rope_axes_dim": (16, 16)}
    widths = {"in_channels": 4, "out_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4}
    return loud(lambda: CogView4Transformer2DModel(patch_size=2, sample_size=8, **sizes, **widths))


def tiny_cogview4() -> tuple[CogView4Pipeline, dict[str, Any]]:
    """The network is given the time before the shift."""
    stock = FlowMatchEulerDiscreteScheduler(base_shift=0.25, max_shift=0.75, time_shift_type="linear", **DYNAMIC)
    pipeline = CogView4Pipeline(None, None, tiny_autoencoder(), cogview4_transformer(), stock)
    call = {"prompt_embeds": embeddings(16, 16), "negative_prompt_embeds": embeddings(16, 16, seed=3)}
    return pipeline, call | {"guidance_scale": 3.0}


def tiny_aura_flow() -> tuple[AuraFlowPipeline, dict[str, Any]]:
    sizes = {"attention_head_dim": 8, "num_attention_heads": 2, "num_mmdit_layers": 1, "num_single_dit_layers": 1}
    widths = {"joint_attention_dim": 16, "caption_projection_dim": 16, "pos_embed_max_size": 64}
    transformer = loud(lambda: AuraFlowTransformer2DModel(sample_size=8, in_channels=4, **sizes, **widths))
    stock = FlowMatchEulerDiscreteScheduler(shift=1.73)
    pipeline = AuraFlowPipeline(None, None, tiny_autoencoder(), transformer, stock)
    masks: dict[str, Any] = {
        "prompt_attention_mask": torch.ones(N, 6),
        "negative_prompt_attention_mask": torch.ones(N, 6),
    }
    call = {"prompt_embeds": embeddings(6, 16), "negative_prompt_embeds": embeddings(6, 16, seed=3)}
    return pipeline, call | masks | {"guidance_scale": 3.5}


def tiny_z_image() -> tuple[ZImagePipeline, dict[str, Any]]:
    """The network is given lists and 1 - t, and returns -v."""
    transformer = loud(
        lambda: ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            t_scale=1.0,  # with 1000, the rounding of the time to float32 is amplified
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        )
    )
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = ZImagePipeline(stock, tiny_autoencoder(shift_factor=0.1), None, None, transformer)
    call = {
        "prompt_embeds": list(embeddings(6, 16)),
        "negative_prompt_embeds": list(embeddings(6, 16, seed=3)),
        "guidance_scale": 3.0,
    }
    return pipeline, call


def tiny_sana() -> tuple[SanaPipeline, dict[str, Any]]:
    """Its scheduler is DPM-Solver++ in flow mode."""
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4, "sample_size": 8}
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8}
    transformer = loud(
        lambda: SanaTransformer2DModel(in_channels=4, out_channels=4, caption_channels=8, **sizes, **cross)
    )
    stock = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    blocks: dict[str, Any] = {"encoder_block_types": ("ResBlock",) * 2, "decoder_block_types": ("ResBlock",) * 2}
    widths = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
    depths = {f"{part}_layers_per_block": (1, 1) for part in ("encoder", "decoder")}
    blocks |= {f"{part}_qkv_multiscales": ((), ()) for part in ("encoder", "decoder")}
    vae = seeded(
        lambda: AutoencoderDC(latent_channels=4, attention_head_dim=2, scaling_factor=0.4, **blocks, **widths, **depths)
    )
    pipeline = SanaPipeline(None, None, vae, transformer, stock)
    masks: dict[str, Any] = {
        "prompt_attention_mask": torch.ones(N, 6),
        "negative_prompt_attention_mask": torch.ones(N, 6),
    }
    call = {"prompt_embeds": embeddings(6, 8), "negative_prompt_embeds": embeddings(6, 8, seed=3)}
    return pipeline, call | masks | {"guidance_scale": 4.5, "negative_prompt": None, "use_resolution_binning": False}


PIPELINES = {
    "flux": tiny_flux,
    "sd3": tiny_sd3,
    "lumina2": tiny_lumina2,
    "cogview4": tiny_cogview4,
    "aura-flow": tiny_aura_flow,
    "z-image": tiny_z_image,
    "sana": tiny_sana,
}
