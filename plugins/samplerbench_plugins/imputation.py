"""Samplers for inverse problems that replace the observed part of the state, or start from a first guess."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Regime, Step, intervals, option
from samplerbench_plugins.task_sampler import (
    TaskSampler,
    ddim_step,
    observed,
    time_travel,
    time_travel_evaluations,
)

NOISELESS = Regime(any_task=False, noise=False)
"""Inpainting of independent pixels without noise."""


@dataclass(frozen=True)
class Replacement(TaskSampler):
    """Imputation by replacement (Song et al. 2021, Score-SDE, appendix I.2).

    After each step to level t, the observed part of the state is replaced by a noisy observation:
    x ← x + A⁺ (y + t A z - A x). For inpainting these are the known pixels. The step is that of DDIM, ancestral for
    η = 1; the paper has a predictor-corrector method. y is taken to be free of noise. The step does not know how the
    known pixels change the distribution of the others, so the result is exact only if they are independent.
    """

    eta: float = option(1.0, "0 is deterministic, 1 is ancestral", ge=0.0, le=1.0)

    def posterior_regime(self) -> Regime | None:
        return NOISELESS

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        y = observed(denoise, x)
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            x = self.replaced(ddim_step(x, x0, s, t, self.eta, noise), y, t, noise)
            yield Step(t, x, x0)


@dataclass(frozen=True)
class RePaint(TaskSampler):
    """RePaint (Lugmayr et al. 2022, algorithm 1): replacement with resampling.

    Each step is an ancestral step followed by x ← x + A⁺ (y + t A z - A x), as in `replace`. After every j steps, the
    noise of j steps is added again and they are repeated, so that each is made r times: the unknown part adapts to the
    known one. All repetitions are counted. The defaults j = 10, r = 10 are the paper's, which has 250 steps and
    therefore 2410 evaluations. Up to j steps there are no repetitions. The paper's networks learned the variance of the
    step; here it is the small variance of DDPM. y is taken to be free of noise.
    """

    jump_length: int = option(10, "j, number of steps of a jump", ge=1, le=100_000)
    resamplings: int = option(10, "r, how often the steps of a jump are made", ge=1, le=100_000)

    def nfe(self, steps: int) -> int:
        return time_travel_evaluations(steps, self.jump_length, self.resamplings)

    def posterior_regime(self) -> Regime | None:
        return NOISELESS

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        y, levels = observed(denoise, x), sigmas.tolist()
        for move in time_travel(len(levels) - 1, self.jump_length, self.resamplings):
            s, t = levels[move.start], levels[move.end]
            if t > s:
                x = x + math.sqrt(t**2 - s**2) * noise()
                continue
            x0 = denoise(x, s)
            x = self.replaced(ddim_step(x, x0, s, t, 1.0, noise), y, t, noise)
            if move.last:
                yield Step(t, x, x0)


@dataclass(frozen=True)
class SDEdit(TaskSampler):
    """SDEdit (Meng et al. 2022, algorithm 1): start at an intermediate level from a first guess.

    x ← A⁺ y + σ z at the level σ after the first N - ⌊strength N⌋ of N steps, then the steps of DDIM, ancestral for
    η = 1. The first guess is the only use of y: the result agrees with it less with a larger strength. The steps
    before the start are not evaluated, as in the image-to-image pipelines of diffusers. With the default spacing,
    which is uniform in time, the strength is the time t₀ of the paper, which recommends 0.3 to 0.6.
    """

    spacing = "trailing"

    strength: float = option(0.5, "part of the steps that is made, in (0, 1]", gt=0.0, le=1.0)
    eta: float = option(1.0, "0 is deterministic, 1 is ancestral", ge=0.0, le=1.0)

    def nfe(self, steps: int) -> int:
        return max(1, math.floor(self.strength * steps + 1e-9))

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        y = observed(denoise, x)
        guess = self.operator.pseudo_inverse(y)
        z = x / denoise.process.prior_scale(float(sigmas[0]))
        skipped = len(sigmas) - 1 - self.nfe(len(sigmas) - 1)
        x = guess + float(sigmas[skipped]) * z
        for t in sigmas[1 : skipped + 1].tolist():
            yield Step(t, guess + t * z)
        for s, t in intervals(sigmas[skipped:]):
            x0 = denoise(x, s)
            x = self.consistent(ddim_step(x, x0, s, t, self.eta, noise), y, t, noise)
            yield Step(t, x, x0)

    def consistent(self, x: Tensor, y: Tensor, t: float, noise: Noise) -> Tensor:
        """Return the state after a step to level t. SDEdit does not change it."""
        return x


@dataclass(frozen=True)
class CCDF(SDEdit):
    """Come-closer-diffuse-faster (Chung, Sim & Ye 2022, algorithm 1): `sdedit` with data consistency.

    It starts at an intermediate level from the first guess A⁺ y, as `sdedit`. After each step the observed part is
    replaced by a noisy observation, x ← x + A⁺ (y + t A z - A x), as in `replace`. The paper reduces the number of
    evaluations with a first guess of a network; its strength t₀ depends on the task and on the guess. With
    strength = 1 it is `replace`, apart from the first state.
    """

    strength: float = option(0.2, "part of the steps that is made, in (0, 1]", gt=0.0, le=1.0)

    def posterior_regime(self) -> Regime | None:
        return NOISELESS if self.strength == 1 else None

    def consistent(self, x: Tensor, y: Tensor, t: float, noise: Noise) -> Tensor:
        return self.replaced(x, y, t, noise)
