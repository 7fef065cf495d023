"""The parts that the samplers for inverse problems share."""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from torch import Tensor

from samplerbench.sampling import (
    Denoiser,
    LinearOperator,
    ModelView,
    Noise,
    Observation,
    Sampler,
)


@dataclass(frozen=True)
class TaskSampler(Sampler, ABC):
    """Base of the samplers for linear inverse problems. A bound instance has the task and its operator."""

    spacing = "leading"
    from_infinity = True
    needs_task: ClassVar[bool] = True
    task: ClassVar[Observation]
    operator: ClassVar[LinearOperator]

    def check_task(self, observation: Observation) -> None:
        observation.linear(f"sampler {self.label()}")

    def bind(self, model: ModelView, sigmas: Tensor) -> Self:
        assert model.observation is not None
        operator = model.observation.linear(f"sampler {self.label()}")
        return self.with_state(task=model.observation, operator=operator)

    def exact_for(self) -> Literal["denoiser", "consistency function"] | None:
        return None

    def replaced(self, x: Tensor, y: Tensor, t: float, noise: Noise) -> Tensor:
        """Replace the observed part of a state by a noisy observation:  x + A⁺ (y + t A z - A x).

        Args:
            x: state at noise level t, (B, C, H, W).
            y: observations, (B, *observed).
            t: noise level. At 0, y itself is used and no noise is drawn.
            noise: noise source.
        """
        known = y + t * self.operator.forward(noise()) if t > 0 else y
        return x + self.operator.pseudo_inverse(known - self.operator.forward(x))


def observed(denoise: Denoiser, x: Tensor) -> Tensor:
    """The observations of the batch, (B, *observed), in the dtype of x."""
    assert denoise.observation is not None
    return denoise.observation.to(x.dtype)


def ddim_step(x: Tensor, x0: Tensor, s: float, t: float, eta: float, noise: Noise) -> Tensor:
    """A step of DDIM from level s to t (Song, Meng & Ermon 2021, eq. 12): x₀ + (√(t²-u²)/s)(x - x₀) + u z.

    u = η t √(1 - t²/s²). η = 1 is the ancestral step of DDPM. Noise is drawn if u > 0.
    """
    u = eta * t * math.sqrt(1 - (t / s) ** 2)
    x = x0 + (math.sqrt(t**2 - u**2) / s) * (x - x0)
    return x + u * noise() if u > 0 else x


@dataclass(frozen=True)
class Move:
    """A move along the grid, by the positions of its levels.

    Attributes:
        start: position of the level at which it starts.
        end: position of the level at which it ends. After `start`: a denoising step. Before it: noise is added.
        last: whether it is the last denoising step that ends at this level.
    """

    start: int
    end: int
    last: bool


def time_travel(steps: int, length: int, repeats: int) -> list[Move]:
    """The moves of RePaint (Lugmayr et al. 2022, algorithm 1 and its appendix).

    After every `length` steps, the noise of `length` steps is added again and they are repeated, so that each of them
    is made `repeats` times. As in the released code, the first group ends one step before the end of the grid.

    Args:
        steps: number of steps of the grid.
        length: number of steps of a jump.
        repeats: how often the steps of a jump are made. 1 for no jumps.
    """
    left = dict.fromkeys(_jumps(steps, length), repeats - 1)
    path, remaining = [], steps
    while remaining > 0:
        path.append((remaining, remaining - 1))
        remaining -= 1
        if left.get(remaining, 0) > 0:
            left[remaining] -= 1
            path.append((remaining, remaining + length))
            remaining += length
    latest = {end: number for number, (start, end) in enumerate(path) if start > end}
    return [Move(steps - start, steps - end, latest.get(end) == i) for i, (start, end) in enumerate(path)]


def time_travel_evaluations(steps: int, length: int, repeats: int) -> int:
    """The number of denoising steps of `time_travel`."""
    return steps + len(_jumps(steps, length)) * (repeats - 1) * length


def _jumps(steps: int, length: int) -> range:
    """The numbers of remaining steps after which noise is added."""
    return range(1, steps - length + 1, length)
