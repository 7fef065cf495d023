"""`UNet2DModel` checkpoints: unconditional or class-conditional, in pixel space or latent space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.limits import MAX_CHANNELS, MAX_CLASSES
from samplerbench.models.checkpoint import CARD, Checkpoint, open_checkpoint
from samplerbench.models.discrete import DiscreteVP
from samplerbench.models.fields import Fields
from samplerbench.models.files import LoadOptions
from samplerbench.models.flow import RectifiedFlow, flow_fields, flow_identity, is_flow, read_flow_schedule
from samplerbench.models.latent import Autoencoder
from samplerbench.models.model import Condition, Model
from samplerbench.models.schedule import Schedule, read_schedule
from samplerbench.sampling.denoiser import Sigma
from samplerbench.sampling.flow import FlowSchedule
from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.process import VARIANCE_PRESERVING


class _Labelled(Model):
    """A `UNet2DModel` with class labels. The subclass has the field `null_label`."""

    null_label: int | None

    def condition(self, inputs: Inputs) -> Condition:
        if inputs.labels is None or self.classes is None:
            return self.null_condition(inputs)
        return {"labels": inputs.labels.to(self.device)}

    def null_condition(self, inputs: Inputs) -> Condition:
        if self.null_label is None:
            return {}
        return {"labels": torch.full((len(inputs),), self.null_label, device=self.device)}

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(x.to(self.dtype), time, class_labels=condition.get("labels")).sample


@dataclass
class DiffusersUNet(_Labelled, DiscreteVP):
    """A discrete variance-preserving `UNet2DModel`.

    Attributes:
        null_label: label for the unconditional prediction. None if the model has no such label.
    """

    null_label: int | None = None


@dataclass
class FlowUNet(_Labelled, RectifiedFlow):
    """A `UNet2DModel` that predicts the velocity of a rectified flow.

    The time input of the network is T t with T time steps, as the flow-matching schedulers of diffusers give it.

    Attributes:
        null_label: label for the unconditional prediction. None if the model has no such label.
    """

    null_label: int | None = None

    def times(self, sigma: Sigma, x: Tensor) -> Tensor:
        assert self.flow is not None
        return (super().times(sigma, x) * self.flow.timesteps).float()


def load_diffusers_unet(
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    rounding: Literal["fractional", "nearest"] = "fractional",
) -> DiffusersUNet | FlowUNet:
    """Load a pixel-space U-Net pipeline. Only safetensors weights are supported.

    Args:
        source: path or hub id.
        device: device of the network.
        dtype: dtype of the network's weights.
        rounding: mapping from σ to a timestep, see `DiscreteVP`.

    Raises:
        UserError: if the folder is missing or incomplete, or its pipeline class is not supported.
    """
    return unet_model(open_checkpoint(source, LoadOptions()), device, dtype, rounding)


def unet_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    rounding: Literal["fractional", "nearest"] = "fractional",
    autoencoder: Autoencoder | None = None,
) -> DiffusersUNet | FlowUNet:
    """Load the U-Net of an opened pipeline. It is a rectified flow if its scheduler is one.

    Args:
        checkpoint: the opened pipeline.
        device: device of the network.
        dtype: dtype of the network's weights.
        rounding: mapping from σ to a timestep, see `DiscreteVP`.
        autoencoder: autoencoder of a latent model. None for a pixel-space model.

    Raises:
        UserError: see `Checkpoint.load`, `read_schedule` and `check_channels`.
    """
    from diffusers import UNet2DModel

    source, card = checkpoint.source, checkpoint.card
    checkpoint.require("unet", "UNet2DModel")
    config = checkpoint.fields("unet", UNet2DModel)
    schedule = load_any_schedule(checkpoint)
    channels = check_channels(source, config, schedule)
    height, width = config.sides("sample_size")
    embeds = config.integer_or_none("num_class_embeds", 0, MAX_CLASSES)
    null_label, classes = (card.get("null_label"), card.get("classes") or embeds) if embeds else (None, None)
    if embeds and max(classes or 0, 0 if null_label is None else null_label + 1) > embeds:
        raise UserError(
            f"{source}: its card has {classes} classes and the null label {null_label}, but the network has only "
            f"{embeds} class embeddings."
        )
    part = checkpoint.load("unet", UNet2DModel, dtype, device)
    shape = (channels, height, width)
    classifier = checkpoint.folder / "classifier"
    shared: dict[str, Any] = {
        "network": part.module,
        "shape": shape,
        "device": device,
        "dtype": dtype,
        "autoencoder": autoencoder,
        "classes": classes,
        "null": null_label is not None,
        "null_label": null_label,
        "classifier_folder": str(classifier) if classifier.is_dir() else "",
        **card_fields(checkpoint, part.module, classes),
    }
    identity = identity_of(checkpoint, part.sha256)
    if isinstance(schedule, FlowSchedule):
        return FlowUNet(**shared, **flow_fields(schedule), identity=identity | flow_identity(schedule))
    return DiffusersUNet(
        **shared,
        levels=schedule.levels,
        process=VARIANCE_PRESERVING,
        clip=schedule.clip,
        clip_range=schedule.clip_range,
        learned_variance=schedule.variance == "learned_range",
        doubled=schedule.doubled,
        identity=identity | schedule.identity | {"rounding": rounding},
        preconditioning=schedule.preconditioning,
        rounding=rounding,
    )


def load_schedule(checkpoint: Checkpoint) -> Schedule:
    """Read the noise schedule of a pipeline from its scheduler folder.

    Raises:
        UserError: see `read_schedule`.
    """
    name = checkpoint.kind("scheduler")
    config = checkpoint.config("scheduler", file="scheduler_config.json")
    return read_schedule(name, config, checkpoint.source)


def load_any_schedule(checkpoint: Checkpoint) -> Schedule | FlowSchedule:
    """Read the noise schedule, or the schedule of a rectified flow, of a pipeline from its scheduler folder.

    Raises:
        UserError: see `read_schedule` and `read_flow_schedule`.
    """
    name = checkpoint.kind("scheduler")
    config = checkpoint.config("scheduler", file="scheduler_config.json")
    if is_flow(name, config):
        return read_flow_schedule(name, config, checkpoint.source)
    return read_schedule(name, config, checkpoint.source)


def check_channels(source: str, config: Fields, schedule: Schedule | FlowSchedule) -> int:
    """Return the number of input channels of a network.

    Args:
        source: path or hub id, for error messages.
        config: configuration of the network.
        schedule: schedule. The variance type of a noise schedule determines the number of output channels.

    Raises:
        UserError: if the number of output channels does not match the variance type.
    """
    channels, out = (config.integer(key, 1, MAX_CHANNELS) for key in ("in_channels", "out_channels"))
    if isinstance(schedule, FlowSchedule):
        if out != channels:
            raise UserError(
                f"{source}: the network has {out} output channels; a rectified flow with {channels} input channels "
                f"requires {channels}."
            )
        return channels
    wanted = channels * (2 if schedule.doubled else 1)
    if out != wanted:
        raise UserError(
            f"{source}: the network has {out} output channels, but variance type {schedule.variance} with {channels} "
            f"input channels requires {wanted}."
        )
    return channels


def identity_of(checkpoint: Checkpoint, weights: str) -> dict[str, Any]:
    """The protocol fields for the origin of a model."""
    return {
        "source": checkpoint.source,
        "pipeline": checkpoint.pipeline,
        "revision": checkpoint.revision,
        "variant": checkpoint.options.variant or "",
        "weights": weights,
    }


def card_fields(checkpoint: Checkpoint, network: torch.nn.Module, classes: int | None = None) -> dict[str, Any]:
    """The fields of a model about its training, from the samplerbench card if there is one.

    Args:
        checkpoint: the opened pipeline.
        network: the network.
        classes: number of labels of the model. None for a model without labels, which has no class names.

    Raises:
        UserError: if the card has class names for another number of classes.
    """
    card, data = checkpoint.card, checkpoint.card.get("data", {})
    names = () if classes is None else tuple(data.get("class_names") or ())
    if names and len(names) != classes:
        raise UserError(
            f"{checkpoint.source} has a damaged card: {CARD} has {len(names)} class names, but the model has "
            f"{classes} classes."
        )
    return {
        "data": data.get("source") or data.get("name"),
        "features": card.get("feature_space"),
        "class_counts": data.get("class_counts"),
        "class_names": names,
        "notes": {
            "parameters": f"{sum(p.numel() for p in network.parameters()):,}",
            "data": f"{data['name']} ({data.get('split')}), {data.get('images')} images" if data else "not stated",
            "trained by": card.get("command", "not stated"),
        },
    }
