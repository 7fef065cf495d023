"""Text encoders of text-to-image pipelines. Prompts are encoded by the pipeline class's own `encode_prompt`."""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samplerbench.errors import OutOfMemoryError, SamplerbenchError, UserError, argument, is_out_of_memory
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.files import hash_files
from samplerbench.models.offload import offload_alone
from samplerbench.untrusted import read_json, reason

CLIP = ("CLIPTokenizer", "CLIPTokenizerFast")
T5 = ("T5Tokenizer", "T5TokenizerFast")
GEMMA = ("GemmaTokenizer", "GemmaTokenizerFast")
QWEN = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")
"""Class names of tokenizers in model_index.json."""

_TOKENIZER_FILES = (".json", ".txt", ".model")
"""Suffixes of the files of a tokenizer."""

Tensors = dict[str, Tensor]
"""Named tensors of one prompt, without a batch dimension."""


@dataclass(frozen=True)
class EncoderPart:
    """A tokenizer and its text encoder.

    Attributes:
        encoder: part of the text encoder in model_index.json.
        tokenizer: part of the tokenizer.
        classes: supported classes of the text encoder.
        tokenizers: supported classes of the tokenizer.
        length: maximum number of tokens. None for the `model_max_length` of the tokenizer.
        optional: whether the pipeline works without this part.
        counted: the text whose tokens are counted, as a function of the tokenizer and the prompt, and the number of
            tokens that it may have. None for the prompt itself and `length`.
    """

    encoder: str
    tokenizer: str
    classes: tuple[str, ...]
    tokenizers: tuple[str, ...]
    length: int | None = None
    optional: bool = False
    counted: Callable[[Any, str], tuple[str, int]] | None = None


