"""Align Your Steps: published noise levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from samplerbench.sampling import Spacing, option

LEVELS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034),
}
"""The published levels for 10 steps, without the last level 0."""


@dataclass(frozen=True)
class AlignYourSteps(Spacing):
    """The published levels of Align Your Steps for three models (Sabour et al. 2024), for any number of steps.

    The lists are for 10 steps. For another number, the logarithms of the ten levels are interpolated linearly, and 0
    is appended. The levels are those of the named model, also if the sampled model is another one.
    """

    model: Literal["sd15", "sdxl", "svd"] = option(
        "sd15", "model of the list: Stable Diffusion 1.5, XL, or Video", positional=True
    )

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        known = np.log(LEVELS[self.model])
        at = np.linspace(0.0, len(known) - 1.0, steps)
        sigmas = np.exp(np.interp(at, np.arange(len(known)), known))
        if steps == len(known):
            sigmas = np.array(LEVELS[self.model])
        return torch.tensor([*sigmas.tolist(), 0.0], dtype=torch.float64)
