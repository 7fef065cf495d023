"""Classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from samplerbench.sampling import ConditionalDenoiser, Guidance, Prediction, Sigma, option


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6):  D_u + g (D_c - D_u).

    g = 1 + w in the paper's w, and `guidance_scale` in diffusers. One batch of 2B: two evaluations per image, except
    for g = 1, the conditional model, and g = 0, the unconditional one, which cost one. A learned variance is the
    conditional prediction's.
    """

    needs_condition: ClassVar[bool] = True
    needs_unconditional: ClassVar[bool] = True

    scale: float = option(2.0, "g: 1 is the conditional model, more is nearer to the label", ge=0.0)
    clip: Literal["after", "before"] = option(
        "after", "whether a model that clips x₀ clips the guided one, or the one that is guided"
    )

    @property
    def evaluations(self) -> int:
        return 1 if self.scale in (0, 1) else 2

    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        if self.scale == 1:
            return denoise.conditional(x, sigma)
        if self.scale == 0:
            return denoise.unconditional(x, sigma)
        free, given = denoise.both(x, sigma)
        return Prediction(free.x0 + self.scale * (given.x0 - free.x0), given.variance, free.x0)
