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

    The first timestep is below T-1, so sampling starts below the largest noise level. With N = 1 it starts at the
    smallest one.
    """

    offset: int = option(0, "offset added to every timestep (steps_offset in diffusers)", ge=0, le=1_000_000)

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        index = torch.arange(steps - 1, -1, -1) * (len(levels) // steps) + self.offset
        return self.timesteps(levels, index.clamp(max=len(levels) - 1))


@dataclass(frozen=True)
class Linspace(Spacing):
    """N timesteps evenly from T-1 to 0, both included, rounded (Nichol & Dhariwal 2021).

    The timestep (T-1)·i/(N-1) is rounded exactly, with halves to even. diffusers rounds a floating-point product, which
    misses some halves. For T = 1000, one timestep differs by one for 92 of the numbers of steps up to 1000.
    """

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        last, parts = len(levels) - 1, steps - 1
        index = [_nearest(last * i, parts) for i in range(parts, -1, -1)] if parts else [last]
        return self.timesteps(levels, torch.tensor(index))


def _nearest(numerator: int, denominator: int) -> int:
    """The integer nearest to a fraction, with halves to even. Integer arithmetic is exact, unlike floats."""
    whole, rest = divmod(2 * numerator + denominator, 2 * denominator)
    return whole - (rest == 0 and whole % 2 == 1)


@dataclass(frozen=True)
class Quadratic(Spacing):
    """Timesteps ⌊c i²⌋ that end at 0.8·T (Song, Meng & Ermon 2021, section D.2; their CIFAR-10 tables).

    As in the authors' code, the square roots of the timesteps are even from 0 to √(fraction·T). If two values are the
    same timestep (for about 30 steps and more at T = 1000), the later one uses the next free timestep, so N steps have
    N different levels. The authors' code evaluates the same level twice.
    """

    fraction: float = option(0.8, "largest timestep, as a fraction of T", gt=0.0, le=1.0)

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        # Use the decimal fraction exactly: 0.29 of 100 timesteps is 29, not 28.999999999999996.
        end = Fraction(repr(self.fraction)) * len(levels)
        index: list[int] = []
        for i in range(steps):
            square = end.numerator * i**2 // (end.denominator * (steps - 1) ** 2) if steps > 1 else math.floor(end)
            index.append(max(square, index[-1] + 1 if index else 0))
        top = len(levels) - 1
        # Move timesteps beyond the last one back, as long as there is room.
        for i in range(steps - 1, -1, -1):
            index[i] = min(index[i], top - (steps - 1 - i))
        return self.timesteps(levels, torch.tensor(index[::-1]))


@dataclass(frozen=True)
class LatentConsistency(Spacing):
    """Timesteps of latent consistency models, evenly from those of their distillation (Luo et al. 2023, section 4.3).

    The timesteps of the distillation are k-1, 2k-1, …, `original_steps`·k-1, with k = ⌊T/original_steps⌋. From the
    largest, ⌊i·original_steps/N⌋ are skipped, i = 0 … N-1, as LCMScheduler and TCDScheduler do. For more than
    `original_steps` steps, all timesteps are used, where diffusers raises an error.
    """

    original_steps: int = option(50, "original_inference_steps of the checkpoint", ge=1, le=1_000_000)

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        T = len(levels)
        known = self.original_steps if steps <= self.original_steps <= T else T
        k, ratio = T // known, known / steps
        # The floating-point product is that of diffusers, which rounds a few products below the exact value.
        return self.timesteps(levels, torch.tensor([(known - math.floor(i * ratio)) * k - 1 for i in range(steps)]))
