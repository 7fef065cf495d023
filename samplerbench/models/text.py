"""Base class of text-to-image models: prompts, their embeddings, and the size of the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from samplerbench.errors import UserError, argument
from samplerbench.limits import MAX_SIDE
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.embeddings import PromptEmbeddings
from samplerbench.models.latent import downsampling
from samplerbench.models.model import Condition, Model
from samplerbench.models.prompts import Prompts, read_prompts
from samplerbench.models.text_encoders import TextEncoders, TextRecipe, open_text_encoders
from samplerbench.sampling.inputs import Inputs

CUT = "truncated prompts"
"""Key of the note about prompts that are cut."""
LIMITS = "truncated by"
"""Key of the note about the tokenizers that cut them, with their maximum numbers of tokens."""


@dataclass
class TextModel(Model):
    """A model conditioned on prompts.

    The condition of a prompt is a mapping of named tensors, such as "text" (L, d), "pooled" (p,) and "mask" (L,). The
    unconditional prediction uses those of the negative prompt, or of the empty prompt if there is none.

    Attributes:
        embeddings: embeddings of the K prompts, on the CPU, because there may be many. None for a model that is only
            shown.
        null_embeddings: embeddings of the negative or empty prompt, tensors with one row on the device.
        prompts: the K prompts.
        prompt_ids: their ids. Empty if they have none.
        text_encoder: the text encoders, if `keep_text_encoder` is set. Otherwise None, to free their memory.
    """

    embeddings: PromptEmbeddings | None = None
    null_embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    prompt_ids: tuple[str, ...] = ()
    text_encoder: TextEncoders | None = None

    def condition(self, inputs: Inputs) -> Condition:
        if inputs.prompts is None or self.embeddings is None:
            return self.null_condition(inputs)
        return self._on_device(self.embeddings.rows(inputs.prompts.tolist()))

    def null_condition(self, inputs: Inputs) -> Condition:
        return {key: row.expand(len(inputs), *row.shape[1:]) for key, row in self.null_embeddings.items()}

    def encode_prompts(self, inputs: Inputs, unconditional: bool = False) -> Tensor | None:
        if self.text_encoder is None:
            return None
        parts = []
        if inputs.prompts is not None:
            parts.append(self.text_encoder.encode([self.prompts[i] for i in inputs.prompts.tolist()])["text"])
        if unconditional or not parts:
            parts.append(self.text_encoder.encode_null(self.negative_prompt)["text"])
        return torch.cat(parts)

    @property
    def negative_prompt(self) -> str | None:
        """The negative prompt. None if the user gave none."""
        return None if self.embeddings is None else self.embeddings.negative

    def _on_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            key: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for key, tensor in tensors.items()
        }


@dataclass
class LoadedText:
    """The prompts of a model and their embeddings.

    Attributes:
        encoders: the text encoders. They are freed unless `keep_text_encoder` is set.
        prompts: the prompts. None for a model that is only shown.
        embeddings: their embeddings. None for a model that is only shown.
    """

    encoders: TextEncoders
    prompts: Prompts | None
    embeddings: PromptEmbeddings | None

    def fields(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Return the fields of a `TextModel`, without identity and notes.

        Args:
            device: device of the network.
            dtype: dtype of the network's weights.
        """
        made: dict[str, Any] = {"text": True, "null": True, "classes": None}
        if self.prompts is None or self.embeddings is None:
            return made
        null = self.embeddings.null
        return made | {
            "classes": len(self.prompts.lines),
            "embeddings": self.embeddings,
            "null_embeddings": {
                key: tensor.to(device, dtype if tensor.is_floating_point() else None) for key, tensor in null.items()
            },
            "prompts": tuple(self.prompts.lines),
            "prompt_ids": self.prompts.ids,
            "text_encoder": self.encoders if self.encoders.checkpoint.options.keep_text_encoder else None,
        }

    def identity(self, negative: str | None) -> dict[str, Any]:
        """Return the protocol fields of the prompts and the text encoders.

        Args:
            negative: the negative prompt. None if the user gave none.
        """
        return self.encoders.identity | {
            "prompts": "" if self.prompts is None else self.prompts.sha256,
            "number of prompts": 0 if self.prompts is None else len(self.prompts.lines),
            "negative prompt": negative or "",
        }

    @property
    def notes(self) -> dict[str, str]:
        """The notes about prompts that are cut."""
        if self.embeddings is None or not self.embeddings.cut:
            return {}
        limits = ", ".join(self.embeddings.too_long)
        return {CUT: str(self.embeddings.cut), LIMITS: limits}

    def check_width(self, wanted: int, key: str, name: str = "text") -> None:
        """Check that the embeddings fit the network.

        Args:
            wanted: width that the network requires.
            key: key of this width in the configuration of the network.
            name: name of the tensor.

        Raises:
            UserError: if they do not fit.
        """
        if self.embeddings is not None and self.embeddings.width(name) != wanted:
            raise UserError(
                f"{self.encoders.checkpoint.source}: {key} of the network is {wanted}, but the embeddings of the text "
                f"encoder have {self.embeddings.width(name)} channels."
            )


