"""Sana: `SanaPipeline` checkpoints (Xie et al. 2024)."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.fields import Fields
from samplerbench.models.flow_text import FlowAdapter, TextFlow, load_flow_text, patch_size
from samplerbench.models.model import Condition
from samplerbench.models.text_encoders import GEMMA, EncoderPart, Tensors, TextRecipe

TOKENS = 300
"""Maximum number of tokens of a prompt, the default of diffusers."""


def _recipe(config: Fields) -> TextRecipe:
    """The last hidden states of Gemma 2 for an instruction and the prompt, with a mask.

    The instruction is the default of the pipeline's call. The negative prompt has no instruction.
    """
    from diffusers import SanaPipeline

    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    prefix = "\n".join(instruction)

    def counted(tokenizer: Any, line: str) -> tuple[str, int]:
        return prefix + line.lower().strip(), len(tokenizer.encode(prefix)) + TOKENS - 2

    def encode(pipeline: Any, lines: list[str], device: torch.device) -> Tensors:
        text, mask, _, _ = pipeline.encode_prompt(
            lines, False, device=device, max_sequence_length=TOKENS, complex_human_instruction=instruction
        )
        return {"text": text, "mask": mask}

    def encode_null(pipeline: Any, negative: str | None, device: torch.device) -> Tensors:
        # Only as a negative prompt is it encoded without the instruction.
        _, _, text, mask = pipeline.encode_prompt(
            [""], True, negative_prompt=negative or "", device=device, max_sequence_length=TOKENS
        )
        return {"text": text, "mask": mask}

    return TextRecipe(
        pipeline="SanaPipeline",
        parts=(EncoderPart("text_encoder", "tokenizer", ("Gemma2Model",), GEMMA, TOKENS, counted=counted),),
        encode=encode,
        encode_null=encode_null,
        settings={"maximum tokens": TOKENS, "instruction": prefix},
    )


@dataclass
class Sana(TextFlow):
    """A `SanaTransformer2DModel` in the latent space of an `AutoencoderDC`.

    Its time input is 1000 t · `timestep_scale`. If the output has twice as many channels, the second half is dropped.

    Attributes:
        timestep_scale: `timestep_scale` of the configuration.
    """

    timestep_scale: float = 1.0

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(
            x.to(self.dtype),
            encoder_hidden_states=condition["text"],
            encoder_attention_mask=condition["mask"],
            timestep=(1000 * self.timestep_scale * time).to(self.state_dtype),
        ).sample


ADAPTER = FlowAdapter(
    network="SanaTransformer2DModel",
    model=Sana,
    recipe=_recipe,
    width="caption_channels",
    patch=patch_size,
    doubled=True,
    fields=lambda checkpoint, config: {"timestep_scale": config.number("timestep_scale", 1e-9, 1e9, 1.0)},
)


def load_sana(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> TextFlow:
    """Load an opened `SanaPipeline`. See `load_flow_text`.

    Args:
        checkpoint: the opened pipeline.
        device: device of the network.
        dtype: dtype of the network's weights.
    """
    return load_flow_text(checkpoint, device, dtype, ADAPTER)
