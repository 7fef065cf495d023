"""Samplers for inverse problems whose steps are made in the singular directions of A."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from samplerbench.sampling import SVD, Denoiser, ModelView, Noise, Observation, Regime, Step, intervals, option
from samplerbench_plugins.task_sampler import (
    TaskSampler,
    observed,
    time_travel,
    time_travel_evaluations,
)


@dataclass(frozen=True)
class SpectralSampler(TaskSampler, ABC):
    """Base of samplers that require the singular value decomposition of the task."""

    factors: ClassVar[SVD]

    def check_task(self, observation: Observation) -> None:
        observation.svd(f"sampler {self.label()}")

    def bind(self, model: ModelView, sigmas: Tensor) -> Self:
        assert model.observation is not None
        return super().bind(model, sigmas).with_state(factors=model.observation.svd(f"sampler {self.label()}"))

    def in_range(self, x: Tensor, y: Tensor) -> _Range:
        """The singular directions for a batch of states x and observations y."""
        values = self.factors.values.to(x.device)
        known = values > 0
        safe = values.where(known, torch.ones_like(values))
        target = (self.factors.u_adjoint(y) / safe.to(x.dtype)) * known
        return _Range(self.factors, known, self.task.sigma / safe, target, x.dtype)


@dataclass(frozen=True, eq=False)
class _Range:
    """The singular directions of A in one batch.

    Attributes:
        factors: the decomposition.
        known: whether the singular value s of each direction is above 0.
        noise: σ_y/s, the noise level of the observation in each direction, float64. 0 for σ_y = 0.
        target: Uᵀ y/s, the observation in each direction.
        dtype: dtype of the states.
    """

    factors: SVD
    known: Tensor
    noise: Tensor
    target: Tensor
    dtype: torch.dtype

    def of(self, x: Tensor) -> Tensor:
        """The coordinates Vᵀ x."""
        return self.factors.v_adjoint(x)

    def cast(self, numbers: Tensor) -> Tensor:
        """Coefficients in the dtype of the states."""
        return numbers.to(self.dtype)

    def moved(self, x: Tensor, coordinates: Tensor) -> Tensor:
        """Return x with other coordinates in the observed directions: x + V (c - Vᵀ x)."""
        return x + self.factors.v((coordinates - self.of(x)) * self.known)


@dataclass(frozen=True)
class DDRM(SpectralSampler):
    """Denoising diffusion restoration models (Kawar et al. 2022, eq. 7 and 8).

    In each singular direction of A, with singular value s, ȳ = (Uᵀy)/s of noise σ_y/s, D̄ = Vᵀ D and z ~ N(0, I), the
    state at level t is drawn as
    s = 0:         D̄ + √(1-η²) (t/σ)(x̄ - D̄) + η t z, from the state x̄ at level σ,
    t < σ_y/s:     D̄ + √(1-η²) (t s/σ_y)(ȳ - D̄) + η t z,
    t ≥ σ_y/s:     (1-η_b) D̄ + η_b ȳ + √(t² - η_b² σ_y²/s²) z.
    The first state is ȳ + √(σ² - σ_y²/s²) z. The task must have a singular value decomposition. The defaults are the
    paper's. The paper makes 20 steps. With more steps, the deviation of the unobserved directions approaches
    √((1 + √(1-η²))/2) of that of a Gaussian prior, because η does not depend on the step size. With η = 0 and σ_y = 0
    the result is exact for a Gaussian whose covariance commutes with A⁺ A, in the limit of many steps.
    """

    eta: float = option(0.85, "η, part of new noise in a step", ge=0.0, le=1.0)
    eta_b: float = option(1.0, "η_b, weight of y while the state is noisier than y", ge=0.0, le=1.0)

    def posterior_regime(self) -> Regime | None:
        return Regime(any_task=False, noise=False, covariance=self.eta == 0) if self.eta_b == 1 else None

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        y = self.in_range(x, observed(denoise, x))
        top = float(sigmas[0])
        shrink = (1 - (y.noise / top) ** 2).clamp(min=0).sqrt()
        started = y.target + y.cast(shrink) * y.of(x)
        x = y.moved(x, torch.where(y.noise < top, started, y.of(x)))
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            z = noise() if t > 0 else torch.zeros_like(x)
            x = self._step(x, x0, z, s, t, y)
            yield Step(t, x, x0)

    def _step(self, x: Tensor, x0: Tensor, z: Tensor, s: float, t: float, y: _Range) -> Tensor:
        keep = math.sqrt(1 - self.eta**2)
        free = x0 + (keep * t / s) * (x - x0) + (self.eta * t) * z
        base, random = y.of(x0), y.of(z)
        noisy = t < y.noise
        pull = keep * t / y.noise.where(noisy, torch.ones_like(y.noise))
        below = base + y.cast(pull) * (y.target - base) + (self.eta * t) * random
        spread = (t**2 - (self.eta_b * y.noise) ** 2).clamp(min=0).sqrt()
        above = base + self.eta_b * (y.target - base) + y.cast(spread) * random
        return y.moved(free, torch.where(noisy, below, above))


@dataclass(frozen=True)
class DDNMPlus(SpectralSampler):
    """DDNM+, the null-space model for noisy observations (Wang et al. 2023, section 3.3, eq. 17 to 19).

    The ancestral step from level σ to t has the weight a = 1 - t²/σ² of D and the deviation u = t √(1 - t²/σ²). In
    each singular direction of A, with singular value s, it takes D + λ A⁺ (y - A D) for D, and noise of variance γ:
    u ≥ a σ_y/s:   λ = 1,              γ = u² - a² σ_y²/s²,
    u < a σ_y/s:   λ = u s/(a σ_y),    γ = 0,
    so that the noise of y is a part of the noise of the step. For σ_y = 0 it is `ddnm` with ancestral steps. The task
    must have a singular value decomposition. Time travel (algorithm 2) adds the noise of l steps again and repeats
    them, so that each is made r times. The paper uses it for hard tasks only; by default there is none.
    """

    travel_length: int = option(1, "l, number of steps that are repeated", ge=1, le=100_000)
    travel_repeat: int = option(1, "r, how often they are made; 1 for no time travel", ge=1, le=100_000)

    def nfe(self, steps: int) -> int:
        return time_travel_evaluations(steps, self.travel_length, self.travel_repeat)

    def posterior_regime(self) -> Regime | None:
        return Regime(any_task=False, noise=False)

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        y, levels = self.in_range(x, observed(denoise, x)), sigmas.tolist()
        for move in time_travel(len(levels) - 1, self.travel_length, self.travel_repeat):
            s, t = levels[move.start], levels[move.end]
            if t > s:
                x = x + math.sqrt(t**2 - s**2) * noise()
                continue
            x0 = denoise(x, s)
            z = noise() if t > 0 else torch.zeros_like(x)
            x = self._step(x, x0, z, s, t, y)
            if move.last:
                yield Step(t, x, x0)

    def _step(self, x: Tensor, x0: Tensor, z: Tensor, s: float, t: float, y: _Range) -> Tensor:
        weight = 1 - (t / s) ** 2
        deviation = t * math.sqrt(weight)
        free = x0 + (t / s) ** 2 * (x - x0) + deviation * z
        needed = weight * y.noise
        enough = deviation >= needed
        part = torch.where(enough, 1.0, deviation / needed.where(~enough, torch.ones_like(needed)))
        spread = (deviation**2 - needed**2).clamp(min=0).sqrt()
        base = y.of(x0)
        start = base + y.cast(part) * (y.target - base)
        return y.moved(free, start + (t / s) ** 2 * (y.of(x) - start) + y.cast(spread) * y.of(z))
