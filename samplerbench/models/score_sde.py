"""Variance-exploding `UNet2DModel` checkpoints: the score networks of `ScoreSdeVePipeline`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.limits import MAX_STEPS, MAX_TIMESTEPS
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.diffusers_unet import card_fields, check_channels, identity_of
from samplerbench.models.model import Condition, Model
from samplerbench.models.preconditioning import SCORE
from samplerbench.models.schedule import Schedule
from samplerbench.sampling.process import VARIANCE_EXPLODING

DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 2000,
    "snr": 0.15,
    "sigma_min": 0.01,
    "sigma_max": 1348.0,
    "correct_steps": 1,
}
"""Defaults of diffusers for missing keys."""


@dataclass
class ScoreSDE(Model):
    """An unconditional score network s(x, σ) for x = x₀ + σ z: D = x + σ² s(x, σ).

    States at σ = 0 are images in [0, 1]. `decode` maps them to [-1, 1].
    Source: Song et al. 2021, section 3.4 and appendix C (VE SDE).
    """

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(x.to(self.dtype), time.to(self.dtype)).sample

    def decode(self, x: Tensor) -> Tensor:
        return 2 * x - 1

    def encode(self, images: Tensor) -> Tensor:
        return (images + 1) / 2


def geometric_levels(sigma_min: float, sigma_max: float, steps: int) -> Tensor:
    """Compute σ_i = σ_min (σ_max/σ_min)^(i/(T-1)) (Song et al. 2021, appendix C).

    Args:
        sigma_min: smallest noise level.
        sigma_max: largest noise level.
        steps: number of noise levels, T.

    Returns:
        The noise levels, (T,) float64, increasing.
    """
    share = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
    return sigma_min * (sigma_max / sigma_min) ** share


def load_score_sde(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> ScoreSDE:
    """Load the score network of an opened `ScoreSdeVePipeline`.

    Args:
        checkpoint: the opened pipeline.
        device: device of the network.
        dtype: dtype of the network's weights.

    Raises:
        UserError: if the network is class-conditional. See also `Checkpoint.load`.
    """
    from diffusers import UNet2DModel

    source, config = checkpoint.source, checkpoint.fields("unet", UNet2DModel)
    given = checkpoint.fields("scheduler", file="scheduler_config.json")
    timesteps = given.integer("num_train_timesteps", 1, MAX_TIMESTEPS, DEFAULTS["num_train_timesteps"])
    correct_steps = given.integer("correct_steps", 0, MAX_STEPS, DEFAULTS["correct_steps"])
    sigma_min, sigma_max, snr = (
        given.number(key, 1e-12, 1e12, DEFAULTS[key]) for key in ("sigma_min", "sigma_max", "snr")
    )
    if sigma_min >= sigma_max:
        raise UserError(f"{given.where}: sigma_min {sigma_min:g} must be less than sigma_max {sigma_max:g}.")
    levels = geometric_levels(sigma_min, sigma_max, timesteps)
    channels = check_channels(source, config, Schedule(levels, "epsilon", False, 1.0, "fixed", {}))
    if config.values.get("num_class_embeds") or config.values.get("class_embed_type"):
        raise UserError(f"{source}: a variance-exploding network with class labels is not supported.")
    height, width = config.sides("sample_size")
    part = checkpoint.load("unet", UNet2DModel, dtype, device)
    made = card_fields(checkpoint, part.module)
    made["notes"] |= {"its own sampler": f"pc:M={correct_steps},snr={snr:g}"}
    return ScoreSDE(
        network=part.module,
        shape=(channels, height, width),
        levels=levels,
        process=VARIANCE_EXPLODING,
        preconditioning=SCORE,
        device=device,
        dtype=dtype,
        identity=identity_of(checkpoint, part.sha256)
        | {
            "prediction": "score",
            "schedule": "geometric in σ",
            "sigma_min": sigma_min,
            "sigma_max": sigma_max,
            "timesteps": len(levels),
        },
        **made,
    )
