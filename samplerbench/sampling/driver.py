"""The driver: consumes a sampler's generator, and owns what is not the method's business."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

import torch
from torch import Tensor

from samplerbench.errors import RunError, SamplerbenchError, is_out_of_memory
from samplerbench.sampling.denoiser import Denoiser
from samplerbench.sampling.noise import Noise
from samplerbench.sampling.sampler import Sampler, Step

OnStep = Callable[[int, Step], None]
"""Called after step i (from 0) with what the sampler yielded: for progress and trajectories."""


def drive(
    sampler: Sampler,
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    on_step: OnStep | None = None,
) -> Tensor:
    """Run a sampler over a grid and return its last state, (B, C, H, W).

    Gradients are off around every step. A NaN or Inf stops the run: at once on the CPU; on a device, where looking
    would wait for it, at the end of the run, naming the step all the same.

    Raises:
        RunError: a state that is not finite, or a sampler that yielded nothing or another shape.
    """
    run = sampler.steps(denoise, x, sigmas, noise)
    try:
        return _consume(run, sampler, x.shape, sigmas, on_step)
    finally:
        # An error that is kept, as a failed cell's is, would keep the suspended sampler and its tensors too.
        if isinstance(run, Generator):
            run.close()


def _consume(
    run: Iterator[Step], sampler: Sampler, shape: torch.Size, sigmas: Tensor, on_step: OnStep | None
) -> Tensor:
    finite: list[Tensor] = []
    final: Tensor | None = None
    reached: list[float] = []
    while True:
        with torch.no_grad():
            try:
                step = next(run, None)
            except SamplerbenchError:
                raise
            except Exception as error:  # whatever a plugin raises, it is one line for that cell
                if is_out_of_memory(error):
                    raise
                raise RunError(
                    f"sampler {sampler.label()} raised {type(error).__name__} in step {len(reached) + 1} of "
                    f"{len(sigmas) - 1}: {error}"
                ) from error
            if step is None:
                break
            if step.x.shape != shape:
                raise RunError(
                    f"sampler {sampler.label()} yielded a state of shape {tuple(step.x.shape)} in step "
                    f"{len(reached) + 1}; the batch is {tuple(shape)}."
                )
            finite.append(step.x.isfinite().all())
        final = step.x
        reached.append(step.sigma)
        if final.device.type == "cpu" and not finite[-1]:
            break
        if on_step is not None:
            on_step(len(reached) - 1, step)
    if final is None:
        raise RunError(f"sampler {sampler.label()} yielded no step.")
    sound = torch.stack(finite).tolist()
    if not all(sound):
        bad = sound.index(False)
        raise RunError(
            f"sampler {sampler.label()}: the state is not finite after step {bad + 1} of {len(sigmas) - 1} "
            f"(σ = {reached[bad]:.4g}); try more steps, another spacing, or --dtype fp32."
        )
    return final
