"""Sample states of a model by index.

    states = sample_states(model, sampler, sigmas, torch.arange(16), Inputs(16, labels))

The engine, the figures and the checks all use this module. Sample i is therefore the same state in all of them: it
depends only on the seed, i, its inputs and the settings of the run.
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
from samplerbench.sampling.sampler import Sampler, Step, bind_sampler, start_steps


@dataclass(frozen=True)
class BatchRun:
    """A sampler at the start of a batch. `start_batch` creates it.

    Attributes:
        sampler: the sampler.
        denoise: denoiser of the batch, with inputs, guidance and clipping.
        x: initial states at noise level sigmas[0], (B, *shape).
        sigmas: noise levels, (N+1,) float64 on the CPU, strictly decreasing.
        noise: noise source of the steps.
    """

    sampler: Sampler
    denoise: Denoiser
    x: Tensor
    sigmas: Tensor
    noise: Noise

    def states(self, on_step: OnStep | None = None) -> Tensor:
        """Run the batch and return the final states, (B, *shape). See `drive` for errors."""
        return drive(self.sampler, self.denoise, self.x, self.sigmas, self.noise, on_step)

    def walk(self, on_step: OnStep | None = None) -> Walk:
        """Run the batch without device synchronisation. See `walk` for errors."""
        return walk(self.sampler, self.denoise, self.x, self.sigmas, self.noise, on_step)

    def steps(self) -> Iterator[Step]:
        """Iterate over the steps without checks and without disabling gradients, to test the sampler itself."""
        return start_steps(self.sampler, self.denoise, self.x, self.sigmas, self.noise)


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
    """Sample one batch and return the final states.

    Args:
        model: the model.
        sampler: the sampler, prepared by `bind` if it requires that.
        sigmas: noise levels, (N+1,) float64 on the CPU, strictly decreasing.
        index: sample indices, (B,) int64.
        inputs: labels or prompts of the B samples. None for no inputs.
        guidance: guidance bound to the model by `bind_guidance`. None for no guidance.
        seed: random seed of the initial states and of the noise of the steps.
        dtype: dtype of the states. If None, `model.state_dtype` is used.
        on_step: callback after each step.

    Returns:
        The final states, (B, *shape).

    Raises:
        RunError: see `drive`.
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
    """Prepare one batch. The other arguments are those of `sample_states`.

    Args:
        x: initial states, (B, *shape). If None, `start_states` is used.
        noise: noise source of the steps. If None, it is created from the seed and the indices.
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
    """Prepare a sampler for a model and a grid.

    Call it outside the meter, because estimates are not part of the sampling cost.

    Args:
        model: the model.
        sampler: the sampler.
        sigmas: noise levels, (N+1,) float64 on the CPU, strictly decreasing.

    Raises:
        UserError: if the model does not meet the requirements of the sampler.
        RunError: if the plugin fails.
    """
    return bind_legacy(bind_sampler(sampler, model, sigmas), model, sigmas)


def start_noise(model: Model, index: Tensor, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """Draw the noise z ~ N(0, I) of the initial states.

    Args:
        model: the model.
        index: sample indices, (B,) int64.
        seed: random seed.
        dtype: dtype of z. If None, `model.state_dtype` is used.

    Returns:
        z, (B, *shape) on the device of index.
    """
    return normal(seed, Purpose.PRIOR, index, 0, model.shape).to(dtype or model.state_dtype)


def start_states(model: Model, sigma: float, index: Tensor, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """Draw the initial states.

    Args:
        model: the model.
        sigma: initial noise level.
        index: sample indices, (B,) int64.
        seed: random seed.
        dtype: dtype of the states. If None, `model.state_dtype` is used.

    Returns:
        Initial states, (B, *shape) on the device of index.
    """
    return states_of_noise(model, sigma, start_noise(model, index, seed, dtype))


def states_of_noise(model: Model, sigma: float, z: Tensor) -> Tensor:
    """Scale noise to the initial states of a run.

    Args:
        model: the model.
        sigma: initial noise level.
        z: noise of unit variance, (B, *shape).

    Returns:
        Initial states, (B, *shape).
    """
    with plugin_call(_name(model), "in prior"):
        return model.prior(z, sigma)


def _name(model: Model) -> str:
    return f"model {model.identity.get('source', type(model).__name__)}"


__all__ = [
    "BatchRun",
    "bind",
    "sample_states",
    "start_batch",
    "start_noise",
    "start_states",
    "state_dtype",
    "states_of_noise",
]
