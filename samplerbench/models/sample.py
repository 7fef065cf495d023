"""Sampling states of a model by index: the start, the denoiser and the noise of a batch, and its run.

    states = sample_states(model, sampler, sigmas, torch.arange(16), labels)

The engine, the figures and the checks begin every batch here, so sample i is the same state in all of them: a function
of the seed, i, its label and the run alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from samplerbench.boundary import plugin_call
from samplerbench.models.model import Model
from samplerbench.sampling.denoiser import Denoiser
from samplerbench.sampling.driver import OnStep, Walk, drive, walk
from samplerbench.sampling.guidance import Guidance
from samplerbench.sampling.noise import Noise, Purpose, normal
from samplerbench.sampling.sampler import Sampler, Step


@dataclass(frozen=True)
class BatchRun:
    """A sampler at the start of a batch. Made by `start_batch`.

    Attributes:
        sampler: which method.
        denoise: D of the batch: bound to its labels, guided, clipped.
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
    labels: Tensor | None = None,
    *,
    guidance: Guidance | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """The last states of the samples `index`, (B, *shape), as one batch.

    Args:
        model: which model; `prepare_model` has been called for this sampler and grid.
        sampler: which method.
        sigmas: (N+1,) float64 on the CPU, decreasing: the grid.
        index: (B,) int64, which samples.
        labels: (B,) int64, their labels; None: no labels.
        guidance: None is the model's own D.
        seed: of the start and of the noise of the steps.
        dtype: of the states; None is that of the model's own.
        on_step: called after each step.

    Raises:
        UserError, RunError: what the sampler meets.
    """
    return start_batch(model, sampler, sigmas, index, labels, guidance=guidance, seed=seed, dtype=dtype).states(on_step)


def start_batch(
    model: Model,
    sampler: Sampler,
    sigmas: Tensor,
    index: Tensor,
    labels: Tensor | None = None,
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
    given = None if labels is None else labels.to(model.device)
    with plugin_call(_name(model), "in denoiser"):
        denoise = model.denoiser(given, len(index), guidance)
    return BatchRun(sampler, denoise, x, sigmas, noise)


def start_noise(model: Model, index: Tensor, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """z ~ N(0, I) of the samples `index` (B,), from which their starts are made: (B, *shape) on the device of index."""
    return normal(seed, Purpose.PRIOR, index, 0, model.shape).to(dtype or state_dtype(model.dtype))


def start_states(model: Model, sigma: float, index: Tensor, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """The states with which the samples `index` (B,) start at level sigma: (B, *shape) on the device of index."""
    z = start_noise(model, index, seed, dtype)
    with plugin_call(_name(model), "in prior"):
        return model.prior(z, sigma)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of the state for a network of this one: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def prepare_model(model: Model, sampler: Sampler, sigmas: Tensor) -> None:
    """Estimate what the sampler needs of the model besides D, where it is not known yet; no part of sampling."""
    if "posterior variance" in sampler.needs:
        with plugin_call(_name(model), "in estimate_posterior_variances"):
            model.estimate_posterior_variances(sigmas)


def _name(model: Model) -> str:
    return f"model {model.identity.get('source', type(model).__name__)}"
