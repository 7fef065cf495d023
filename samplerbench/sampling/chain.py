"""The Markov chain of a sampler whose steps are Gaussian: the context of `Sampler.transition`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from samplerbench.sampling.denoiser import Denoiser
from samplerbench.sampling.process import Process


@dataclass(frozen=True)
class Chain:
    """The noise levels of a run and the forward process of its model.

    Attributes:
        process: forward process of the model.
        sigmas: noise levels σ_N > … > σ_1 > σ_0 of the grid, N+1 floats. σ_0 is 0 for a whole run.
    """

    process: Process
    sigmas: tuple[float, ...]

    @classmethod
    def of(cls, denoise: Denoiser, sigmas: Tensor) -> Self:
        """The chain of a denoiser on a grid, (N+1,) float64 on the CPU."""
        return cls(denoise.process, tuple(sigmas.tolist()))

    def alpha(self, sigma: float) -> float:
        """The scale α(σ) of the network's coordinates, y = α(σ) x."""
        return self.process.alpha(sigma)

    def is_last_but_one(self, t: float) -> bool:
        """Whether t is σ_1, the last level above 0: the end of the last step that adds noise."""
        return len(self.sigmas) > 2 and t == self.sigmas[-2]

    @property
    def last_noisy(self) -> tuple[float, float] | None:
        """The interval (σ_2, σ_1) of the last step that adds noise. None for a run of one step."""
        return (self.sigmas[-3], self.sigmas[-2]) if len(self.sigmas) > 2 else None


def markov_variance(s: float, t: float) -> float:
    """The variance t²(1 - t²/s²) of q(x_t | x_s, x₀) of the Markov forward process (Ho et al. 2020, eq. 7: β̃).

    Args:
        s: noise level of the given state.
        t: lower noise level.
    """
    return t**2 * (1 - (t / s) ** 2)
