"""Trajectories: the states of a run from pure noise to the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samplerbench.errors import UserError, argument
from samplerbench.sampling.sampler import Step


@dataclass(frozen=True, eq=False, repr=False)
class Trajectory:
    """The states x = x₀ + σ z of n samples after each of K steps.

    All tensors are on the CPU. For a latent model the states are latents: `model.decode(trajectory.x[k])` gives images.

    Attributes:
        sigmas: noise level of each state, (K+1,) float64. The first is that of the start, the last is 0.
        x: states, (K+1, n, *shape). The first is the scaled initial noise, the last is the sample.
        x0: denoised states used in each step, (K, n, *shape). None if the sampler does not give one in every step.
    """

    sigmas: Tensor
    x: Tensor
    x0: Tensor | None = None

    def __len__(self) -> int:
        """The number of states, K+1."""
        return len(self.x)

    def __repr__(self) -> str:
        ends = f"σ from {float(self.sigmas[0]):.4g} to {float(self.sigmas[-1]):.4g}"
        return f"Trajectory({len(self)} states {tuple(self.x.shape[1:])}, {ends})"


@dataclass
class Recorder:
    """Collects copies of the states of one batch, on the CPU. Its method `step` is a callback of the driver.

    Args:
        sigma: noise level of the initial states.
        x: initial states, (B, *shape).
    """

    sigma: float
    x: Tensor
    _sigmas: list[float] = field(init=False, default_factory=list)
    _states: list[Tensor] = field(init=False, default_factory=list)
    _denoised: list[Tensor | None] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._sigmas, self._states = [self.sigma], [_copy(self.x)]

    def step(self, number: int, step: Step) -> None:
        """Add the state after a step."""
        self._sigmas.append(float(step.sigma))
        self._states.append(_copy(step.x))
        self._denoised.append(None if step.x0 is None else _copy(step.x0))

    def trajectory(self) -> Trajectory:
        """The trajectory of the batch."""
        denoised = [x0 for x0 in self._denoised if x0 is not None]
        x0 = torch.stack(denoised) if len(denoised) == len(self._denoised) else None
        return Trajectory(torch.tensor(self._sigmas, dtype=torch.float64), torch.stack(self._states), x0)


def join(batches: Sequence[Trajectory]) -> Trajectory:
    """Join the trajectories of batches along the samples.

    Args:
        batches: the trajectories, at least one.

    Raises:
        UserError: if the batches have different noise levels, which a sampler that chooses its own steps may have.
    """
    first = batches[0]
    if any(not torch.equal(first.sigmas, batch.sigmas) for batch in batches[1:]):
        n = sum(batch.x.shape[1] for batch in batches)
        raise UserError(
            "the sampler chose different steps for each batch, so their trajectories cannot be joined; use "
            f"{argument('batch_size', n)}."
        )
    denoised = [batch.x0 for batch in batches if batch.x0 is not None]
    return Trajectory(
        first.sigmas,
        torch.cat([batch.x for batch in batches], dim=1),
        torch.cat(denoised, dim=1) if len(denoised) == len(batches) else None,
    )


def _copy(x: Tensor) -> Tensor:
    """A copy on the CPU. A sampler may reuse the memory of its state."""
    return x.detach().to("cpu", copy=True)
