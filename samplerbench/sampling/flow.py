"""The time steps of rectified flows: shifts of the noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from samplerbench.sampling.process import SIGMA_INFINITY


@dataclass(frozen=True)
class FlowSchedule:
    """The time steps of a rectified flow as its checkpoint defines them.

    A shift s maps t to s t/(1 + (s-1) t) (Esser et al. 2024, eq. 23), which is σ ↦ s σ. A dynamic shift depends on the
    size of the image: with μ linear in the number of tokens, it is e^μ ("exponential") or μ ("linear").

    Attributes:
        timesteps: number of time steps T of training.
        shift: static shift s.
        dynamic: whether the shift depends on the number of tokens.
        kind: how s follows from μ: e^μ or μ.
        base_shift: μ at `base_tokens`.
        max_shift: μ at `max_tokens`.
        base_tokens: number of tokens of `base_shift`.
        max_tokens: number of tokens of `max_shift`.
        terminal: the last time before 0, to which the times are stretched. None for no stretching.
        tokens: number of image tokens of the network. None if unknown.
    """

    timesteps: int = 1000
    shift: float = 1.0
    dynamic: bool = False
    kind: Literal["exponential", "linear"] = "exponential"
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    terminal: float | None = None
    tokens: int | None = None

    @property
    def mu(self) -> float:
        """μ for the number of tokens. `base_shift` if it is unknown."""
        if self.tokens is None or self.max_tokens == self.base_tokens:
            return self.base_shift
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return self.base_shift + slope * (self.tokens - self.base_tokens)

    def factor(self, mu: float | None = None) -> float:
        """The factor s of the noise levels.

        Args:
            mu: μ of the dynamic shift. None: that of the number of tokens, or the static shift.
        """
        if mu is None and not self.dynamic:
            return self.shift
        mu = self.mu if mu is None else mu
        return math.exp(mu) if self.kind == "exponential" else mu

    def grid(self, steps: int, shift: float | None = None, mu: float | None = None) -> Tensor:
        """The noise levels for the times 1, 1-1/N, …, 1/N with the shift, followed by 0.

        Args:
            steps: number of steps N.
            shift: static shift. None: that of the schedule.
            mu: μ of a dynamic shift. None: that of the schedule.

        Returns:
            The noise levels, (N+1,) float64. The first is `SIGMA_INFINITY`.
        """
        i = torch.arange(steps + 1, dtype=torch.float64)
        return self.shifted((steps - i) / i, shift, mu)  # t = (N-i)/N

    def shifted(self, sigmas: Tensor, shift: float | None = None, mu: float | None = None) -> Tensor:
        """The noise levels of a sequence of times after the shift, and after stretching to the last time.

        Args:
            sigmas: noise levels σ = t/(1-t) of the times before the shift, (N+1,) float64. The last is 0. A first one
                of σ = ∞ may be `inf`.
            shift: static shift. None: that of the schedule.
            mu: μ of a dynamic shift. None: that of the schedule.

        Returns:
            The noise levels, (N+1,) float64. σ = ∞ is `SIGMA_INFINITY`.
        """
        sigmas = (self.factor(mu) if shift is None else shift) * sigmas
        if self.terminal is not None and len(sigmas) > 2:
            # Stretch 1 - t = 1/(1+σ), so that the last time before 0 is `terminal`.
            rest = 1 / (1 + sigmas)
            rest = rest * ((1 - self.terminal) / rest[-2])
            sigmas = 1 / rest - 1
        sigmas[-1] = 0.0
        return sigmas.clamp(max=SIGMA_INFINITY)
