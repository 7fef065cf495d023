"""Multistep sampling of consistency models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step, intervals, option


@dataclass(frozen=True)
class Consistency(Sampler):
    """Multistep consistency sampling (Song et al. 2023, algorithm 1), LCM (Luo et al. 2023), TCD (Zheng et al. 2024).

    From level s to t:  x ← D + (u/s)(x - D) + √(t² - u² - σ_min²) z, a step without noise to level u, then noise up to
    t. u is the level of the timestep ⌊(1-γ) τ⌋, where τ is the timestep of t (TCD, algorithm 4).
    γ = 1 has u = 0: x ← D + √(t² - σ_min²) z is multistep consistency sampling and LCM. γ = 0 has u = t, which is DDIM
    with η = 0. The last step returns D. The settings of TCDScheduler are `gamma=0.3`.
    The model must be a consistency model or a distilled model: D is the end of the ODE from x, not E[x₀ | x].
    `sigma_min` is the noise level at which the consistency function ends: 0.002 for the models of Song et al., 0 for
    LCM and TCD. The default spacing is that of LCM.
    """

    spacing = "lcm"
    from_infinity = True

    gamma: float = option(1.0, "1 adds all noise again, 0 is deterministic; eta of TCDScheduler", ge=0.0, le=1.0)
    sigma_min: float = option(0.0, "noise level at which the consistency model ends", ge=0.0, le=1e6)

    def convergence(self) -> int | None:
        return 1 if self.gamma == 0 and self.sigma_min == 0 else None

    def exact_for(self) -> Literal["denoiser", "consistency function"] | None:
        if self.sigma_min > 0 or 0 < self.gamma < 1:
            return None
        return "consistency function" if self.gamma == 1 else "denoiser"

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        levels = denoise.levels.tolist()
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            u = self._intermediate(levels, t)
            x = x0 if u == 0 else x0 + (u / s) * (x - x0)
            if (variance := t**2 - u**2 - self.sigma_min**2) > 0:
                x = x + math.sqrt(variance) * noise()
            yield Step(t, x, x0)

    def _intermediate(self, levels: list[float], t: float) -> float:
        """The level u of the timestep ⌊(1-γ) τ⌋, at most t."""
        if t == 0 or self.gamma == 1:
            return 0.0
        if self.gamma == 0:
            return t
        # The product is rounded to float32, as in diffusers, so that the same timestep is selected.
        tau = np.float32(np.interp(math.log(t), np.log(levels), np.arange(len(levels))))
        return min(levels[math.floor(np.float32(1 - self.gamma) * tau)], t)
