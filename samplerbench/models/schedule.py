"""Noise schedules of discrete variance-preserving models, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from samplerbench.errors import UserError


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """ᾱ_t for t = 0 … T-1 from a diffusers scheduler's configuration, (T,) float64, decreasing.

    diffusers computes the same tables in float32, which alone moves a sample by 2e-4 to 5e-4 over 50 to 1000 steps.
    Source: Ho et al. 2020 (linear), Rombach et al. 2022 (scaled_linear), Nichol & Dhariwal 2021 eq. 17
    (squaredcos_cap_v2), Xu et al. 2022 (sigmoid), Lin et al. 2024 algorithm 1 (rescale_betas_zero_snr).

    Raises:
        UserError: a schedule that is not one of these.
    """
    steps = int(config.get("num_train_timesteps", 1000))
    name = config.get("beta_schedule", "linear")
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    trained = config.get("trained_betas")
    if trained is not None:
        betas = torch.as_tensor(trained, dtype=torch.float64)
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
            f'the beta schedule "{name}" is not known; known are linear, scaled_linear, squaredcos_cap_v2, sigmoid '
            "and trained_betas."
        )
    bars = torch.cumprod(1 - betas, dim=0)
    if config.get("rescale_betas_zero_snr", False):
        roots = bars.sqrt()
        roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
        # An ᾱ of exactly 0 is an infinite σ. diffusers' own floor keeps the terminal level finite.
        bars = (roots**2).clamp(min=2.0**-24)
    return bars


def noise_levels(bars: Tensor) -> Tensor:
    """σ_t = √(1-ᾱ_t)/√ᾱ_t: the noise level of timestep t in variance-exploding coordinates, increasing."""
    return ((1 - bars) / bars).sqrt()
