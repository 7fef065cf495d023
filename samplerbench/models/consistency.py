"""Consistency models in pixel space: `ConsistencyModelPipeline` checkpoints (Song et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.limits import MAX_CHANNELS, MAX_CLASSES, MAX_TIMESTEPS
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.diffusers_unet import card_fields, identity_of
from samplerbench.models.edm import edm_levels
from samplerbench.models.model import Condition, Model
from samplerbench.models.preconditioning import consistency
from samplerbench.sampling.process import VARIANCE_EXPLODING

SCHEDULER = "CMStochasticIterativeScheduler"
DEFAULTS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}
"""Defaults of diffusers for missing keys."""


@dataclass
class ConsistencyModel(Model):
    """A `UNet2DModel` with the boundary condition of consistency models, D(x, σ_min) = x.

    D is the consistency function f(x, σ), an estimate of the end of the probability-flow ODE. It is not E[x₀ | x], so
    the sampler is `consistency`. Other samplers run, but do not solve the ODE of the data.
    """

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(x.to(self.dtype), time, class_labels=condition.get("labels")).sample


def load_consistency(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> ConsistencyModel:
    """Load the U-Net of an opened `ConsistencyModelPipeline`.

    Its noise levels are the T levels of CMStochasticIterativeScheduler: Karras et al. 2022, eq. 5, with ρ = 7.

    Args:
        checkpoint: the opened pipeline.
        device: device of the network.
        dtype: dtype of the network's weights.

    Raises:
        UserError: if the network, the scheduler or a setting is not supported. See also `Checkpoint.load`.
    """
    from diffusers import UNet2DModel

    source = checkpoint.source
    checkpoint.require("unet", "UNet2DModel")
    checkpoint.require("scheduler", SCHEDULER)
    checkpoint.check_variant(["unet"])
    config = checkpoint.fields("unet", UNet2DModel)
    given = checkpoint.fields("scheduler", file="scheduler_config.json")
    timesteps = given.integer("num_train_timesteps", 2, MAX_TIMESTEPS, 40)
    settings = {key: given.number(key, 1e-12, 1e12, default) for key, default in DEFAULTS.items()}
    if settings["sigma_min"] >= settings["sigma_max"]:
        raise UserError(
            f"{given.where}: sigma_min {settings['sigma_min']:g} must be less than sigma_max {settings['sigma_max']:g}."
        )
    channels, out = (config.integer(key, 1, MAX_CHANNELS, 3) for key in ("in_channels", "out_channels"))
    if channels != out:
        raise UserError(f"{source}: the network has {out} output channels; a consistency model requires {channels}.")
    classes = config.integer_or_none("num_class_embeds", 0, MAX_CLASSES) or None
    height, width = config.sides("sample_size")
    clip = given.flag("clip_denoised", True)
    part = checkpoint.load("unet", UNet2DModel, dtype, device)
    made = card_fields(checkpoint, part.module, classes)
    made["notes"] |= {"its own sampler": f"consistency:sigma_min={settings['sigma_min']:g}"}
    return ConsistencyModel(
        network=part.module,
        shape=(channels, height, width),
        levels=edm_levels(settings["sigma_min"], settings["sigma_max"], timesteps, settings["rho"]),
        process=VARIANCE_EXPLODING,
        preconditioning=consistency(settings["sigma_data"], settings["sigma_min"]),
        device=device,
        dtype=dtype,
        classes=classes,
        clip=clip,
        identity=identity_of(checkpoint, part.sha256)
        | {"prediction": "consistency", "timesteps": timesteps, "clip": clip and 1.0, **settings},
        **made,
    )
