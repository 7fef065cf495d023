"""Lumina-Image 2.0: `Lumina2Pipeline` checkpoints (Qin et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.fields import Fields
from samplerbench.models.flow_text import FlowAdapter, TextFlow, load_flow_text, patch_size
from samplerbench.models.model import Condition
from samplerbench.models.text_encoders import GEMMA, EncoderPart, Tensors, TextRecipe

TOKENS = 256
"""Maximum number of tokens of a prompt with its instruction, the default of diffusers."""
INSTRUCTION = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts."
)
"""The default `system_prompt` of the pipeline."""
START = " <Prompt Start> "
"""What the pipeline writes between the instruction and the prompt."""


def _recipe(config: Fields) -> TextRecipe:
    """The second-to-last hidden states of Gemma 2 for an instruction and the prompt, with a mask.

    The negative prompt has no instruction.
    """
    return TextRecipe(
        pipeline="Lumina2Pipeline",
        parts=(
            EncoderPart(
                "text_encoder",
                "tokenizer",
                ("Gemma2Model",),
                GEMMA,
                TOKENS,
                counted=lambda tokenizer, line: (INSTRUCTION + START + line, TOKENS),
            ),
        ),
        encode=_encode,
        encode_null=_encode_null,
        settings={"maximum tokens": TOKENS, "instruction": INSTRUCTION},
    )


def _encode(pipeline: Any, lines: list[str], device: torch.device) -> Tensors:
    text, mask, _, _ = pipeline.encode_prompt(
        lines, False, device=device, system_prompt=INSTRUCTION, max_sequence_length=TOKENS
    )
    return {"text": text, "mask": mask}


def _encode_null(pipeline: Any, negative: str | None, device: torch.device) -> Tensors:
    # Only as a negative prompt is it encoded without the instruction.
    _, _, text, mask = pipeline.encode_prompt(
        [""], True, negative_prompt=[negative or ""], device=device, max_sequence_length=TOKENS
    )
    return {"text": text, "mask": mask}


@dataclass
class Lumina2(TextFlow):
    """A `Lumina2Transformer2DModel`. Its time input is 1 - t, and its output is -v."""

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        output = self.network(
            hidden_states=x.to(self.dtype),
            timestep=(1 - time).to(self.state_dtype),
            encoder_hidden_states=condition["text"],
            encoder_attention_mask=condition["mask"],
        ).sample
        return -output


ADAPTER = FlowAdapter(
    network="Lumina2Transformer2DModel",
    model=Lumina2,
    recipe=_recipe,
    width="cap_feat_dim",
    patch=patch_size,
    # diffusers computes a dynamic shift from the number of channels, not of tokens. Published checkpoints have none.
    tokens=lambda shape, patch: shape[0],
)


def load_lumina2(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> TextFlow:
    """Load an opened `Lumina2Pipeline`. See `load_flow_text`.

    Args:
        checkpoint: the opened pipeline.
        device: device of the network.
        dtype: dtype of the network's weights.
    """
    return load_flow_text(checkpoint, device, dtype, ADAPTER)
