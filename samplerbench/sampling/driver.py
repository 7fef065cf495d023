"""The driver: consumes a sampler's generator, and owns what is not the method's business."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplerbench.boundary import plugin_call, shown
from samplerbench.errors import RunError, argument
from samplerbench.sampling.denoiser import Denoiser
from samplerbench.sampling.noise import Noise
from samplerbench.sampling.sampler import Sampler, Step, planned_nfe

OnStep = Callable[[int, Step], None]
"""Called after step i (from 0) with what the sampler yielded: for progress and trajectories."""


MOST_STEPS = 100_000
"""Steps after which a sampler that chooses its own steps is taken for one that never ends."""


@dataclass(frozen=True)
class Walk:
    """A sampler's run over a grid.

    Attributes:
        x: its last state, (B, C, H, W).
        finite: (K,) bool on the state's device, whether each of its K states was finite.
        sampler: the sampler.
        levels: K numbers, the noise level that each step reached.
        steps: the number of steps that the grid has; None where the sampler chooses its own.
    """

    x: Tensor
    finite: Tensor
    sampler: Sampler
    levels: list[float]
    steps: int | None

    def check(self, finite: Tensor | None = None) -> None:
        """Raise RunError for a state that is not finite; waits for the device, unless `finite` is a copy on the CPU."""
        sound = (self.finite if finite is None else finite).tolist()
        if not all(sound):
            bad = sound.index(False)
            raise RunError(
                f"sampler {self.sampler.label()}: the state is not finite after {_step(bad + 1, self.steps)} "
                f"(σ = {self.levels[bad]:.4g}); try more steps, another spacing, or {argument('dtype', 'fp32')}."
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
        RunError: a state that is not finite; a sampler that raised, or that yielded something else than one Step of
            the batch's shape, dtype and device for each interval (one that chooses its own steps: at most MOST_STEPS).
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
        RunError: as `drive`; a state that is not finite only on the CPU.
    """
    steps = _expected(sampler, sigmas)
    with plugin_call(sampler, "in steps"):
        # A copy: a sampler that wrote into it would change the grid of the batches to come.
        given = sampler.steps(denoise, x, sigmas.clone(), noise)
        run = iter(given) if isinstance(given, Iterable) else None
    if run is None:
        raise RunError(
            f"sampler {sampler.label()}: steps returned {_a(given)}; it must be a generator that yields a Step for "
            "each interval."
        )
    try:
        return _consume(run, sampler, x, steps, on_step)
    finally:
        # An error that is kept, as a failed cell's is, would keep the suspended sampler and its tensors too.
        if isinstance(run, Generator):
            with suppress(Exception), plugin_call(sampler, "when it was closed"):
                run.close()


def _expected(sampler: Sampler, sigmas: Tensor) -> int | None:
    """How many steps a sampler makes on a grid; None where it chooses its own."""
    return None if sampler.own_grid or planned_nfe(sampler, 1) is None else len(sigmas) - 1


def _consume(run: Iterator[Step], sampler: Sampler, x: Tensor, steps: int | None, on_step: OnStep | None) -> Walk:
    finite: list[Tensor] = []
    final: Tensor | None = None
    reached: list[float] = []
    while True:
        here = _step(len(reached) + 1, steps)
        with plugin_call(sampler, f"in {here}"), torch.no_grad():
            step = next(run, _END)
        if step is _END:
            break
        if len(reached) == (MOST_STEPS if steps is None else steps):
            raise RunError(
                f"sampler {sampler.label()} yielded more than the {steps} steps of its grid."
                if steps is not None
                else f"sampler {sampler.label()} has not ended after {MOST_STEPS:,} steps of its own."
            )
        step = _checked(step, sampler, x, here)
        finite.append(step.x.isfinite().all())
        final = step.x
        reached.append(step.sigma)
        if _can_look(final) and not finite[-1]:
            break
        if on_step is not None:
            on_step(len(reached) - 1, step)
    if final is None:
        raise RunError(f"sampler {sampler.label()} yielded no step.")
    walked = Walk(final, torch.stack(finite), sampler, reached, steps)
    if _can_look(final):
        walked.check()
    if steps is not None and len(reached) < steps:
        raise RunError(
            f"sampler {sampler.label()} yielded {len(reached)} of {steps} steps; it must yield a Step for each "
            "interval of the grid. One with a grid of its own sets own_grid = True; one that chooses its own steps "
            "returns None from nfe."
        )
    return walked


_END: Any = object()


def _checked(step: Any, sampler: Sampler, x: Tensor, here: str) -> Step:
    """What a sampler yielded, as a Step whose level is a float and whose state is one of the batch x."""
    who = f"sampler {sampler.label()} yielded"
    if not isinstance(step, Step):
        raise RunError(f"{who} {_a(step)} in {here}; it must yield Step(sigma, x).")
    sigma, state = step.sigma, step.x
    if isinstance(sigma, Tensor) and sigma.ndim == 0 and sigma.device.type == "cpu":
        sigma = float(sigma)
    if isinstance(sigma, bool) or not isinstance(sigma, float | int):
        raise RunError(f"{who} {_a(step.sigma)} as sigma in {here}; it must be a number, the level that is reached.")
    if not -sys.float_info.max <= sigma <= sys.float_info.max:  # NaN is not, either
        raise RunError(f"{who} {shown(sigma)} as sigma in {here}; it must be finite, the level that is reached.")
    for name, value in (("state", state), ("x0", step.x0)):
        if name == "x0" and value is None:
            continue
        if not isinstance(value, Tensor):
            raise RunError(f"{who} {_a(value)} as {name} in {here}; it must be a tensor.")
        if value.shape != x.shape:
            raise RunError(f"{who} a {name} of shape {tuple(value.shape)} in {here}; the batch is {tuple(x.shape)}.")
    if (state.dtype, state.device, state.layout) != (x.dtype, x.device, x.layout):
        raise RunError(f"{who} a state of {_kind(state)} in {here}; the batch is {_kind(x)}.")
    if sigma is step.sigma and not state.requires_grad:
        return step
    return Step(float(sigma), state.detach(), step.x0)


def _step(number: int, steps: int | None) -> str:
    return f"step {number}" if steps is None else f"step {number} of {steps}"


def _a(value: Any) -> str:
    """`None`, `a tuple`: what a value of the wrong type is."""
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _kind(x: Tensor) -> str:
    layout = "" if x.layout == torch.strided else f", {str(x.layout).removeprefix('torch.')}"
    return f"{str(x.dtype).removeprefix('torch.')} on {x.device}{layout}"


def _can_look(x: Tensor) -> bool:
    """Whether a value can be read without waiting for a device."""
    return x.device.type == "cpu"
