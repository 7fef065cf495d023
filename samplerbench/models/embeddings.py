"""Prompt embeddings: encoded once, kept in the user's cache, and gathered by prompt index."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samplerbench.cache import cache_dir
from samplerbench.models.text_encoders import Tensors, TextEncoders
from samplerbench.portable import replace_file
from samplerbench.tensor_seal import DamagedError, open_seal, sealed

FORMAT = 1
"""Version of the files in the cache. It is part of their hash."""
IN_MEMORY = 2 * 2**30
"""Maximum size of the embeddings in memory, in bytes. Further ones are read from the cache when they are needed."""


@dataclass
class Encoded:
    """The embeddings of one prompt.

    Attributes:
        tensors: named tensors, without a batch dimension.
        too_long: which tokenizers cut the prompt (`TextEncoders.too_long`).
    """

    tensors: Tensors
    too_long: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """The size in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class EmbeddingCache:
    """Embeddings of prompts in the user's cache: one safetensors file for each prompt, with a digest of its content.

    The file name is the hash of everything that the embeddings depend on: the pipeline class, the hashes of the text
    encoders and tokenizers, the revision, lengths and instructions, the prompt, and whether it is a negative prompt.

    Args:
        identity: what all prompts of a model have in common.
    """

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self.identity = dict(identity)

    def file(self, prompt: str | None, negative: bool) -> Path:
        """Return the file of a prompt.

        Args:
            prompt: the prompt. None for no negative prompt.
            negative: whether it is the negative prompt.
        """
        identity = self.identity | {"format": FORMAT, "prompt": prompt, "negative": negative}
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return cache_dir() / "prompts" / key[:2] / f"{key}.safetensors"

    def read(self, prompt: str | None, negative: bool = False) -> Encoded | None:
        """Read the embeddings of a prompt. Return None if they are not in the cache, or their file is damaged."""
        from safetensors import SafetensorError, safe_open

        file = self.file(prompt, negative)
        try:
            with safe_open(file, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                metadata, is_sealed = open_seal(tensors, opened.metadata() or {})
            cut = json.loads(metadata.get("too long", "[]"))
        except (OSError, SafetensorError, DamagedError, ValueError, RuntimeError):
            return None
        return Encoded(tensors, [str(one) for one in cut]) if is_sealed and isinstance(cut, list) else None

    def write(self, prompt: str | None, encoded: Encoded, negative: bool = False) -> bool:
        """Write the embeddings of a prompt. Return False if the cache cannot be written."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        file = self.file(prompt, negative)
        temporary = ""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
            os.close(handle)
            save_file(encoded.tensors, temporary, sealed(encoded.tensors, {"too long": json.dumps(encoded.too_long)}))
            replace_file(temporary, file)
        except (OSError, SafetensorError):
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            return False
        return True


class PromptEmbeddings:
    """The embeddings of the prompts of a run, and of the negative prompt.

    Tensors whose first dimension differs between prompts are padded with zeros at the end to the longest one. Their
    masks are padded as well, so that the padding has no effect. A batch therefore does not depend on which prompts are
    in it.

    Args:
        encoders: text encoders of the model. They are loaded only if the cache lacks a prompt.
        prompts: the K prompts.
        negative: the negative prompt. None if the user gave none.

    Attributes:
        negative: the negative prompt. None if the user gave none.
        null: embeddings of the negative prompt, tensors with one row, on the CPU.
        too_long: for each tokenizer that cuts prompts, the number of these prompts: `{"tokenizer: 77": 2}`.
        cut: the number of prompts that are cut by a tokenizer.
    """

    def __init__(self, encoders: TextEncoders, prompts: Iterable[str], negative: str | None) -> None:
        checkpoint = encoders.checkpoint
        identity = {
            "pipeline": encoders.recipe.pipeline,
            "encoders": encoders.hashes,
            "files": encoders.settings,
            "settings": dict(encoders.recipe.settings),
            "flags": dict(encoders.recipe.flags),
            "config": {key: str(value) for key, value in encoders.recipe.config.items()},
            "revision": checkpoint.revision,
            "versions": _versions(),
        }
        self.cache = EmbeddingCache(json.loads(json.dumps(identity)))
        self.encoders, self.prompts, self.negative = encoders, tuple(prompts), negative
        self.too_long: dict[str, int] = {}
        self.cut = 0
        self._kept: dict[int, Tensors] = {}
        self._lengths: dict[str, int] = {}
        used = 0
        null = self._get(negative, negative=True)[0]
        self._measure(null.tensors)
        for index, prompt in enumerate(self.prompts):
            encoded, in_cache = self._get(prompt)
            self._measure(encoded.tensors)
            self.cut += bool(encoded.too_long)
            for one in encoded.too_long:
                self.too_long[one] = self.too_long.get(one, 0) + 1
            if used + encoded.size <= IN_MEMORY or not in_cache:
                self._kept[index] = encoded.tensors
                used += encoded.size
        self.null = {name: self._padded(name, tensor)[None] for name, tensor in null.tensors.items()}

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Iterable[int]) -> dict[str, Tensor]:
        """Return the embeddings of some prompts.

        Args:
            index: indices of B prompts.

        Returns:
            Named tensors with B rows each, on the CPU.
        """
        chosen = [self._of(i) for i in index]
        return {name: torch.stack([self._padded(name, one[name]) for one in chosen]) for name in chosen[0]}

    def width(self, name: str) -> int:
        """Return the last dimension of a tensor.

        Args:
            name: name of the tensor.
        """
        return int(self.null[name].shape[-1])

    def _of(self, index: int) -> Tensors:
        if index in self._kept:
            return self._kept[index]
        return self._get(self.prompts[index])[0].tensors

    def _get(self, prompt: str | None, negative: bool = False) -> tuple[Encoded, bool]:
        """The embeddings of a prompt, and whether they are in the cache."""
        known = self.cache.read(prompt, negative)
        if known is not None:
            return known, True
        # One at a time: in a batch, the numbers would depend on the other prompts.
        if negative:
            tensors = self.encoders.encode_null(prompt)
            encoded = Encoded({name: tensor[0].clone() for name, tensor in tensors.items()})
        else:
            tensors = self.encoders.encode([str(prompt)])
            encoded = Encoded(
                {name: tensor[0].clone() for name, tensor in tensors.items()}, self.encoders.too_long(str(prompt))
            )
        return encoded, self.cache.write(prompt, encoded, negative)

    def _measure(self, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if tensor.ndim:
                self._lengths[name] = max(self._lengths.get(name, 0), len(tensor))

    def _padded(self, name: str, tensor: Tensor) -> Tensor:
        missing = self._lengths.get(name, 0) - len(tensor) if tensor.ndim else 0
        return tensor if missing <= 0 else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


def _versions() -> dict[str, str]:
    """The versions of the libraries that encode."""
    import diffusers
    import transformers

    return {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
