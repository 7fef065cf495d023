"""Z-Image: `ZImagePipeline` checkpoints (Z-Image Team 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplerbench.limits import MAX_CHANNELS
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.fields import Fields
from samplerbench.models.flow_text import FlowAdapter, TextFlow, Wrapped, load_flow_text
from samplerbench.models.model import Condition
from samplerbench.models.text_encoders import QWEN, EncoderPart, Tensors, TextRecipe

TOKENS = 512
"""Maximum number of tokens of a prompt with its template, the default of diffusers."""
PATCH = 2
"""Side of a patch of latents, as in diffusers."""
SIDE = 128
"""Side of the latents if no image size is given, for an autoencoder that reduces 1024 pixels by 8, as in diffusers."""
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\\n' }}"
)
"""The chat template of Qwen3 for a message of the user, with thinking enabled.

A chat template is a program, so the one in the checkpoint is not used.
"""


def _recipe(config: Fields) -> TextRecipe:
    """The second-to-last hidden states of Qwen3 for the prompt in the chat template, without padding."""
    return TextRecipe(
        pipeline="ZImagePipeline",
        parts=(EncoderPart("text_encoder", "tokenizer", ("Qwen3Model",), QWEN, TOKENS, counted=_counted),),
        encode=_encode,
        encode_null=lambda pipeline, negative, device: _encode(pipeline, [negative or ""], device),
        settings={"maximum tokens": TOKENS, "chat template": TEMPLATE},
    )


def _counted(tokenizer: Any, line: str) -> tuple[str, int]:
    return f"<|im_start|>user\n{line}<|im_end|>\n<|im_start|>assistant\n", TOKENS


def _encode(pipeline: Any, lines: list[str], device: torch.device) -> Tensors:
    pipeline.tokenizer.chat_template = TEMPLATE
    rows, _ = pipeline.encode_prompt(
        list(lines), device=device, do_classifier_free_guidance=False, max_sequence_length=TOKENS
    )
    masks = [torch.ones(len(row), dtype=torch.int64, device=row.device) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return {"text": pad(list(rows), batch_first=True), "mask": pad(masks, batch_first=True)}


class ListedZImage(Wrapped):
    """A `ZImageTransformer2DModel` whose arguments are tensors with one row per sample instead of lists."""

    def forward(self, y: Tensor, time: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Return the output of the transformer, (B, C, H, W).

        Args:
            y: latents, (B, C, H, W).
            time: times 1 - t, (B,).
            text: embeddings, (B, L, d).
            mask: 1 for tokens of the prompt and 0 for padding, (B, L).
        """
        lengths = mask.sum(dim=1).tolist()
        output = self.transformer(
            list(y.unsqueeze(2).unbind(0)),
            time,
            [row[:length] for row, length in zip(text, lengths, strict=True)],
            patch_size=PATCH,
            return_dict=False,
        )[0]
        return torch.stack(list(output)).squeeze(2)


@dataclass
class ZImage(TextFlow):
    """A `ZImageTransformer2DModel`. Its time input is 1 - t, and its output is -v.

    diffusers defines the guidance scale g of this pipeline by v_pos + g (v_pos - v_neg), so `cfg:scale` is g + 1.
    """

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        output: Tensor = self.network(
            x.to(self.dtype), (1 - time).to(self.state_dtype), condition["text"], condition["mask"]
        )
        return -output


def _patch(config: Fields) -> int:
    sizes = config.values.get("all_patch_size")
    if not isinstance(sizes, list | tuple) or PATCH not in sizes:
        raise config.refusal("all_patch_size", sizes, "a list with the patch size 2")
    return PATCH


ADAPTER = FlowAdapter(
    network="ZImageTransformer2DModel",
    model=ZImage,
    recipe=_recipe,
    width="cap_feat_dim",
    patch=_patch,
    channels=lambda config: config.integer("in_channels", 1, MAX_CHANNELS),
    side=lambda config: (SIDE, SIDE),
    wrap=ListedZImage,
)


def load_z_image(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> TextFlow:
    """Load an opened `ZImagePipeline`. See `load_flow_text`.

    Args:
        checkpoint: the opened pipeline.
        device: device of the network.
        dtype: dtype of the network's weights.
    """
    return load_flow_text(checkpoint, device, dtype, ADAPTER)
