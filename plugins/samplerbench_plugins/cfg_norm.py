"""Classifier-free guidance with the norm of the conditional output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from samplerbench.sampling import ConditionalDenoiser, Guidance, Prediction, Sigma, coefficient, option


@dataclass(frozen=True)
class NormalisedClassifierFree(Guidance):
    """Classifier-free guidance whose output keeps the norm of the conditional one:  v = v_g ‖v_c‖/‖v_g‖.

    v_g = v_u + g (v_c - v_u) is the guided output of the network: the velocity of a rectified flow, and ε of other
    models. The norm is over the `width` of an image, as in the pipeline of Lumina-Image 2.0 (Qin et al. 2025), over all
    channels of a `patch` of 2x2 latents, as in that of Qwen-Image (Wu et al. 2025), or over the whole `sample`, as in
    that of Z-Image, with shrink=true. Two evaluations
    per image, except for g = 1.
    """

    needs_condition: ClassVar[bool] = True
    needs_unconditional: ClassVar[bool] = True

    scale: float = option(4.0, "g: 1 is the conditional model, more is nearer to the prompt", ge=0.0)
    over: Literal["width", "patch", "sample"] = option("sample", "what each norm is computed over")
    shrink: bool = option(False, "only shorten the output, where it is longer than the conditional one")

    @property
    def evaluations(self) -> int:
        return 1 if self.scale == 1 else 2

    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        if self.scale == 1:
            return denoise.conditional(x, sigma)
        free, given = denoise.both(x, sigma)
        # y - D = t v for a rectified flow, and x - D = σ ε otherwise; the factor has no effect on the ratio of norms.
        base = x * coefficient(denoise.alpha(sigma), x) if denoise.process.ends else x  # type: ignore[arg-type]
        output = base - (free.x0 + self.scale * (given.x0 - free.x0))
        norm, guided = self._norm(base - given.x0), self._norm(output)
        ratio = torch.where(guided > 0, norm / guided, torch.ones_like(guided))
        return Prediction(base - output * (ratio.clamp(max=1) if self.shrink else ratio), given.variance)

    def _norm(self, output: Tensor) -> Tensor:
        """The norms of an output (B, C, H, W), in a shape that broadcasts with it."""
        if self.over == "width":
            return torch.linalg.vector_norm(output, dim=-1, keepdim=True)
        if self.over == "sample":
            return torch.linalg.vector_norm(output, dim=(1, 2, 3), keepdim=True)
        height, width = output.shape[2:]
        squares = torch.nn.functional.pad(output.square().sum(dim=1, keepdim=True), (0, width % 2, 0, height % 2))
        rows, columns = squares.shape[2] // 2, squares.shape[3] // 2
        sums = squares.reshape(len(output), 1, rows, 2, columns, 2).sum(dim=(3, 5)).sqrt()
        return sums.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[:, :, :height, :width]
