"""Small random text-to-image and class-to-image pipelines with their text encoders, to be saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    CogView4Pipeline,
    DDIMScheduler,
    DiTPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn

from support.flow_pipelines import flux_transformer, loud, sd3_transformer, tiny_cogview4, tiny_flux, tiny_sd3
from support.pipelines import SD_BETAS, save_tokenizer, seeded, tiny_autoencoder, tiny_transformer


def clip(projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53, "vocab_size": 54}
    config = CLIPTextConfig(max_position_embeddings=16, projection_dim=16, **sizes, **tokens)
    return seeded(lambda: (CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def tiny_sdxl(folder: Path) -> StableDiffusionXLPipeline:
    tokenizer = save_tokenizer(folder / "tokenizer-sdxl")
    unet = seeded(
        lambda: UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
        ),
        "conv_out",
    )
    for name, parameter in unet.named_parameters():  # an untrained network hardly depends on the text
        if "attn2" in name and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5)
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **SD_BETAS)
    encoders = (clip(False), clip(True))
    return StableDiffusionXLPipeline(tiny_autoencoder(), *encoders, tokenizer, tokenizer, unet, scheduler)


def tiny_sd3_with_text(folder: Path) -> StableDiffusion3Pipeline:
    made, _ = tiny_sd3()
    tokenizer = save_tokenizer(folder / "tokenizer-sd3")
    first, second = clip(True), clip(True)
    return StableDiffusion3Pipeline(
        sd3_transformer(), made.scheduler, made.vae, first, tokenizer, second, tokenizer, None, None
    )


def tiny_dit() -> DiTPipeline:
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **SD_BETAS)
    return DiTPipeline(tiny_transformer(), tiny_autoencoder(), scheduler)


def letters_tokenizer() -> Any:
    """A tokenizer of single letters, with one token at the start."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<unk>", "<sop>", " ", *"abcdefghijklmnopqrstuvwxyz"]
    words = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.post_processor = processors.TemplateProcessing(single="<sop> $A", special_tokens=[("<sop>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")


def tiny_cogview4_with_text() -> CogView4Pipeline:
    """Without an adapter of ours. It pads the prompts of a batch to the longest."""
    from transformers import GlmConfig, GlmModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GlmConfig(
        vocab_size=32, head_dim=8, num_key_value_heads=1, pad_token_id=0, max_position_embeddings=64, **sizes
    )
    made, _ = tiny_cogview4()
    encoder = loud(lambda: GlmModel(config))
    return CogView4Pipeline(letters_tokenizer(), encoder, made.vae, made.transformer, made.scheduler)


def tiny_flux_with_text(folder: Path) -> FluxPipeline:
    """Packed latents."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    made, _ = tiny_flux(base_image_seq_len=4, max_image_seq_len=256)
    encoder = loud(lambda: T5EncoderModel(config))
    tokenizer = save_tokenizer(folder / "tokenizer-flux")
    transformer = flux_transformer(pooled=16)
    return FluxPipeline(made.scheduler, made.vae, clip(False), tokenizer, encoder, letters_tokenizer(), transformer)


def save_stock_pipelines(root: Path) -> Path:
    """Save one folder of each, and a file of prompts of different lengths."""
    tiny_sdxl(root).save_pretrained(root / "sdxl")
    tiny_sd3_with_text(root).save_pretrained(root / "sd3")
    tiny_dit().save_pretrained(root / "dit")
    tiny_flux_with_text(root).save_pretrained(root / "flux")
    tiny_cogview4_with_text().save_pretrained(root / "cogview4")
    (root / "prompts.txt").write_text("a red cat\ntwo dogs on the grass beside it\nthe sea\n", "utf-8")
    return root
