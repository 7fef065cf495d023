"""Text-to-image rectified flows: what the loaders of their transformers have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from samplerbench.errors import UserError, argument
from samplerbench.limits import MAX_CHANNELS
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.diffusers_unet import card_fields, identity_of
from samplerbench.models.fields import Fields
from samplerbench.models.flow import RectifiedFlow, flow_fields, flow_identity, read_flow_schedule
from samplerbench.models.latent import beside_flow, load_autoencoder
from samplerbench.models.text import TextModel, latent_size, load_text
from samplerbench.models.text_encoders import TextRecipe


@dataclass
class TextFlow(TextModel, RectifiedFlow):
    """A rectified flow in latent space, conditioned on prompts. `ask` is given y and t in [0, 1], and returns v."""


@dataclass(frozen=True)
class FlowAdapter:
    """A transformer of diffusers as a text-to-image rectified flow.

    Attributes:
        network: class name of the transformer.
        model: class of the model.
        recipe: how prompts are encoded, as a function of the configuration of the transformer.
        width: key of the configuration with the width of the text embeddings.
        patch: side of a patch of latents, as a function of the configuration.
        channels: number of channels of the latents, as a function of the configuration.
        side: side of the latents if the user gives no image size, as a function of the configuration.
        tokens: number of tokens for the dynamic shift, as a function of the shape of the latents and the patch.
        doubled: whether the output may have twice as many channels, of which the second half is dropped.
        wrap: function of the loaded transformer, the shape of the latents and the patch that returns the network. None
            for the transformer itself.
        positions: largest side of the latents in patches, as a function of the configuration. None for no limit.
        fields: further fields of the model, as a function of the checkpoint and the configuration of the transformer.
    """

    network: str
    model: type[TextFlow]
    recipe: Callable[[Fields], TextRecipe]
    width: str
    patch: Callable[[Fields], int]
    channels: Callable[[Fields], int] = lambda config: config.integer("in_channels", 1, MAX_CHANNELS)
    side: Callable[[Fields], tuple[int, int]] = lambda config: config.sides("sample_size")
    tokens: Callable[[tuple[int, int, int], int], int] = lambda shape, patch: (shape[1] // patch) * (shape[2] // patch)
    doubled: bool = False
    wrap: Callable[[Any, tuple[int, int, int]], nn.Module] | None = None
    positions: Callable[[Fields], int] | None = None
    fields: Callable[[Checkpoint, Fields], Mapping[str, Any]] = field(default=lambda checkpoint, config: {})


def load_flow_text(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, adapter: FlowAdapter) -> TextFlow:
    """Load the transformer, autoencoder and text encoders of an opened pipeline, and encode the prompts.

    Args:
        checkpoint: the opened pipeline.
        device: device of the network.
        dtype: dtype of the network's weights.
        adapter: the transformer.

    Raises:
        UserError: if prompts are missing (unless `options.show`), or the parts do not fit together. See also
            `Checkpoint.load`, `read_flow_schedule`, `load_autoencoder` and `load_text`.
    """
    import diffusers

    source, options = checkpoint.source, checkpoint.options
    cls = getattr(diffusers, adapter.network)
    checkpoint.require("transformer", adapter.network)
    config = checkpoint.fields("transformer", cls)
    recipe = adapter.recipe(config)
    checkpoint.check_variant(["transformer", "vae", *(part.encoder for part in recipe.parts)])
    schedule = read_flow_schedule(
        checkpoint.kind("scheduler"), checkpoint.config("scheduler", file="scheduler_config.json"), source
    )
    channels, patch = adapter.channels(config), adapter.patch(config)
    size = latent_size(checkpoint, adapter.side(config), patch)
    shape = (channels, *size)
    schedule = replace(schedule, tokens=adapter.tokens(shape, patch))
    doubled = adapter.doubled and config.values.get("out_channels") == 2 * channels
    made = dict(adapter.fields(checkpoint, config))
    text = load_text(checkpoint, recipe, device)
    text.check_width(config.integer(adapter.width, 1, MAX_CHANNELS), adapter.width)
    if "pooled_projection_dim" in config.values:
        text.check_width(config.integer("pooled_projection_dim", 1, MAX_CHANNELS), "pooled_projection_dim", "pooled")
    autoencoder, latent = load_autoencoder(checkpoint, "vae", channels, size, device, dtype)
    if any(side % patch for side in size):
        raise UserError(f"{source}: latents of {size[0]}x{size[1]} cannot be divided into patches of {patch}x{patch}.")
    if adapter.positions is not None and max(size) > (most := patch * adapter.positions(config)):
        raise UserError(
            f"{source}: its transformer has positional embeddings for latents of at most {most}x{most} "
            f"(pos_embed_max_size), but they are {size[0]}x{size[1]}; use a smaller {argument('image_size')}."
        )
    part = checkpoint.load("transformer", cls, dtype, device)
    card = card_fields(checkpoint, part.module)
    card["notes"] |= text.notes
    return adapter.model(
        network=part.module if adapter.wrap is None else adapter.wrap(part.module, shape),
        shape=shape,
        device=device,
        dtype=dtype,
        autoencoder=autoencoder,
        doubled=doubled,
        identity=identity_of(checkpoint, part.sha256)
        | flow_identity(schedule)
        | beside_flow(latent)
        | text.identity(options.negative_prompt)
        | {"image size": list(autoencoder.image_shape[1:])}
        | {key.replace("_", " "): value for key, value in made.items()},
        **flow_fields(schedule),
        **text.fields(device, dtype),
        **made,
        **card,
    )


class Wrapped(nn.Module):
    """Base class of modules around a transformer whose own arguments are not all tensors with one row per sample.

    Args:
        transformer: the transformer.
        shape: shape (C, H, W) of the latents.
    """

    def __init__(self, transformer: nn.Module, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.transformer, self.shape = transformer, shape


def patch_size(config: Fields) -> int:
    """Return the side of a patch of latents, `patch_size` of the configuration."""
    return config.integer("patch_size", 1, MAX_CHANNELS)


def pack(y: torch.Tensor) -> torch.Tensor:
    """Pack patches of 2x2 latents into tokens.

    Args:
        y: latents, (B, C, H, W).

    Returns:
        Tokens, (B, H/2·W/2, 4C). The channels of a token are ordered as (channel, row, column).
    """
    rows, channels, height, width = y.shape
    y = y.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return y.reshape(rows, (height // 2) * (width // 2), 4 * channels)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Unpack tokens into latents, the inverse of `pack`.

    Args:
        tokens: tokens, (B, H/2·W/2, 4C).
        height: height H of the latents.
        width: width W of the latents.

    Returns:
        Latents, (B, C, H, W).
    """
    rows, _, channels = tokens.shape
    y = tokens.reshape(rows, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return y.reshape(rows, channels // 4, height, width)
