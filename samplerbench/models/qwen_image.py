"""Qwen-Image: `QwenImagePipeline` checkpoints (Wu et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplerbench.limits import MAX_CHANNELS
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.fields import Fields
from samplerbench.models.flow_text import FlowAdapter, TextFlow, Wrapped, load_flow_text, pack, unpack
from samplerbench.models.flux import SIDE, embedded_guidance
from samplerbench.models.model import Condition
from samplerbench.models.text_encoders import QWEN, EncoderPart, Tensors, TextRecipe

TOKENS = 1024
"""Maximum number of tokens of a prompt, the default of diffusers."""


def _recipe(config: Fields) -> TextRecipe:
    """The last hidden states of Qwen2.5-VL for the prompt in a fixed template, with a mask. The template is cut off."""
    return TextRecipe(
        pipeline="QwenImagePipeline",
        parts=(
            EncoderPart(
                "text_encoder", "tokenizer", ("Qwen2_5_VLForConditionalGeneration",), QWEN, TOKENS, counted=_counted
            ),
        ),
        encode=_encode,
        encode_null=lambda pipeline, negative, device: _encode(pipeline, [negative or ""], device),
        settings={"maximum tokens": TOKENS},
    )


def _counted(tokenizer: Any, line: str) -> tuple[str, int]:
    return f"{line}<|im_end|>\n<|im_start|>assistant\n", TOKENS  # what follows the part that is cut off


def _encode(pipeline: Any, lines: list[str], device: torch.device) -> Tensors:
    text, mask = pipeline.encode_prompt(lines, device=device, max_sequence_length=TOKENS)
    if mask is None:  # no padding
        mask = torch.ones(text.shape[:2], dtype=torch.int64)
    return {"text": text, "mask": mask}


class PackedQwenImage(Wrapped):
    """A `QwenImageTransformer2DModel` whose arguments all have one row per sample, and whose latents are not packed."""

    def forward(self, y: Tensor, time: Tensor, text: Tensor, mask: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Return the velocity, (B, C, H, W).

        Args:
            y: latents, (B, C, H, W).
            time: times t in [0, 1], (B,).
            text: embeddings, (B, L, d).
            mask: 1 for tokens of the prompt and 0 for padding, (B, L).
            guidance: guidance scales, (B,). None for a network without embedded guidance.
        """
        _, height, width = self.shape
        output = self.transformer(
            hidden_states=pack(y),
            timestep=time,
            guidance=guidance,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(y),
            return_dict=False,
        )[0]
        return unpack(output, height, width)


@dataclass
class QwenImage(TextFlow):
    """A `QwenImageTransformer2DModel`. Its time input is t. Patches of 2x2 latents are one token.

    Attributes:
        embedded_guidance: guidance scale that the network takes as an input. None for a network without it.
    """

    embedded_guidance: float | None = None

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        scale = None
        if self.embedded_guidance is not None:
            scale = torch.full((len(x),), self.embedded_guidance, device=x.device, dtype=self.state_dtype)
        output: Tensor = self.network(
            x.to(self.dtype), time.to(self.state_dtype), condition["text"], condition["mask"], scale
        )
        return output


ADAPTER = FlowAdapter(
    network="QwenImageTransformer2DModel",
    model=QwenImage,
    recipe=_recipe,
    width="joint_attention_dim",
    patch=lambda config: 2,
    channels=lambda config: max(1, config.integer("in_channels", 4, MAX_CHANNELS) // 4),
    side=lambda config: (SIDE, SIDE),
    wrap=PackedQwenImage,
    fields=embedded_guidance,
)


def load_qwen_image(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> TextFlow:
    """Load an opened `QwenImagePipeline`. See `load_flow_text`.

    Args:
        checkpoint: the opened pipeline.
        device: device of the network.
        dtype: dtype of the network's weights.
    """
    return load_flow_text(checkpoint, device, dtype, ADAPTER)
