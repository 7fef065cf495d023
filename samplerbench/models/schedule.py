"""Noise schedules of discrete variance-preserving models, in float64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.limits import MAX_TIMESTEPS
from samplerbench.models.fields import Fields
from samplerbench.models.preconditioning import DISCRETE, Preconditioning, latent_consistency
from samplerbench.models.timesteps import timestep_at, timesteps_at
from samplerbench.sampling.denoiser import PredictionType
from samplerbench.untrusted import shorten

VP_SCHEDULERS = (
    *("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "HeunDiscreteScheduler", "LCMScheduler", "TCDScheduler"),
)
"""Schedulers of diffusers whose configuration defines ᾱ. Their solver is not used."""

PREDICTIONS = ("epsilon", "v_prediction", "sample")

_SCHEDULE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    "rescale_betas_zero_snr",
)


@dataclass(frozen=True)
class Schedule:
    """The properties of a model that its scheduler configuration defines.

    Attributes:
        levels: noise levels σ_t, (T,) float64, increasing.
        prediction: prediction type of the network.
        clip: whether to clamp D to ±clip_range.
        clip_range: maximum absolute value of x₀.
        variance: variance type. A network with "learned" or "learned_range" has twice as many output channels.
        settings: settings that define the noise levels, for the protocol.
        timestep_scaling: timestep scaling of the boundary condition of latent consistency models. None if D has no
            boundary condition.
    """

    levels: Tensor
    prediction: PredictionType
    clip: bool
    clip_range: float
    variance: str
    settings: dict[str, Any]
    timestep_scaling: float | None = None

    @property
    def preconditioning(self) -> Preconditioning:
        """The parametrisation of the network, with the boundary condition of an `LCMScheduler`."""
        base = DISCRETE[self.prediction]
        if self.timestep_scaling is None:
            return base
        levels, log_levels = self.levels.tolist(), self.levels.log()

        def timestep(sigma: Any) -> Any:
            return timesteps_at(log_levels, sigma) if isinstance(sigma, Tensor) else timestep_at(levels, sigma)

        return latent_consistency(base, timestep, self.timestep_scaling)

    @property
    def doubled(self) -> bool:
        """Whether the second half of the output channels is a variance."""
        return self.variance in ("learned", "learned_range")

    @property
    def identity(self) -> dict[str, Any]:
        """The protocol fields of the schedule."""
        betas = self.settings.get("trained_betas")
        given = f"{self.settings['beta_start']:g} to {self.settings['beta_end']:g}" if betas is None else str(betas)
        return {
            "prediction": self.prediction,
            "schedule": "trained" if betas is not None else self.settings["beta_schedule"],
            "betas": given,
            "zero terminal SNR": bool(self.settings.get("rescale_betas_zero_snr", False)),
            "timesteps": len(self.levels),
            "clip": self.clip and self.clip_range,
            "variance": self.variance,
        } | ({} if self.timestep_scaling is None else {"timestep scaling": self.timestep_scaling})


def read_schedule(name: str, config: Mapping[str, Any], source: str) -> Schedule:
    """Read the schedule from the configuration of a diffusers scheduler.

    As in diffusers, missing keys use the defaults of the class, and unknown keys are ignored.

    Args:
        name: class name of the scheduler.
        config: its configuration.
        source: path or hub id, for error messages.

    Raises:
        UserError: if the scheduler, prediction type, β schedule or thresholding is not supported.
    """
    import diffusers

    if name not in VP_SCHEDULERS:
        raise UserError(
            f"{source} has the scheduler {name}; supported are the discrete variance-preserving schedulers "
            f"{', '.join(VP_SCHEDULERS)}."
        )
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    known = {p.name: config.get(p.name, p.default) for p in parameters.values() if p.name != "self"}
    fields = Fields(known, f"{source}: the configuration of its scheduler")
    if known["prediction_type"] not in PREDICTIONS:
        raise UserError(
            f"{source} predicts {shorten(str(known['prediction_type']))}; supported are {', '.join(PREDICTIONS)}."
        )
    if fields.flag("thresholding", False):
        raise UserError(
            f"{source} uses dynamic thresholding, which is not supported; set thresholding to false in "
            "scheduler/scheduler_config.json."
        )
    # TCDScheduler has the setting, but does not use it.
    clip = fields.flag("clip_sample", False) and name != "TCDScheduler"
    scaling = fields.number("timestep_scaling", 1e-12, 1e12, 10.0) if name == "LCMScheduler" else None
    if clip and scaling is not None:
        raise UserError(
            f"{fields.where}: clip_sample of an LCMScheduler is not supported; set it to false, as latent consistency "
            "models do."
        )
    settings = {key: known[key] for key in _SCHEDULE if key in known}
    levels = noise_levels(alphas_cumprod(settings, fields.where))
    if not (bool(levels.isfinite().all()) and float(levels[0]) > 0 and bool((levels[1:] >= levels[:-1]).all())):
        raise UserError(f"{fields.where}: its noise levels must be finite, positive and increasing with t.")
    return Schedule(
        levels=levels,
        prediction=cast(PredictionType, known["prediction_type"]),
        clip=clip,
        clip_range=fields.number("clip_sample_range", 1e-12, 1e12, 1.0),
        variance=str(fields.text("variance_type") or "fixed_small"),
        settings=settings,
        timestep_scaling=scaling,
    )


def alphas_cumprod(config: Mapping[str, Any], where: str = "the configuration") -> Tensor:
    """Compute ᾱ_t, t = 0 … T-1, from the configuration of a diffusers scheduler.

    diffusers computes ᾱ_t in float32. The rounding errors change a sample by 2e-4 to 5e-4 over 50 to 1000 steps.
    Source: Ho et al. 2020 (linear), Rombach et al. 2022 (scaled_linear), Nichol & Dhariwal 2021 eq. 17
    (squaredcos_cap_v2), Xu et al. 2022 (sigmoid), Lin et al. 2024 algorithm 1 (rescale_betas_zero_snr).

    Args:
        config: configuration of a diffusers scheduler. Missing keys use the defaults of DDPMScheduler.
        where: prefix of error messages.

    Returns:
        ᾱ_t, (T,) float64, decreasing.

    Raises:
        UserError: if the schedule is not supported, or a setting has the wrong type or is out of range.
    """
    given = config.get("trained_betas")
    # A scheduler object can store an array. A file contains a list.
    plain = given.tolist() if isinstance(given, np.ndarray | Tensor) else given
    fields = Fields({**config, "trained_betas": plain}, where)
    trained = fields.numbers("trained_betas", 0.0, 1.0, MAX_TIMESTEPS)
    name = fields.text("beta_schedule", "linear")
    steps = fields.integer("num_train_timesteps", 1, MAX_TIMESTEPS, 1000)
    start, end = fields.number("beta_start", 0.0, 1.0, 1e-4), fields.number("beta_end", 0.0, 1.0, 0.02)
    if trained is not None:
        betas = torch.tensor(trained, dtype=torch.float64)
    elif name == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    elif name == "scaled_linear":
        betas = torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2
    elif name == "squaredcos_cap_v2":
        grid = torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = torch.cos((grid + 0.008) / 1.008 * (math.pi / 2)) ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    elif name == "sigmoid":
        betas = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64)) * (end - start) + start
    else:
        raise UserError(
            f'{where}: the beta schedule "{shorten(str(name))}" is not supported; use linear, scaled_linear, '
            "squaredcos_cap_v2, sigmoid or trained_betas."
        )
    bars = torch.cumprod(1 - betas, dim=0)
    if fields.flag("rescale_betas_zero_snr", False):
        roots = bars.sqrt()
        roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
        # σ is infinite for ᾱ = 0. Use the same lower limit as diffusers, so that the last level is finite.
        bars = (roots**2).clamp(min=2.0**-24)
    return bars


def noise_levels(bars: Tensor) -> Tensor:
    """Compute σ_t = √(1-ᾱ_t)/√ᾱ_t, the noise levels in variance-exploding coordinates.

    Args:
        bars: ᾱ_t, (T,), decreasing.

    Returns:
        σ_t, (T,), increasing.
    """
    return ((1 - bars) / bars).sqrt()
