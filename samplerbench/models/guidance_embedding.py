"""The guidance scale as an input of a distilled network (Meng et al. 2023; Luo et al. 2023, section 4.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from samplerbench.errors import UserError, argument
from samplerbench.limits import MAX_CHANNELS
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.fields import Fields

DEFAULTS = {"LatentConsistencyModelPipeline": 8.5}
"""Default guidance scale of the pipelines of diffusers."""
DEFAULT = 7.5


def guidance_scale_embedding(guidance_scale: float, dimension: int) -> Tensor:
    """Compute the sinusoidal embedding of w = guidance_scale - 1.

    (sin(1000 w f_k), cos(1000 w f_k)) with f_k = 10000^(-k/(h-1)), k = 0 … h-1, and h = ⌊d/2⌋, followed by a 0 if d is
    odd.

    Args:
        guidance_scale: guidance scale; 1 is no guidance.
        dimension: dimension d ≥ 4 of the embedding, `time_cond_proj_dim` of the network.

    Returns:
        The embedding, (1, d) float32.
    """
    half = dimension // 2
    # float32 throughout, as in diffusers: the angles reach 1000 w, so rounding is visible.
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.tensor(math.log(10000.0)) / (half - 1)))
    angles = torch.tensor([guidance_scale - 1]) * 1000.0 * frequencies
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, dimension % 2))[None]


def embedded_guidance(checkpoint: Checkpoint, config: Fields) -> tuple[float | None, Tensor | None]:
    """Read the guidance scale of a network that takes it as an input.

    Args:
        checkpoint: the opened pipeline.
        config: configuration of the network.

    Returns:
        The guidance scale and its embedding, (1, d). (None, None) for a network without this input.

    Raises:
        UserError: if a scale is given for a network without this input.
    """
    given = checkpoint.options.embedded_guidance
    dimension = config.integer_or_none("time_cond_proj_dim", 4, MAX_CHANNELS)
    if dimension is None:
        if given is not None:
            raise UserError(
                f"{argument('embedded_guidance', given)} requires a distilled network that takes the guidance scale as "
                f"an input, but {checkpoint.source} is not one; use {argument('guidance')} instead."
            )
        return None, None
    scale = DEFAULTS.get(checkpoint.pipeline, DEFAULT) if given is None else given
    return scale, guidance_scale_embedding(scale, dimension)