@dataclass(frozen=True)
class TextRecipe:
    """How a pipeline class encodes prompts.

    Attributes:
        pipeline: class name of the pipeline.
        parts: its tokenizers and text encoders.
        encode: function of the pipeline object, a list of prompts and the device that calls `encode_prompt`. It returns
            tensors with one row per prompt.
        encode_null: the same for the negative prompt, which is None if the user gave none. It returns one row.
        settings: lengths and instructions that the embeddings depend on.
        flags: settings of the pipeline object.
        config: configuration of the network that `encode_prompt` reads.
    """

    pipeline: str
    parts: tuple[EncoderPart, ...]
    encode: Callable[[Any, list[str], torch.device], Tensors]
    encode_null: Callable[[Any, str | None, torch.device], Tensors]
    settings: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class TextEncoders:
    """The text encoders of an opened pipeline. They are loaded in float32 when they are first used.

    Attributes:
        checkpoint: the opened pipeline.
        recipe: how the pipeline class encodes prompts.
        device: device of the text encoders.
        hashes: for each part that the pipeline has, the hash of its weights and of the vocabulary of its tokenizer.
        settings: for each part, the hash of its configuration and of all files of its tokenizer.
        modules: the loaded text encoders by part. Empty before `load` and after `free`.
        tokenizers: the loaded tokenizers by part of the text encoder.
    """

    checkpoint: Checkpoint
    recipe: TextRecipe
    device: torch.device
    hashes: dict[str, str]
    settings: dict[str, str]
    modules: dict[str, Any] = field(default_factory=dict)
    tokenizers: dict[str, Any] = field(default_factory=dict)
    _pipeline: Any = None

    @property
    def identity(self) -> dict[str, Any]:
        """The protocol fields: hashes of the text encoders, tokenizers and their configurations, settings, version."""
        named = {part.encoder.replace("_", " "): self.hashes.get(part.encoder, "none") for part in self.recipe.parts}
        configured = json.dumps(self.settings, sort_keys=True).encode()
        return (
            named
            | dict(self.recipe.settings)
            | {
                "text encoder settings": hashlib.sha256(configured).hexdigest(),
                "transformers": importlib.metadata.version("transformers"),
            }
        )

    @property
    def pipeline(self) -> Any:
        """The pipeline object with only tokenizers and text encoders. It is created on first use."""
        if self._pipeline is None:
            self.load()
        return self._pipeline

    def load(self) -> None:
        """Load the tokenizers and the text encoders.

        Raises:
            UserError: if files are damaged, or a tokenizer does not fit its text encoder.
            OutOfMemoryError: if the device has not enough memory.
        """
        import diffusers
        import transformers
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        cls = getattr(diffusers, self.recipe.pipeline)
        with explain_loading("the text encoders", self.device):
            for part in self.recipe.parts:
                if part.encoder not in self.hashes:
                    continue
                kind = self.checkpoint.kind(part.encoder)
                loaded = self.checkpoint.load(part.encoder, getattr(transformers, kind), torch.float32, self.device)
                self.modules[part.encoder] = offload_alone(loaded.module, self.checkpoint.options, self.device)
                self.tokenizers[part.encoder] = load_tokenizer(self.checkpoint, part, loaded.module)
        parameters = inspect.signature(cls.__init__).parameters.values()
        given: dict[str, Any] = {p.name: None for p in parameters if p.name != "self" and p.default is p.empty}
        for part in self.recipe.parts:
            given[part.encoder] = self.modules.get(part.encoder)
            given[part.tokenizer] = self.tokenizers.get(part.encoder)
        with self._running():
            self._pipeline = cls(**given, **self.recipe.flags)
            if self.recipe.config:
                self._pipeline.transformer = _Configured(self.recipe.config)

    def free(self) -> None:
        """Free the text encoders and tokenizers. They are loaded again if they are needed."""
        self._pipeline = None
        self.modules, self.tokenizers = {}, {}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def encode(self, lines: list[str]) -> Tensors:
        """Encode prompts.

        Args:
            lines: K prompts.

        Returns:
            Named tensors with K rows each, on the CPU.

        Raises:
            OutOfMemoryError: if the device has not enough memory.
        """
        pipeline = self.pipeline
        with self._running():
            return _on_cpu(self.recipe.encode(pipeline, list(lines), self.device))

    @torch.no_grad()
    def encode_null(self, negative: str | None) -> Tensors:
        """Encode the negative prompt.

        Args:
            negative: the negative prompt. None if the user gave none.

        Returns:
            Named tensors with one row each, on the CPU.
        """
        pipeline = self.pipeline
        with self._running():
            return _on_cpu(self.recipe.encode_null(pipeline, negative, self.device))

    def too_long(self, line: str) -> list[str]:
        """Return which tokenizers cut a prompt, and after how many tokens: `["tokenizer: 77"]`.

        Args:
            line: a prompt.
        """
        _ = self.pipeline
        found = []
        for part in self.recipe.parts:
            tokenizer = self.tokenizers.get(part.encoder)
            if tokenizer is None:
                continue
            text, length = line, part.length or tokenizer.model_max_length
            with self._running():
                if part.counted is not None:
                    text, length = part.counted(tokenizer, line)
                tokens = len(tokenizer(text).input_ids)
            if tokens > length:
                found.append(f"{part.tokenizer}: {length}")
        return found

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Convert the errors of tokenizers and text encoders whose configuration is damaged."""
        try:
            with explain_loading("the text encoders", self.device), _quiet_pipelines():
                yield
        except SamplerbenchError:
            raise
        except Exception as error:  # the libraries raise many exception types for an invalid configuration
            raise UserError(
                f"{self.checkpoint.source}: the text encoders cannot encode a prompt; a configuration may be damaged "
                f"({reason(error)})."
            ) from error


class _Configured:
    """Takes the place of the network in a pipeline object that only encodes prompts."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = type("Config", (), dict(config))
        self.dtype = torch.float32


def open_text_encoders(checkpoint: Checkpoint, recipe: TextRecipe, device: torch.device) -> TextEncoders:
    """Check and hash the text encoders and tokenizers of a pipeline, without loading them.

    Args:
        checkpoint: the opened pipeline.
        recipe: how the pipeline class encodes prompts.
        device: device of the text encoders.

    Raises:
        UserError: if a class is not supported, or files are missing.
    """
    hashes, settings = {}, {}
    for part in recipe.parts:
        if part.optional and checkpoint.kind(part.encoder) == "missing":
            continue
        if checkpoint.kind(part.encoder) == "missing":
            raise UserError(
                f"{checkpoint.source} is a {checkpoint.pipeline} without {part.encoder}, so prompts cannot be encoded. "
                f"Download the whole pipeline, with {part.encoder}/ and {part.tokenizer}/."
            )
        checkpoint.require(part.encoder, *part.classes)
        checkpoint.require(part.tokenizer, *part.tokenizers)
        words = hashlib.sha256(b"".join(f.read_bytes() for f in tokenizer_files(checkpoint, part))).hexdigest()
        hashes[part.encoder] = hashlib.sha256((checkpoint.weights_hash(part.encoder) + words).encode()).hexdigest()
        words_and_rules = [f for f in (checkpoint.folder / part.tokenizer).iterdir() if f.suffix in _TOKENIZER_FILES]
        files = [checkpoint.folder / part.encoder / "config.json", *words_and_rules]
        settings[part.encoder] = hash_files(files)
    return TextEncoders(checkpoint, recipe, device, hashes, settings)


