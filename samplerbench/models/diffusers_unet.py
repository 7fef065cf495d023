"""`UNet2DModel` checkpoints, unconditional or class-conditional, of pixels or of an autoencoder's latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.models.checkpoint import Checkpoint, open_checkpoint, square
from samplerbench.models.discrete import DiscreteVP
from samplerbench.models.files import LoadOptions
from samplerbench.models.latent import Autoencoder
from samplerbench.models.model import Condition
from samplerbench.models.preconditioning import DISCRETE
from samplerbench.models.schedule import Schedule, read_schedule
from samplerbench.sampling.process import VARIANCE_PRESERVING


@dataclass
class DiffusersUNet(DiscreteVP):
    """A discrete variance-preserving `UNet2DModel`.

    null_label: the label that means "none".
    """

    null_label: int | None = None

    def condition(self, labels: Tensor | None) -> Condition:
        if labels is None or self.classes is None:
            return {}
        return {"labels": labels.to(self.device)}

    def null_condition(self, batch: int) -> Condition:
        if self.null_label is None:
            return {}
        return {"labels": torch.full((batch,), self.null_label, device=self.device)}

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(x.to(self.dtype), time, class_labels=condition.get("labels")).sample


def load_diffusers_unet(
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    rounding: Literal["fractional", "nearest"] = "fractional",
) -> DiffusersUNet:
    """The pixel-space U-Net pipeline in a folder or on the hub, as a model. Weights are read from safetensors only.

    Raises:
        UserError: a folder that is missing, incomplete, or of a class that is not supported.
    """
    return unet_model(open_checkpoint(source, LoadOptions()), device, dtype, rounding)


def unet_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    rounding: Literal["fractional", "nearest"] = "fractional",
    autoencoder: Autoencoder | None = None,
) -> DiffusersUNet:
    """The U-Net of an opened pipeline, of pixels, or of an autoencoder's latents where there is one.

    Raises:
        UserError: what `Checkpoint.load`, `read_schedule` and `check_channels` raise.
    """
    from diffusers import UNet2DModel

    source, card = checkpoint.source, checkpoint.card
    checkpoint.require("unet", "UNet2DModel")
    config = checkpoint.config("unet", UNet2DModel)
    schedule = load_schedule(checkpoint)
    check_channels(source, config, schedule)
    height, width = square(config, source, "unet")
    part = checkpoint.load("unet", UNet2DModel, dtype, device)
    shape = (config["in_channels"], height, width)
    embeds = config.get("num_class_embeds")
    null_label = card.get("null_label") if embeds else None
    classifier = checkpoint.folder / "classifier"
    return DiffusersUNet(
        network=part.module,
        shape=shape,
        levels=schedule.levels,
        process=VARIANCE_PRESERVING,
        device=device,
        dtype=dtype,
        autoencoder=autoencoder,
        classes=(card.get("classes") or embeds) if embeds else None,
        null=null_label is not None,
        clip=schedule.clip,
        clip_range=schedule.clip_range,
        learned_variance=schedule.variance == "learned_range",
        doubled=schedule.doubled,
        default_classifier=str(classifier) if classifier.is_dir() else "",
        identity=identity_of(checkpoint, part.sha256) | schedule.identity | {"rounding": rounding},
        preconditioning=DISCRETE[schedule.prediction],
        rounding=rounding,
        null_label=null_label,
        **card_fields(checkpoint, part.module),
    )


def load_schedule(checkpoint: Checkpoint) -> Schedule:
    """The schedule in a pipeline's scheduler folder. Raises UserError."""
    name = checkpoint.kind("scheduler")
    config = checkpoint.config("scheduler", file="scheduler_config.json")
    return read_schedule(name, config, checkpoint.source)


def check_channels(source: str, config: dict[str, Any], schedule: Schedule) -> None:
    """Raise UserError where a network's output has not the channels that its variance type asks for."""
    channels = config["in_channels"]
    wanted = channels * (2 if schedule.doubled else 1)
    if config["out_channels"] != wanted:
        raise UserError(
            f"{source}: the network has {config['out_channels']} output channels, but variance type "
            f"{schedule.variance} with {channels} channels of input needs {wanted}."
        )


def identity_of(checkpoint: Checkpoint, weights: str) -> dict[str, Any]:
    """What the protocol says of where a model comes from."""
    return {
        "source": checkpoint.source,
        "pipeline": checkpoint.pipeline,
        "revision": checkpoint.revision,
        "variant": checkpoint.options.variant or "",
        "weights": weights,
    }


def card_fields(checkpoint: Checkpoint, network: torch.nn.Module) -> dict[str, Any]:
    """What a model knows of its training, from this project's card where it has one."""
    card, data = checkpoint.card, checkpoint.card.get("data", {})
    return {
        "data": data.get("source") or data.get("name"),
        "features": card.get("feature_space"),
        "class_counts": data.get("class_counts"),
        "notes": {
            "parameters": f"{sum(p.numel() for p in network.parameters()):,}",
            "data": f"{data['name']} ({data.get('split')}), {data.get('images')} images" if data else "not stated",
            "trained by": card.get("command", "not stated"),
        },
    }
