"""Text embeddings of prompts in the space of a CLIP model's image embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.untrusted import reason

AT_ONCE = 32
"""Number of prompts per batch of the text encoder."""


class ClipPrompts:
    """The tokenizer and the text encoder of a CLIP model. Each prompt is encoded once.

    Args:
        model: a `CLIPModel` of transformers.
        tokenizer: a CLIP tokenizer.
        name: name of the feature space, for messages.

    Attributes:
        length: maximum number of tokens. Longer prompts are truncated.
        scale: exp(logit_scale) of the model, the factor of the cosine in its training loss.
        name: name of the feature space.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.length = int(tokenizer.model_max_length)
        self.scale = float(model.logit_scale.double().exp())
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (B, d) of B prompts, float32 on the CPU, in the space of the image embeddings."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        device = self.model.logit_scale.device
        for first in range(0, len(missing), AT_ONCE):
            part = missing[first : first + AT_ONCE]
            tokens = self.tokenizer(
                part, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
            ).to(device)
            output = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            rows = self.model.text_projection(output.pooler_output).cpu()
            self._known |= dict(zip(part, rows, strict=True))
        return torch.stack([self._known[prompt] for prompt in prompts])

    def truncated(self, prompts: Sequence[str]) -> int:
        """The number of prompts with more than `length` tokens."""
        return sum(len(self.tokenizer(prompt).input_ids) > self.length for prompt in prompts)


def load_prompt_encoder(model: Any, folder: Path, source: str, name: str) -> ClipPrompts:
    """Load the tokenizer of a CLIP model.

    Args:
        model: a `CLIPModel` of transformers.
        folder: folder of the tokenizer.
        source: folder or hub id given by the user.
        name: name of the feature space.

    Raises:
        UserError: the tokenizer is missing or damaged, or has more tokens than the text encoder.
    """
    from transformers import CLIPTokenizer

    there = (folder / "tokenizer.json").exists()
    if not there and not all((folder / file).exists() for file in ("vocab.json", "merges.txt")):
        raise UserError(f"{source} has no tokenizer (vocab.json and merges.txt, or tokenizer.json).")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise UserError(f"{source}: the tokenizer cannot be loaded: {reason(error)}") from None
    config = model.config.text_config
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 1:
        raise UserError(f"{source}: model_max_length in tokenizer_config.json is invalid.")
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, but the text encoder supports only "
            f"{config.vocab_size}."
        )
    tokenizer.model_max_length = min(int(min(length, 1e9)), config.max_position_embeddings)
    return ClipPrompts(model, tokenizer, name)