def load_text(checkpoint: Checkpoint, recipe: TextRecipe, device: torch.device) -> LoadedText:
    """Read the prompts and encode them, before the network is loaded.

    Embeddings in the user's cache are used. If all are there, the text encoders are not loaded. Otherwise they are
    loaded and freed, unless `options.keep_text_encoder` is set.

    Args:
        checkpoint: the opened pipeline.
        recipe: how the pipeline class encodes prompts.
        device: device of the text encoders.

    Raises:
        UserError: if the prompts cannot be read, or a text encoder is missing, damaged or not supported.
        OutOfMemoryError: if the device has not enough memory for the text encoders.
    """
    options = checkpoint.options
    prompts = None if options.prompts is None else read_prompts(options.prompts)
    encoders = open_text_encoders(checkpoint, recipe, device)
    if prompts is None:
        return LoadedText(encoders, None, None)
    embeddings = PromptEmbeddings(encoders, prompts.lines, options.negative_prompt)
    if options.keep_text_encoder:
        _ = encoders.pipeline  # also if all embeddings are in the cache
    else:
        encoders.free()
    return LoadedText(encoders, prompts, embeddings)


def check_prompts(checkpoint: Checkpoint) -> None:
    """Raise UserError if no prompts are given for a text-to-image model that is to be sampled."""
    options = checkpoint.options
    if options.prompts is None and not options.show:
        raise UserError(
            f"{checkpoint.source} is a text-to-image model; give a file with one prompt per line, "
            f"{argument('prompts', 'FILE')}, or a prompt, {argument('prompt', 'TEXT')}."
        )


def prompts_of(model: Model, inputs: Inputs) -> dict[str, list[str]]:
    """Return the prompts of samples, and their ids if the prompts have ids. Empty for a model without prompts.

    Args:
        model: the model.
        inputs: inputs of n samples.

    Returns:
        "prompts" and "ids", n texts each.
    """
    if not isinstance(model, TextModel) or inputs.prompts is None:
        return {}
    index = inputs.prompts.tolist()
    found = {"prompts": [model.prompts[i] for i in index]}
    return found | ({"ids": [model.prompt_ids[i] for i in index]} if model.prompt_ids else {})


def prompt_warning(model: Model) -> str:
    """Return a line about prompts that are longer than the text encoder reads. Empty if there are none.

    Args:
        model: the model.
    """
    if CUT not in model.notes:
        return ""
    cut = model.notes[CUT]
    return (
        f"{cut} of {model.classes} prompts {'is' if cut == '1' else 'are'} longer than the text encoder of the model "
        f"reads (maximum tokens: {model.notes[LIMITS]}); the rest of the text has no effect."
    )


def latent_size(checkpoint: Checkpoint, default: tuple[int, int], multiple: int = 1) -> tuple[int, int]:
    """Return the height and width of the latents.

    Args:
        checkpoint: the opened pipeline.
        default: height and width of the latents, if the user gave no image size.
        multiple: the height and the width of the latents must be multiples of this number, such as the side of a patch.

    Raises:
        UserError: if the image size does not fit the autoencoder and the network.
    """
    wanted = checkpoint.options.image_size
    if wanted is None:
        return default
    unit = downsampling(checkpoint, "vae") * multiple
    if any(not 0 < side <= MAX_SIDE or side % unit for side in wanted):
        shown = "x".join(map(str, wanted))
        raise UserError(
            f"{argument('image_size', shown)}: {checkpoint.source} requires a height and a width that are multiples of "
            f"{unit}, at most {MAX_SIDE:,}."
        )
    return wanted[0] // downsampling(checkpoint, "vae"), wanted[1] // downsampling(checkpoint, "vae")
