"""Stable Diffusion 1 and 2: `StableDiffusionPipeline` checkpoints (Rombach et al. 2022).

Also `LatentConsistencyModelPipeline` checkpoints (Luo et al. 2023), whose network takes the guidance scale as an input.
"""

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
from samplerbench.models.guidance_embedding import embedded_guidance
from samplerbench.models.latent import load_autoencoder
from samplerbench.models.model import Condition
from samplerbench.models.text import TextModel, latent_size, load_text
from samplerbench.models.text_encoders import CLIP, EncoderPart, Tensors, TextRecipe, encoder_width
from samplerbench.sampling.process import VARIANCE_PRESERVING

_EXTRA = ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "num_class_embeds")
"""Settings of a UNet2DConditionModel for conditions other than text. They are not supported."""


def _encode(pipeline: Any, lines: list[str], device: torch.device) -> Tensors:
    return {"text": pipeline.encode_prompt(lines, device, 1, False)[0]}


RECIPE = TextRecipe(
    pipeline="StableDiffusionPipeline",
    parts=(EncoderPart("text_encoder", "tokenizer", ("CLIPTextModel",), CLIP),),
    encode=_encode,
    encode_null=lambda pipeline, negative, device: _encode(pipeline, [negative or ""], device),
    flags={"requires_safety_checker": False},
)
"""How Stable Diffusion 1 and 2 encode prompts: the last hidden states of CLIP."""


@dataclass
class StableDiffusion(TextModel, DiscreteVP):
    """A `UNet2DConditionModel` in latent space, conditioned on prompts.

    The unconditional prediction uses the negative prompt, or the empty prompt if there is none.

    Attributes:
        guidance_embedding: embedding of the guidance scale of a distilled network, (1, d). None for other networks.
    """

    guidance_embedding: Tensor | None = None

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        embedding = self.guidance_embedding
        scale = None if embedding is None else embedding.expand(len(x), -1)
        return self.network(x.to(self.dtype), time, encoder_hidden_states=condition["text"], timestep_cond=scale).sample


def load_stable_diffusion(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
    """Load the U-Net, autoencoder and text encoder of an opened pipeline, and encode the prompts.

    Args:
        checkpoint: the opened pipeline.
        device: device of the network.
        dtype: dtype of the network's weights.

    Raises:
        UserError: if prompts are missing (unless `options.show`), the network has conditions other than text, or its
            width differs from that of the text encoder. See also `Checkpoint.load`, `read_schedule`,
            `load_autoencoder` and `load_text`.
    """
    from diffusers import UNet2DConditionModel

    source, options = checkpoint.source, checkpoint.options
    checkpoint.require("unet", "UNet2DConditionModel")
    checkpoint.check_variant(["unet", "vae", "text_encoder"])
    config = checkpoint.fields("unet", UNet2DConditionModel)
    if extra := [name for name in _EXTRA if config.values.get(name) is not None]:
        raise UserError(f"{source}: conditions other than text are not supported ({', '.join(extra)}).")
    schedule = load_schedule(checkpoint)
    channels = config.integer("in_channels", 1, MAX_CHANNELS)
    size = latent_size(checkpoint, config.sides("sample_size"))
    width = config.integer("cross_attention_dim", 1, MAX_CHANNELS)
    text = load_text(checkpoint, RECIPE, device)
    check_clip_width(checkpoint, width)
    autoencoder, latent = load_autoencoder(checkpoint, "vae", channels, size, device, dtype)
    check_channels(source, config, schedule)
    scale, embedding = embedded_guidance(checkpoint, config)
    part = checkpoint.load("unet", UNet2DConditionModel, dtype, device)
    made = card_fields(checkpoint, part.module)
    made["notes"] |= text.notes
    return StableDiffusion(
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
        | ({} if options.image_size is None else {"image size": list(autoencoder.image_shape[1:])})
        | ({} if scale is None else {"embedded guidance": scale}),
        preconditioning=schedule.preconditioning,
        guidance_embedding=None if embedding is None else embedding.to(device, dtype),
        **text.fields(device, dtype),
        **made,
    )


def check_clip_width(checkpoint: Checkpoint, width: int) -> None:
    """Check that the text encoder has the width that the network requires.

    Args:
        checkpoint: the opened pipeline.
        width: `cross_attention_dim` of the network.

    Raises:
        UserError: if the widths differ.
    """
    known = encoder_width(checkpoint, "text_encoder")
    if known is not None and width != known:
        raise UserError(
            f"{checkpoint.source}: cross_attention_dim of the network is {width}, but the embeddings of the text "
            f"encoder have {known} channels."
        )
