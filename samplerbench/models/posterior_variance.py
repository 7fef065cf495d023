"""The posterior variance κ(σ) of a model, for samplers with an optimal reverse variance."""

from __future__ import annotations

import torch
from torch import Tensor

from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.view import ModelView

IMAGES = 1000
"""Real images that the estimate is made of."""

AT_ONCE = 250
"""Images per batch. The estimate depends on it in the last bits alone."""


def posterior_variances(model: ModelView, sigmas: Tensor, images: int = IMAGES) -> tuple[dict[float, float], int]:
    """κ(σ) = E‖x₀ - D(x, σ)‖²/d at each level, from noised real images: E tr Cov[x₀ | x]/d for a perfect D.

    Estimated once per model and level, and kept in the user's cache (Bao et al. 2022, eq. 8; 2022b, theorem 1).

    Args:
        model: the model.
        sigmas: (N,), noise levels; those that are 0 are left out.
        images: how many real images are noised.

    Returns:
        κ by level, and the network evaluations (rows) that the estimates took.

    Raises:
        UserError: the model does not say what it was trained on, or its data is not available.
    """
    real: list[tuple[Tensor, Tensor | None]] = []

    def error(sigma: float) -> float:
        if not real:
            real.append(model.real(images))
        return _denoising_error(model, sigma, *real[0])

    with model.estimates("posterior-variance", images=images) as known:
        wanted = [s for s in sigmas.tolist() if s > 0]
        return {s: known.get(repr(s), lambda s=s: error(s)) for s in wanted}, known.evaluations  # type: ignore[misc]


@torch.no_grad()
def _denoising_error(model: ModelView, sigma: float, x0: Tensor, labels: Tensor | None) -> float:
    total = 0.0
    for first in range(0, len(x0), AT_ONCE):
        part = x0[first : first + AT_ONCE].to(model.device)
        index = torch.arange(first, first + len(part), device=model.device)
        z = normal(0, Purpose.ESTIMATE, index, 0, model.shape).to(part.dtype)
        given = labels[first : first + AT_ONCE].to(model.device) if labels is not None and model.classes else None
        denoised = model.denoiser(Inputs(len(part), given))(part + sigma * z, sigma)
        total += float((part - denoised).double().square().sum())
    return total / x0.numel()
