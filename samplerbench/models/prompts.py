"""Prompts: read them from a text file and encode them with a CLIP text encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplerbench.errors import UserError, argument
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.untrusted import read_text, reason, shorten, user_path

AT_ONCE = 32
"""Number of prompts per batch of the text encoder."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run.

    Attributes:
        lines: the prompts. Prompt k has index k.
    """

    lines: list[str]

    @property
    def sha256(self) -> str:
        """The hash of the prompts, for the protocol."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()


def read_prompts(file: str | Sequence[str]) -> Prompts:
    """Read prompts from a UTF-8 text file, one per line. Blank lines and surrounding whitespace are removed.

    Args:
        file: path of the file, or the prompts themselves.

    Raises:
        UserError: if the file cannot be read or contains no prompts, or if a given prompt is empty or has several
            lines.
    """
    if not isinstance(file, str):
        return Prompts([_one_line(prompt) for prompt in file])
    try:
        text = read_text(user_path(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{argument('prompts', str(file))}: the file cannot be read ({error}).") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{argument('prompts', str(file))}: the file contains no prompts; write one prompt per line.")
    return Prompts(lines)


def _one_line(prompt: str) -> str:
    """A prompt without surrounding whitespace."""
    lines = prompt.strip().splitlines()
    if len(lines) != 1:
        what = "has several lines; write it on one line" if lines else "is empty; write some text"
        raise UserError(f"{argument('prompt', shorten(prompt))} {what}.")
    return lines[0]


@dataclass
class TextEncoder:
    """A CLIP tokenizer and text encoder.

    Attributes:
        tokenizer: the tokenizer.
        module: the text encoder.
        width: dimension d of the embeddings.
        sha256: hash of the weights and of the tokenizer files.
        truncated: number of encoded prompts that exceeded the maximum length.
    """

    tokenizer: Any
    module: Any
    width: int
    sha256: str
    truncated: int = 0

    @torch.no_grad()
    def encode(self, lines: list[str]) -> Tensor:
        """Encode prompts. Longer prompts are truncated and counted in `truncated`.

        Args:
            lines: K prompts.

        Returns:
            Last hidden states, (K, L, d) on the CPU, where L is the maximum length of the tokenizer.
        """
        parts = []
        device = next(self.module.parameters()).device
        length = self.tokenizer.model_max_length
        for first in range(0, len(lines), AT_ONCE):
            part = lines[first : first + AT_ONCE]
            self.truncated += sum(len(ids) > length for ids in self.tokenizer(part).input_ids)
            tokens = self.tokenizer(
                part, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).to(device)
            masked = getattr(self.module.config, "use_attention_mask", False)
            mask = tokens.attention_mask if masked else None
            parts.append(self.module(tokens.input_ids, attention_mask=mask)[0].cpu())
        return torch.cat(parts)


def load_text_encoder(checkpoint: Checkpoint, device: torch.device) -> TextEncoder:
    """Load the text encoder and tokenizer of an opened pipeline, in float32.

    Args:
        checkpoint: the opened pipeline.
        device: device of the text encoder.

    Raises:
        UserError: if they are not CLIP classes, or files are missing or damaged.
    """
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    checkpoint.require("text_encoder", "CLIPTextModel")
    checkpoint.require("tokenizer", "CLIPTokenizer", "CLIPTokenizerFast")
    folder = checkpoint.folder / "tokenizer"
    files = [folder / name for name in ("vocab.json", "merges.txt") if (folder / name).exists()]
    files = files if len(files) == 2 else sorted(folder.glob("tokenizer.json"))
    if not files:
        raise UserError(f"{checkpoint.source} is incomplete: tokenizer/vocab.json or tokenizer/merges.txt is missing.")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise UserError(f"{checkpoint.source}: the tokenizer cannot be loaded: {reason(error)}") from None
    part = checkpoint.load("text_encoder", CLIPTextModel, torch.float32, device)
    words = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    both = hashlib.sha256((part.sha256 + words).encode()).hexdigest()
    length, words_known = tokenizer.model_max_length, part.module.config.vocab_size
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 1:
        raise UserError(f"{checkpoint.source}: model_max_length in tokenizer/tokenizer_config.json is invalid.")
    if len(tokenizer) > words_known:
        raise UserError(
            f"{checkpoint.source}: the tokenizer has {len(tokenizer)} tokens, but the text encoder supports only "
            f"{words_known}."
        )
    tokenizer.model_max_length = min(int(min(length, 1e9)), part.module.config.max_position_embeddings)
    return TextEncoder(tokenizer, part.module, part.module.config.hidden_size, both)
