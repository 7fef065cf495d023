"""Adaptive projected guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from samplerbench.sampling import (
    ConditionalDenoiser,
    Denoiser,
    Guidance,
    Prediction,
    Sigma,
    coefficient,
    option,
    per_sample,
)


@dataclass(frozen=True)
class AdaptiveProjected(Guidance):
    """Adaptive projected guidance (Sadat, Hilliges & Weber 2024, algorithm 1):  D_c + (g-1) (Δ⊥ + η Δ∥).

    Δ ← D_c - D_u + β Δ' is the update with momentum, where Δ' is Δ of the previous evaluation. Δ is shortened to the
    norm r if it is longer. Δ∥ is its component along D_c, which causes oversaturation, and Δ⊥ the orthogonal one. The
    norms and products are over all values of a sample. The paper uses η = 0, β from -0.25 to -0.75, and an r that
    depends on the number of values. With η = 1, β = 0 and r = 0 it is classifier-free guidance.
    The momentum belongs to a trajectory: it starts at 0, and starts again when σ increases, as in a restart or after a
    rejected step. Two evaluations per image, except for g = 1.
    """

    needs_condition: ClassVar[bool] = True
    needs_unconditional: ClassVar[bool] = True

    scale: float = option(4.0, "g: 1 is the conditional model, more is nearer to the label", ge=0.0)
    eta: float = option(0.0, "η: weight of the component along the conditional prediction", ge=0.0, le=1.0)
    momentum: float = option(-0.5, "β: weight of the update of the previous evaluation", gt=-1.0, lt=1.0)
    threshold: float = option(0.0, "r: largest norm of the update; 0: no limit", ge=0.0)
    clip: Literal["after", "before"] = option(
        "after", "whether a model that clips x₀ clips the guided one, or the one that is guided"
    )

    @property
    def evaluations(self) -> int:
        return 1 if self.scale == 1 else 2

    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        return self.guide(denoise).predict(x, sigma)

    def guide(self, denoise: ConditionalDenoiser) -> Denoiser:
        return _Projected(self, denoise, _Momentum(len(denoise.inputs)))

    def combine(self, given: Tensor, update: Tensor) -> Tensor:
        """The guided prediction, (B, C, H, W).

        Args:
            given: conditional prediction D_c, (B, C, H, W).
            update: Δ with momentum, (B, C, H, W).
        """
        dims = tuple(range(1, update.ndim))
        if self.threshold > 0:
            norm = torch.linalg.vector_norm(update, dim=dims, keepdim=True)
            update = update * (self.threshold / norm).clamp(max=1)
        length = torch.linalg.vector_norm(given, dim=dims, keepdim=True)
        direction = given / length.clamp(min=1e-12)
        along = (update * direction).sum(dim=dims, keepdim=True) * direction
        return given + (self.scale - 1) * (update - along + self.eta * along)


class _Momentum:
    """The state of the trajectories of a batch: Δ of the previous evaluation of each sample, and its noise level."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.update: Tensor | None = None
        self.sigma: Tensor | None = None

    def add(self, change: Tensor, sigma: Sigma, beta: float, index: Tensor | None) -> Tensor:
        """Return Δ with momentum, and store it.

        Args:
            change: D_c - D_u, (k, C, H, W).
            sigma: noise level of each row or of all rows.
            beta: weight of the stored Δ.
            index: rows of the batch, (k,) int64. None for all rows.
        """
        level = per_sample(sigma, change)
        if self.update is None or self.sigma is None:
            self.update = change.new_zeros(self.batch, *change.shape[1:])
            self.sigma = level.new_full((self.batch,), torch.inf)
        before, last = (self.update, self.sigma) if index is None else (self.update[index], self.sigma[index])
        weight = coefficient(beta * (level <= last).to(level.dtype), change)
        update = (change + weight * before).detach()
        if index is None:
            self.update, self.sigma = update, level
        else:
            self.update = self.update.index_copy(0, index, update)
            self.sigma = self.sigma.index_copy(0, index, level)
        return update


class _Projected(Denoiser):
    """The guided denoiser of one trajectory per sample."""

    def __init__(
        self, guidance: AdaptiveProjected, inner: ConditionalDenoiser, state: _Momentum, index: Tensor | None = None
    ) -> None:
        self.guidance, self.inner, self.state, self.index = guidance, inner, state, index
        self.levels, self.process, self.prediction = inner.levels, inner.process, inner.prediction

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        if self.guidance.scale == 1:
            return self.inner.conditional(x, sigma)
        free, given = self.inner.both(x, sigma)
        update = given.x0 - free.x0
        if self.guidance.momentum:
            update = self.state.add(update, sigma, self.guidance.momentum, self.index)
        return Prediction(self.guidance.combine(given.x0, update), given.variance, free.x0)

    def rows(self, index: Tensor) -> Denoiser:
        whole = index if self.index is None else self.index[index]
        return _Projected(self.guidance, self.inner.rows(index), self.state, whole)
