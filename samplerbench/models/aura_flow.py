"""AuraFlow: `AuraFlowPipeline` checkpoints (Fal 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplerbench.limits import MAX_CHANNELS
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.fields import Fields
from samplerbench.models.flow_text import FlowAdapter, TextFlow, load_flow_text, patch_size
from samplerbench.models.model import Condition
from samplerbench.models.text_encoders import LLAMA, T5, EncoderPart, Tensors, TextRecipe

TOKENS = 256
"""Maximum number of tokens of a prompt, the default of diffusers."""


def _recipe(config: Fields) -> TextRecipe:
    """The hidden states of UMT5, which are zero at the padding."""
    return TextRecipe(
        pipeline="AuraFlowPipeline",
        parts=(EncoderPart("text_encoder", "tokenizer", ("UMT5EncoderModel",), (*LLAMA, *T5), TOKENS),),
        encode=_encode,
        encode_null=lambda pipeline, negative, device: _encode(pipeline, [negative or ""], device),
        settings={"maximum tokens": TOKENS},
    )


def _encode(pipeline: Any, lines: list[str], device: torch.device) -> Tensors:
    text, _, _, _ = pipeline.encode_prompt(
        lines, do_classifier_free_guidance=False, device=device, max_sequence_length=TOKENS
    )
    return {"text": text}


@dataclass
class AuraFlow(TextFlow):
    """An `AuraFlowTransformer2DModel`. Its time input is t."""

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(
            x.to(self.dtype), encoder_hidden_states=condition["text"], timestep=time.to(self.state_dtype)
        ).sample


ADAPTER = FlowAdapter(
    network="AuraFlowTransformer2DModel",
    model=AuraFlow,
    recipe=_recipe,
    width="joint_attention_dim",
    patch=patch_size,
    positions=lambda config: math.isqrt(config.integer("pos_embed_max_size", 1, MAX_CHANNELS**2)),
)


def load_aura_flow(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> TextFlow:
    """Load an opened `AuraFlowPipeline`. See `load_flow_text`.

    Args:
        checkpoint: the opened pipeline.
        device: device of the network.
        dtype: dtype of the network's weights.
    """
    return load_flow_text(checkpoint, device, dtype, ADAPTER)
