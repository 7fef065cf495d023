"""Diffusion transformers: `DiTPipeline` checkpoints (Peebles & Xie 2023)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.limits import MAX_CHANNELS, MAX_CLASSES
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.diffusers_unet import card_fields, identity_of, load_schedule
from samplerbench.models.discrete import DiscreteVP
from samplerbench.models.fields import Fields
from samplerbench.models.latent import load_autoencoder
from samplerbench.models.model import Condition
from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.process import VARIANCE_PRESERVING


@dataclass
class DiT(DiscreteVP):
    """A class-conditional `DiTTransformer2DModel` in latent space. The null label is the number of classes.

    Guidance is applied to all latent channels, as in diffusers. The original code guides only the first three.
    """

    def condition(self, inputs: Inputs) -> Condition:
        if inputs.labels is None:
            return self.null_condition(inputs)
        return {"labels": inputs.labels.to(self.device)}

    def null_condition(self, inputs: Inputs) -> Condition:
        return {"labels": torch.full((len(inputs),), self.classes or 0, device=self.device)}

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(x.to(self.dtype), timestep=time, class_labels=condition["labels"]).sample


def load_dit(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> DiT:
    """Load the transformer and the autoencoder of an opened `DiTPipeline`.

    If the network has twice as many output channels as input channels, the second half is a learned variance range.
    The variance type of the scheduler is ignored. The pipeline of diffusers discards this output.
    `ddpm:variance=learned` uses it.

    Args:
        checkpoint: the opened pipeline.
        device: device of the network.
        dtype: dtype of the network's weights.

    Raises:
        UserError: if the number of output channels is not supported. See also `Checkpoint.load`, `read_schedule`,
            `load_autoencoder` and `class_names`.
    """
    from diffusers import DiTTransformer2DModel

    source = checkpoint.source
    # Checkpoints created before diffusers 0.28 use the former class name, Transformer2DModel.
    checkpoint.require("transformer", "DiTTransformer2DModel", "Transformer2DModel")
    checkpoint.check_variant(["transformer", "vae"])
    config = checkpoint.fields("transformer", DiTTransformer2DModel)
    schedule = load_schedule(checkpoint)
    channels = config.integer("in_channels", 1, MAX_CHANNELS)
    out = config.integer("out_channels", 1, MAX_CHANNELS, channels)
    classes = config.integer("num_embeds_ada_norm", 1, MAX_CLASSES)
    if out not in (channels, 2 * channels):
        raise UserError(
            f"{source}: the network has {out} output channels for {channels} input channels; it must have {channels}, "
            f"or {2 * channels} with a learned variance."
        )
    named = class_names(checkpoint, classes)
    size = config.sides("sample_size")
    autoencoder, latent = load_autoencoder(checkpoint, "vae", channels, size, device, dtype)
    part = checkpoint.load("transformer", DiTTransformer2DModel, dtype, device)
    learned = out == 2 * channels
    made = card_fields(checkpoint, part.module, classes)
    return DiT(
        network=part.module,
        shape=(channels, *size),
        levels=schedule.levels,
        process=VARIANCE_PRESERVING,
        device=device,
        dtype=dtype,
        autoencoder=autoencoder,
        classes=classes,
        null=True,
        clip=schedule.clip,
        clip_range=schedule.clip_range,
        learned_variance=learned,
        doubled=learned,
        identity=identity_of(checkpoint, part.sha256)
        | schedule.identity
        | {"variance": "learned_range" if learned else schedule.variance}
        | latent,
        preconditioning=schedule.preconditioning,
        **(made | ({"class_names": named} if named else {})),
    )


def class_names(checkpoint: Checkpoint, classes: int) -> tuple[str, ...]:
    """Read the class names of a `DiTPipeline`: `id2label` in model_index.json, {"0": "tench, Tinca tinca", …}.

    Args:
        checkpoint: the opened pipeline.
        classes: number of labels of the model.

    Returns:
        The name of each class, "" for a class without a name. Several names of one class are separated by commas.
        Empty if the pipeline has no names.

    Raises:
        UserError: if `id2label` is not an object of labels and names, or has a label that the model does not have.
    """
    index = Fields(checkpoint.index, f"{checkpoint.source}: model_index.json")
    given = index.values.get("id2label")
    if given is None:
        return ()
    valid = isinstance(given, dict) and all(
        re.fullmatch("[0-9]{1,7}", label) and int(label) < classes and isinstance(name, str)
        for label, name in given.items()
    )
    if not valid:
        raise index.refusal("id2label", given, f"an object with names of the labels 0 to {classes - 1}")
    names = {int(label): name for label, name in given.items()}
    return tuple(names.get(label, "") for label in range(classes)) if any(names.values()) else ()
