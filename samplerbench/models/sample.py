"""Sampling states of a model by index: the start, the denoiser and the noise of a batch, and its run.

    states = sample_states(model, sampler, sigmas, torch.arange(16), Inputs(16, labels))

The engine, the figures and the checks begin every batch here, so sample i is the same state in all of them: a function
of the seed, i, its inputs and the run alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from samplerbench.boundary import plugin_call
from samplerbench.models.legacy import LegacyDenoiser, bind_legacy
from samplerbench.models.model import Model, state_dtype
from samplerbench.sampling.denoiser import Denoiser
from samplerbench.sampling.driver import OnStep, Walk, drive, walk
from samplerbench.sampling.guidance import Guidance
from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.noise import Noise, Purpose, normal
from samplerbench.sampling.sampler import Sampler, Step, bind_sampler


@dataclass(frozen=True)
class BatchRun:
    """A sampler at the start of a batch. Made by `start_batch`.

    Attributes:
        sampler: which method.
        denoise: D of the batch: bound to its inputs, guided, clipped.
        x: (B, *shape), the start, at level sigmas[0].
        sigmas: (N+1,) float64 on the CPU, the grid.
        noise: the noise of the steps, and how often it was drawn.
    """

    sampler: Sampler
    denoise: Denoiser
    x: Tensor
    sigmas: Tensor
    noise: Noise

    def states(self, on_step: OnStep | None = None) -> Tensor:
        """The last states, (B, *shape). Raises RunError as `drive`."""
        return drive(self.sampler, self.denoise, self.x, self.sigmas, self.noise, on_step)

    def walk(self, on_step: OnStep | None = None) -> Walk:
        """The run, without waiting for a device to check its states. Raises RunError as `walk`."""
        return walk(self.sampler, self.denoise, self.x, self.sigmas, self.noise, on_step)

    def steps(self) -> Iterator[Step]:
        """What the sampler yields, neither checked nor with gradients off: for checks of the sampler itself."""
        return self.sampler.steps(self.denoise, self.x, self.sigmas, self.noise)


def sample_states(
    model: Model,
    sampler: Sampler,
    sigmas: Tensor,
    index: Tensor,
    inputs: Inputs | None = None,
    *,
    guidance: Guidance | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """The last states of the samples `index`, (B, *shape), as one batch.

    Args:
        model: which model.
        sampler: which method, bound to the model and the grid (`bind_sampler`) if it needs that.
        sigmas: (N+1,) float64 on the CPU, decreasing: the grid.
        index: (B,) int64, which samples.
        inputs: their labels or prompts, B rows; None is neither.
        guidance: bound to the model (`bind_guidance`); None is the model's own D.
        seed: of the start and of the noise of the steps.
        dtype: of the states; None is that of the model's own.
        on_step: called after each step.

    Raises:
        UserError, RunError: what the sampler meets.
    """
    return start_batch(model, sampler, sigmas, index, inputs, guidance=guidance, seed=seed, dtype=dtype).states(on_step)


def start_batch(
    model: Model,
    sampler: Sampler,
    sigmas: Tensor,
    index: Tensor,
    inputs: Inputs | None = None,
    *,
    guidance: Guidance | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    x: Tensor | None = None,
    noise: Noise | None = None,
) -> BatchRun:
    """The samples `index` as one batch, ready to run. The arguments are those of `sample_states`, and:

    Args:
        x: (B, *shape), the start; None is `start_states`.
        noise: of the steps; None is that of the samples.
    """
    index = index.to(model.device)
    if x is None:
        x = start_states(model, float(sigmas[0]), index, seed, dtype)
    if noise is None:
        noise = Noise(seed, index, model.shape, x.dtype)
    given = Inputs(len(index)) if inputs is None else inputs.to(model.device)
    with plugin_call(_name(model), "in denoiser"):
        denoise = model.denoiser(model.inputs(index, given), guidance)
    if getattr(sampler, "needs", None):
        denoise = LegacyDenoiser(denoise, model, sampler)
    return BatchRun(sampler, denoise, x, sigmas, noise)


def bind(model: Model, sampler: Sampler, sigmas: Tensor) -> Sampler:
    """The sampler prepared for a model and a grid. What it estimates is no part of sampling: call it outside the meter.

    Raises:
        UserError: the model lacks what the sampler needs. RunError: the plugin failed.
    """
    return bind_legacy(bind_sampler(sampler, model, sigmas), model, sigmas)


def start_noise(model: Model, index: Tensor, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """z ~ N(0, I) of the samples `index` (B,), from which their starts are made: (B, *shape) on the device of index."""
    return normal(seed, Purpose.PRIOR, index, 0, model.shape).to(dtype or model.state_dtype)


def start_states(model: Model, sigma: float, index: Tensor, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """The states with which the samples `index` (B,) start at level sigma: (B, *shape) on the device of index."""
    z = start_noise(model, index, seed, dtype)
    with plugin_call(_name(model), "in prior"):
        return model.prior(z, sigma)


def _name(model: Model) -> str:
    return f"model {model.identity.get('source', type(model).__name__)}"


__all__ = ["BatchRun", "bind", "sample_states", "start_batch", "start_noise", "start_states", "state_dtype"]
