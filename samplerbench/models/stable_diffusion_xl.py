"""Stable Diffusion XL: `StableDiffusionXLPipeline` checkpoints (Podell et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.limits import MAX_CHANNELS
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.diffusers_unet import card_fields, check_channels, identity_of, load_schedule
from samplerbench.models.discrete import DiscreteVP
from samplerbench.models.fields import Fields
from samplerbench.models.latent import load_autoencoder
from samplerbench.models.model import Condition
from samplerbench.models.preconditioning import DISCRETE
from samplerbench.models.text import TextModel, latent_size, load_text
from samplerbench.models.text_encoders import CLIP, EncoderPart, Tensors, TextRecipe
from samplerbench.sampling.process import VARIANCE_PRESERVING

_EXTRA = ("class_embed_type", "time_cond_proj_dim", "encoder_hid_dim_type", "num_class_embeds")
"""Settings of a UNet2DConditionModel for further conditions. They are not supported."""
TIME_IDS = 6
"""Number of micro-conditions: original size, coordinates of the crop, and target size, (H, W) each."""


def recipe(force_zeros: bool) -> TextRecipe:
    """How Stable Diffusion XL encodes prompts: the second-to-last hidden states of two CLIPs, and a pooled embedding.

    Args:
        force_zeros: whether the embeddings are zeros where no negative prompt is given
            (`force_zeros_for_empty_prompt`).
    """
    return TextRecipe(
        pipeline="StableDiffusionXLPipeline",
        parts=(
            EncoderPart("text_encoder", "tokenizer", ("CLIPTextModel",), CLIP),
            EncoderPart("text_encoder_2", "tokenizer_2", ("CLIPTextModelWithProjection",), CLIP),
        ),
        encode=_encode,
        encode_null=_encode_null,
        flags={"force_zeros_for_empty_prompt": force_zeros, "add_watermarker": False},
    )


def _encode(pipeline: Any, lines: list[str], device: torch.device) -> Tensors:
    text, _, pooled, _ = pipeline.encode_prompt(lines, device=device, do_classifier_free_guidance=False)
    return {"text": text, "pooled": pooled}


def _encode_null(pipeline: Any, negative: str | None, device: torch.device) -> Tensors:
    _, text, _, pooled = pipeline.encode_prompt("", device=device, negative_prompt=negative)
    return {"text": text, "pooled": pooled}


@dataclass
class StableDiffusionXL(TextModel, DiscreteVP):
    """A `UNet2DConditionModel` in latent space, conditioned on prompts, a pooled embedding and the size of the images.

    The micro-conditions are (H, W, 0, 0, H, W) for images of the size (H, W): not scaled, and not cropped (Podell et
    al. 2023, section 2.2). The unconditional prediction has the same.
    """

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        _, height, width = self.image_shape
        sizes = torch.tensor([height, width, 0, 0, height, width], device=x.device, dtype=self.dtype)
        added = {"text_embeds": condition["pooled"], "time_ids": sizes.expand(len(x), -1)}
        return self.network(
            x.to(self.dtype), time, encoder_hidden_states=condition["text"], added_cond_kwargs=added
        ).sample


def load_stable_diffusion_xl(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> StableDiffusionXL:
    """Load the network, autoencoder and text encoders of an opened `StableDiffusionXLPipeline`.

    Args:
        checkpoint: the opened pipeline.
        device: device of the network.
        dtype: dtype of the network's weights.

    Raises:
        UserError: if prompts are missing (unless `options.show`), the pipeline is a refiner, the network has conditions
            other than text and size, or a width differs from that of the text encoders. See also `Checkpoint.load`,
            `read_schedule`, `load_autoencoder` and `load_text`.
    """
    from diffusers import UNet2DConditionModel

    source, options = checkpoint.source, checkpoint.options
    checkpoint.require("unet", "UNet2DConditionModel")
    checkpoint.check_variant(["unet", "vae", "text_encoder", "text_encoder_2"])
    if checkpoint.kind("text_encoder") == "missing":
        raise UserError(
            f"{source} has no text_encoder: it is a refiner, which continues from the images of a base model. Refiners "
            "are not supported; use the base model."
        )
    config = checkpoint.fields("unet", UNet2DConditionModel)
    if extra := [name for name in _EXTRA if config.values.get(name) is not None]:
        raise UserError(f"{source}: conditions other than text and size are not supported ({', '.join(extra)}).")
    if config.values.get("addition_embed_type") != "text_time":
        raise config.refusal("addition_embed_type", config.values.get("addition_embed_type"), '"text_time"')
    schedule = load_schedule(checkpoint)
    channels = check_channels(source, config, schedule)
    size = latent_size(checkpoint, config.sides("sample_size"))
    width = config.integer("cross_attention_dim", 1, MAX_CHANNELS)
    index = Fields(checkpoint.index, f"{source}: model_index.json")
    force_zeros = index.flag("force_zeros_for_empty_prompt", True)
    text = load_text(checkpoint, recipe(force_zeros), device)
    text.check_width(width, "cross_attention_dim")
    joint = config.integer("projection_class_embeddings_input_dim", 1, MAX_CHANNELS)
    sizes = TIME_IDS * config.integer("addition_time_embed_dim", 1, MAX_CHANNELS)
    text.check_width(
        joint - sizes, "projection_class_embeddings_input_dim without the embeddings of six sizes", "pooled"
    )
    autoencoder, latent = load_autoencoder(checkpoint, "vae", channels, size, device, dtype)
    part = checkpoint.load("unet", UNet2DConditionModel, dtype, device)
    made = card_fields(checkpoint, part.module)
    made["notes"] |= text.notes
    return StableDiffusionXL(
        network=part.module,
        shape=(channels, *size),
        levels=schedule.levels,
        process=VARIANCE_PRESERVING,
        device=device,
        dtype=dtype,
        autoencoder=autoencoder,
        clip=schedule.clip,
        clip_range=schedule.clip_range,
        learned_variance=schedule.variance == "learned_range",
        doubled=schedule.doubled,
        identity=identity_of(checkpoint, part.sha256)
        | schedule.identity
        | latent
        | text.identity(options.negative_prompt)
        # Without a negative prompt, its embeddings are zeros; those of an empty one are not.
        | {"negative embeddings of zeros": force_zeros and options.negative_prompt is None}
        | {"image size": list(autoencoder.image_shape[1:])},
        preconditioning=DISCRETE[schedule.prediction],
        **text.fields(device, dtype),
        **made,
    )
