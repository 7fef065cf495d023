"""The driver: consumes a sampler's generator, and owns what is not the method's business."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from samplerbench.errors import RunError, SamplerbenchError, is_out_of_memory
from samplerbench.sampling.denoiser import Denoiser
from samplerbench.sampling.noise import Noise
from samplerbench.sampling.sampler import Sampler, Step

OnStep = Callable[[int, Step], None]
"""Called after step i (from 0) with what the sampler yielded: for progress and trajectories."""


@dataclass(frozen=True)
class Walk:
    """A sampler's run over a grid.

    x: its last state, (B, C, H, W). finite: (K,) bool on the state's device, whether each of its K states was.
    """

    x: Tensor
    finite: Tensor
    sampler: Sampler
    levels: list[float]
    """The noise level that each step reached."""
    steps: int

    def check(self, finite: Tensor | None = None) -> None:
        """Raise RunError for a state that is not finite; waits for the device, unless `finite` is a copy on the CPU."""
        sound = (self.finite if finite is None else finite).tolist()
        if not all(sound):
            bad = sound.index(False)
            raise RunError(
                f"sampler {self.sampler.label()}: the state is not finite after step {bad + 1} of {self.steps} "
                f"(σ = {self.levels[bad]:.4g}); try more steps, another spacing, or --dtype fp32."
            )


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
    walked = walk(sampler, denoise, x, sigmas, noise, on_step)
    walked.check()
    return walked.x


def walk(
    sampler: Sampler,
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    on_step: OnStep | None = None,
) -> Walk:
    """`drive` without its last look: nothing here waits for a device.

    Raises:
        RunError: a sampler that yielded nothing or another shape; on the CPU, a state that is not finite.
    """
    run = sampler.steps(denoise, x, sigmas, noise)
    try:
        return _consume(run, sampler, x.shape, sigmas, on_step)
    finally:
        # An error that is kept, as a failed cell's is, would keep the suspended sampler and its tensors too.
        if isinstance(run, Generator):
            run.close()


def _consume(run: Iterator[Step], sampler: Sampler, shape: torch.Size, sigmas: Tensor, on_step: OnStep | None) -> Walk:
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
        if _can_look(final) and not finite[-1]:
            break
        if on_step is not None:
            on_step(len(reached) - 1, step)
    if final is None:
        raise RunError(f"sampler {sampler.label()} yielded no step.")
    walked = Walk(final, torch.stack(finite), sampler, reached, len(sigmas) - 1)
    if _can_look(final):
        walked.check()
    return walked


def _can_look(x: Tensor) -> bool:
    """Whether a value can be read without waiting for a device."""
    return x.device.type == "cpu"