def tokenizer_files(checkpoint: Checkpoint, part: EncoderPart) -> list[Path]:
    """Return the files that define the vocabulary of a tokenizer.

    Args:
        checkpoint: the opened pipeline.
        part: the tokenizer and its text encoder.

    Raises:
        UserError: if they are missing.
    """
    folder = checkpoint.folder / part.tokenizer
    pair = [folder / "vocab.json", folder / "merges.txt"]
    single = [folder / name for name in ("tokenizer.json", "spiece.model", "tokenizer.model")]
    if part.tokenizers == CLIP:
        chosen = pair if all(file.exists() for file in pair) else [f for f in single[:1] if f.exists()]
    else:
        chosen = [f for f in single if f.exists()][:1] or (pair if all(file.exists() for file in pair) else [])
    if not chosen:
        names = [f"{part.tokenizer}/{file.name}" for file in (pair if part.tokenizers == CLIP else single)]
        raise UserError(f"{checkpoint.source} is incomplete: {' or '.join(names)} is missing.")
    return chosen


def load_tokenizer(checkpoint: Checkpoint, part: EncoderPart, encoder: Any) -> Any:
    """Load a tokenizer.

    Args:
        checkpoint: the opened pipeline.
        part: the tokenizer and its text encoder.
        encoder: the loaded text encoder.

    Raises:
        UserError: if it is damaged, needs a package that is not installed, or does not fit the text encoder.
    """
    import transformers

    source, folder = checkpoint.source, checkpoint.folder / part.tokenizer
    name = {"LlamaTokenizerFast": "LlamaTokenizer"}.get(
        checkpoint.kind(part.tokenizer), checkpoint.kind(part.tokenizer)
    )
    try:
        tokenizer = getattr(transformers, name).from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare exceptions
        if "sentencepiece" in str(error) or "protobuf" in str(error):
            raise UserError(
                f"{source}: {part.tokenizer}/ has only a SentencePiece model, which needs two more packages: "
                "pip install sentencepiece protobuf."
            ) from None
        raise UserError(f"{source}: the tokenizer cannot be loaded: {reason(error)}") from None
    # A chat template is a program in the checkpoint. The recipes use templates of their own.
    tokenizer.chat_template = None
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 1:
        raise UserError(f"{source}: model_max_length in {part.tokenizer}/tokenizer_config.json is invalid.")
    config = encoder.config
    config = getattr(config, "text_config", config)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, but the text encoder supports only "
            f"{config.vocab_size}."
        )
    if part.tokenizers == CLIP:
        tokenizer.model_max_length = min(int(min(length, 1e9)), config.max_position_embeddings)
    return tokenizer


def encoder_width(checkpoint: Checkpoint, part: str) -> int | None:
    """Return the width of a text encoder from its configuration. None if it is not stated.

    Args:
        checkpoint: the opened pipeline.
        part: part of the text encoder.
    """
    config = read_json(checkpoint.folder / part / "config.json", f"{checkpoint.source} is incomplete")
    width = config.get("hidden_size", config.get("d_model"))
    return width if isinstance(width, int) and not isinstance(width, bool) else None


@contextmanager
def explain_loading(what: str, device: torch.device) -> Iterator[None]:
    """Convert out-of-memory errors to an OutOfMemoryError that says what to try.

    Args:
        what: what does not fit, in the plural.
        device: the device.

    Raises:
        OutOfMemoryError: if the device is out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        advice = f"{argument('dtype', 'bf16')} or a machine with more memory"
        if device.type != "cpu":
            advice = f"{argument('memory', 'offload')}, {argument('dtype', 'bf16')} or {argument('device', 'cpu')}"
        raise OutOfMemoryError(f"the device {device} has not enough memory for {what}; try {advice}.") from error


@contextmanager
def _quiet_pipelines() -> Iterator[None]:
    """Silence the warnings of diffusers: cut prompts are counted and reported by samplerbench."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _on_cpu(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
