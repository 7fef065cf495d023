"""Spacings over a discrete model's timesteps 0 … T-1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from samplerbench.sampling import Spacing, option


@dataclass(frozen=True)
class Trailing(Spacing):
    """Timesteps from T-1 down, every T/N-th (Lin et al. 2024, table 2): round(T - i·T/N) - 1."""

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        T = len(levels)
        return self.timesteps(levels, torch.tensor([round(T - i * T / steps) - 1 for i in range(steps)]))


@dataclass(frozen=True)
class Leading(Spacing):
    """Timesteps (N-1)·⌊T/N⌋, …, ⌊T/N⌋, 0, plus an offset (Ho et al. 2020; the default of many checkpoints).

    The first timestep is not T-1, so sampling starts below the largest noise; with N = 1 it starts at the smallest.
    """

    offset: int = option(0, "added to every timestep (steps_offset of diffusers)", ge=0, le=1_000_000)

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        index = torch.arange(steps - 1, -1, -1) * (len(levels) // steps) + self.offset
        return self.timesteps(levels, index.clamp(max=len(levels) - 1))


@dataclass(frozen=True)
class Linspace(Spacing):
    """N timesteps evenly from T-1 to 0, both included, rounded (Nichol & Dhariwal 2021).

    The timestep (T-1)·i/(N-1) is rounded exactly, halves to the even neighbour. diffusers rounds in the same way, but
    a floating-point product, which loses some halves: at T = 1000 it differs by one timestep at 92 of the N to 1000.
    """

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        last, parts = len(levels) - 1, steps - 1
        index = [_nearest(last * i, parts) for i in range(parts, -1, -1)] if parts else [last]
        return self.timesteps(levels, torch.tensor(index))


def _nearest(numerator: int, denominator: int) -> int:
    """The whole number nearest to a fraction, halves to even: in floats a half may be lost, and a timestep with it."""
    whole, rest = divmod(2 * numerator + denominator, 2 * denominator)
    return whole - (rest == 0 and whole % 2 == 1)


@dataclass(frozen=True)
class Quadratic(Spacing):
    """Timesteps ⌊c i²⌋ that end at 0.8·T (Song, Meng & Ermon 2021, section D.2; their CIFAR-10 tables).

    As in the authors' code, √ of the timesteps is even from 0 to √(fraction·T). Where two would fall on one timestep
    (about 30 steps and more at T = 1000) the later takes the next free one, so N steps stay N evaluations of
    different levels; the authors' code evaluates the same level twice there.
    """

    fraction: float = option(0.8, "the largest timestep, as a share of T", gt=0.0, le=1.0)

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        # The fraction as it is written: 0.29 of 100 timesteps is 29 of them, and not 28.999999999999996.
        end = Fraction(repr(self.fraction)) * len(levels)
        index: list[int] = []
        for i in range(steps):
            square = end.numerator * i**2 // (end.denominator * (steps - 1) ** 2) if steps > 1 else math.floor(end)
            index.append(max(square, index[-1] + 1 if index else 0))
        top = len(levels) - 1
        # What was pushed past the last timestep is taken back from above, as long as there is room.
        for i in range(steps - 1, -1, -1):
            index[i] = min(index[i], top - (steps - 1 - i))
        return self.timesteps(levels, torch.tensor(index[::-1]))
