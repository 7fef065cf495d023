"""FLUX.1: `FluxPipeline` checkpoints (Black Forest Labs 2024), guidance-distilled or timestep-distilled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplerbench.errors import UserError, argument
from samplerbench.limits import MAX_CHANNELS
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.fields import Fields
from samplerbench.models.flow_text import FlowAdapter, TextFlow, Wrapped, load_flow_text, pack, unpack
from samplerbench.models.model import Condition
from samplerbench.models.text_encoders import CLIP, T5, EncoderPart, Tensors, TextRecipe

TOKENS = 512
"""Maximum number of T5 tokens of a prompt, the default of diffusers."""
GUIDANCE = 3.5
"""Default guidance scale of a guidance-distilled network, as in diffusers."""
SIDE = 128
"""Side of the latents if no image size is given, as in diffusers."""


def _recipe(config: Fields) -> TextRecipe:
    """The hidden states of T5, and the pooled embedding of CLIP."""
    return TextRecipe(
        pipeline="FluxPipeline",
        parts=(
            EncoderPart("text_encoder", "tokenizer", ("CLIPTextModel",), CLIP),
            EncoderPart("text_encoder_2", "tokenizer_2", ("T5EncoderModel",), T5, TOKENS),
        ),
        encode=_encode,
        encode_null=lambda pipeline, negative, device: _encode(pipeline, [negative or ""], device),
        settings={"maximum tokens": TOKENS},
    )


def _encode(pipeline: Any, lines: list[str], device: torch.device) -> Tensors:
    text, pooled, _ = pipeline.encode_prompt(lines, None, device=device, max_sequence_length=TOKENS)
    return {"text": text, "pooled": pooled}


class PackedFlux(Wrapped):
    """A `FluxTransformer2DModel` whose arguments all have one row per sample, and whose latents are not packed."""

    def forward(self, y: Tensor, time: Tensor, text: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Return the velocity, (B, C, H, W).

        Args:
            y: latents, (B, C, H, W).
            time: times t in [0, 1], (B,).
            text: embeddings of T5, (B, L, d).
            pooled: pooled embeddings of CLIP, (B, p).
            guidance: guidance scales, (B,). None for a network without embedded guidance.
        """
        _, height, width = self.shape
        places = torch.zeros(height // 2, width // 2, 3, device=y.device, dtype=y.dtype)
        places[..., 1] += torch.arange(height // 2, device=y.device)[:, None]
        places[..., 2] += torch.arange(width // 2, device=y.device)[None, :]
        output = self.transformer(
            hidden_states=pack(y),
            timestep=time,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=y.device, dtype=y.dtype),
            img_ids=places.reshape(-1, 3),
            return_dict=False,
        )[0]
        return unpack(output, height, width)


@dataclass
class Flux(TextFlow):
    """A `FluxTransformer2DModel`. Its time input is t. Patches of 2x2 latents are one token.

    Classifier-free guidance with a negative prompt ("true CFG") is separate from the embedded guidance scale.

    Attributes:
        embedded_guidance: guidance scale that the network takes as an input. None for a network without it.
    """

    embedded_guidance: float | None = None

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        scale = None
        if self.embedded_guidance is not None:
            scale = torch.full((len(x),), self.embedded_guidance, device=x.device, dtype=self.state_dtype)
        output: Tensor = self.network(
            x.to(self.dtype), time.to(self.state_dtype), condition["text"], condition["pooled"], scale
        )
        return output


def embedded_guidance(checkpoint: Checkpoint, config: Fields) -> Mapping[str, Any]:
    """Return the field `embedded_guidance` of a model.

    Args:
        checkpoint: the opened pipeline.
        config: configuration of the transformer.

    Raises:
        UserError: if a guidance scale is given for a network without embedded guidance.
    """
    given = checkpoint.options.embedded_guidance
    if config.flag("guidance_embeds", False):
        return {"embedded_guidance": GUIDANCE if given is None else given}
    if given is not None:
        raise UserError(
            f"{argument('embedded_guidance', given)}: the network of {checkpoint.source} has no embedded guidance "
            f"(guidance_embeds is false); leave it out."
        )
    return {"embedded_guidance": None}


ADAPTER = FlowAdapter(
    network="FluxTransformer2DModel",
    model=Flux,
    recipe=_recipe,
    width="joint_attention_dim",
    patch=lambda config: 2,
    channels=lambda config: max(1, config.integer("in_channels", 4, MAX_CHANNELS) // 4),
    side=lambda config: (SIDE, SIDE),
    wrap=PackedFlux,
    fields=embedded_guidance,
)


def load_flux(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> TextFlow:
    """Load an opened `FluxPipeline`. See `load_flow_text`.

    Args:
        checkpoint: the opened pipeline.
        device: device of the network.
        dtype: dtype of the network's weights.
    """
    return load_flow_text(checkpoint, device, dtype, ADAPTER)
