"""PixArt-α and PixArt-Σ: `PixArtAlphaPipeline` and `PixArtSigmaPipeline` checkpoints (Chen et al. 2023, 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.limits import MAX_CHANNELS
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.diffusers_unet import card_fields, identity_of, load_schedule
from samplerbench.models.discrete import DiscreteVP
from samplerbench.models.latent import load_autoencoder
from samplerbench.models.model import Condition
from samplerbench.models.preconditioning import DISCRETE
from samplerbench.models.text import TextModel, latent_size, load_text
from samplerbench.models.text_encoders import T5, EncoderPart, Tensors, TextRecipe
from samplerbench.sampling.process import VARIANCE_PRESERVING

LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""Maximum number of tokens of a prompt, for each pipeline class."""
SIZED = 128
"""`sample_size` of the PixArt-α networks that are conditioned on the size and the aspect ratio of the images."""


def recipe(pipeline: str) -> TextRecipe:
    """How PixArt encodes prompts: the hidden states of T5, with a mask.

    As in a call of the pipeline, captions are cleaned if the packages bs4 and ftfy are installed. Otherwise they are
    only stripped and converted to lower case. The protocol records which of them.

    Args:
        pipeline: class name of the pipeline.
    """
    from diffusers.utils import is_bs4_available, is_ftfy_available

    length, clean = LENGTHS[pipeline], is_bs4_available() and is_ftfy_available()

    def encode(pipe: Any, lines: list[str], device: torch.device) -> Tensors:
        text, mask, _, _ = pipe.encode_prompt(
            lines, do_classifier_free_guidance=False, device=device, clean_caption=clean, max_sequence_length=length
        )
        return {"text": text, "mask": mask}

    return TextRecipe(
        pipeline=pipeline,
        parts=(EncoderPart("text_encoder", "tokenizer", ("T5EncoderModel",), T5, length),),
        encode=encode,
        encode_null=lambda pipe, negative, device: encode(pipe, [negative or ""], device),
        settings={"maximum tokens": length, "captions cleaned": clean},
    )


@dataclass
class PixArt(TextModel, DiscreteVP):
    """A `PixArtTransformer2DModel` in latent space, conditioned on prompts.

    The second half of the output channels is dropped, as in diffusers.

    Attributes:
        sized: whether the network is also conditioned on the size and the aspect ratio of the images.
    """

    sized: bool = False

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.sized:
            _, height, width = self.image_shape
            size = torch.tensor([height, width], device=x.device, dtype=self.dtype)
            added["resolution"] = size.expand(len(x), -1)
            added["aspect_ratio"] = size.new_full((len(x), 1), height / width)
        return self.network(
            x.to(self.dtype),
            encoder_hidden_states=condition["text"],
            encoder_attention_mask=condition["mask"],
            timestep=time,
            added_cond_kwargs=added,
        ).sample


def load_pixart(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> PixArt:
    """Load the transformer, autoencoder and text encoder of an opened `PixArtAlphaPipeline` or `PixArtSigmaPipeline`.

    Args:
        checkpoint: the opened pipeline.
        device: device of the network.
        dtype: dtype of the network's weights.

    Raises:
        UserError: if prompts are missing (unless `options.show`), or the parts do not fit together. See also
            `Checkpoint.load`, `read_schedule`, `load_autoencoder` and `load_text`.
    """
    from diffusers import PixArtTransformer2DModel

    source, options = checkpoint.source, checkpoint.options
    # Checkpoints created before diffusers 0.28 use the former class name, Transformer2DModel.
    checkpoint.require("transformer", "PixArtTransformer2DModel", "Transformer2DModel")
    checkpoint.check_variant(["transformer", "vae", "text_encoder"])
    config = checkpoint.fields("transformer", PixArtTransformer2DModel)
    schedule = load_schedule(checkpoint)
    channels = config.integer("in_channels", 1, MAX_CHANNELS)
    out = config.integer("out_channels", 1, MAX_CHANNELS, channels)
    if out not in (channels, 2 * channels):
        raise UserError(
            f"{source}: the network has {out} output channels for {channels} input channels; it must have {channels}, "
            f"or {2 * channels} with a variance."
        )
    native = config.sides("sample_size")
    size = latent_size(checkpoint, native, config.integer("patch_size", 1, MAX_CHANNELS))
    alpha = checkpoint.pipeline == "PixArtAlphaPipeline"
    text = load_text(checkpoint, recipe(checkpoint.pipeline), device)
    text.check_width(config.integer("caption_channels", 1, MAX_CHANNELS), "caption_channels")
    autoencoder, latent = load_autoencoder(checkpoint, "vae", channels, size, device, dtype)
    part = checkpoint.load("transformer", PixArtTransformer2DModel, dtype, device)
    made = card_fields(checkpoint, part.module)
    made["notes"] |= text.notes
    return PixArt(
        network=part.module,
        shape=(channels, *size),
        levels=schedule.levels,
        process=VARIANCE_PRESERVING,
        device=device,
        dtype=dtype,
        autoencoder=autoencoder,
        clip=schedule.clip,
        clip_range=schedule.clip_range,
        doubled=out == 2 * channels,
        identity=identity_of(checkpoint, part.sha256)
        | schedule.identity
        | latent
        | text.identity(options.negative_prompt)
        | {"image size": list(autoencoder.image_shape[1:])},
        preconditioning=DISCRETE[schedule.prediction],
        sized=alpha and native == (SIZED, SIZED),
        **text.fields(device, dtype),
        **made,
    )
