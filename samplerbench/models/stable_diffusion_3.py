"""Stable Diffusion 3: `StableDiffusion3Pipeline` checkpoints (Esser et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplerbench.limits import MAX_CHANNELS
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.fields import Fields
from samplerbench.models.flow_text import FlowAdapter, TextFlow, load_flow_text, patch_size
from samplerbench.models.model import Condition
from samplerbench.models.text_encoders import CLIP, T5, EncoderPart, Tensors, TextRecipe

TOKENS = 256
"""Maximum number of T5 tokens of a prompt, the default of diffusers."""


def _recipe(config: Fields) -> TextRecipe:
    """The hidden states of two CLIPs and of T5, and a pooled embedding. Without T5, zeros take its place."""
    return TextRecipe(
        pipeline="StableDiffusion3Pipeline",
        parts=(
            EncoderPart("text_encoder", "tokenizer", ("CLIPTextModelWithProjection",), CLIP),
            EncoderPart("text_encoder_2", "tokenizer_2", ("CLIPTextModelWithProjection",), CLIP),
            EncoderPart("text_encoder_3", "tokenizer_3", ("T5EncoderModel",), T5, TOKENS, optional=True),
        ),
        encode=_encode,
        encode_null=lambda pipeline, negative, device: _encode(pipeline, [negative or ""], device),
        settings={"maximum tokens": TOKENS},
        config={"joint_attention_dim": config.integer("joint_attention_dim", 1, MAX_CHANNELS), "sample_size": 1}
        | {"patch_size": 1},
    )


def _encode(pipeline: Any, lines: list[str], device: torch.device) -> Tensors:
    text, _, pooled, _ = pipeline.encode_prompt(
        lines, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=TOKENS
    )
    return {"text": text, "pooled": pooled}


@dataclass
class StableDiffusion3(TextFlow):
    """An `SD3Transformer2DModel`. Its time input is 1000 t."""

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(
            hidden_states=x.to(self.dtype),
            timestep=(1000 * time).to(self.state_dtype),
            encoder_hidden_states=condition["text"],
            pooled_projections=condition["pooled"],
        ).sample


ADAPTER = FlowAdapter(
    network="SD3Transformer2DModel",
    model=StableDiffusion3,
    recipe=_recipe,
    width="joint_attention_dim",
    patch=patch_size,
    positions=lambda config: config.integer("pos_embed_max_size", 1, MAX_CHANNELS),
)


def load_stable_diffusion_3(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> TextFlow:
    """Load an opened `StableDiffusion3Pipeline`. The T5 encoder is optional. See `load_flow_text`.

    Args:
        checkpoint: the opened pipeline.
        device: device of the network.
        dtype: dtype of the network's weights.
    """
    return load_flow_text(checkpoint, device, dtype, ADAPTER)
