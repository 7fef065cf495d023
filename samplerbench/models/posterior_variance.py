"""The posterior variance κ(σ) of a model, for samplers with an optimal reverse variance."""

from __future__ import annotations

import torch
from torch import Tensor

from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.view import ModelView

IMAGES = 1000
"""Number of real images for the estimate."""

AT_ONCE = 250
"""Images per batch. It changes only the last bits of the estimate."""


def posterior_variances(model: ModelView, sigmas: Tensor, images: int = IMAGES) -> tuple[dict[float, float], int]:
    """Estimate κ(σ) = E‖x₀ - D(x, σ)‖²/d from noised real images. For an exact D, κ(σ) = E tr Cov[x₀ | x]/d.

    The estimates are cached per model and noise level (Bao et al. 2022, eq. 8; 2022b, theorem 1).

    Args:
        model: the model.
        sigmas: noise levels, (N,). Levels equal to 0 are skipped.
        images: number of real images.

    Returns:
        κ for each noise level, and the network evaluations (rows) of the estimates.

    Raises:
        UserError: if the training data of the model is unknown or not available.
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
