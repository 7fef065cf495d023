"""The driver: runs the generator of a sampler, checks each step and disables gradients."""

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
from samplerbench.sampling.sampler import Sampler, Step, planned_nfe, start_steps
from samplerbench.text import show_sigma

OnStep = Callable[[int, Step], None]
"""Callback for progress and trajectories. Its arguments are the step index, from 0, and the yielded `Step`."""


MOST_STEPS = 100_000
"""Maximum number of steps of a sampler that chooses its own steps."""


@dataclass(frozen=True)
class Walk:
    """The result of running a sampler over a grid.

    Attributes:
        x: final state, (B, C, H, W).
        finite: whether each of the K states is finite, (K,) bool on the device of the state.
        sampler: the sampler.
        levels: noise level after each of the K steps.
        steps: number of steps of the grid. None if the sampler chooses its own steps.
    """

    x: Tensor
    finite: Tensor
    sampler: Sampler
    levels: list[float]
    steps: int | None

    def check(self, finite: Tensor | None = None) -> None:
        """Check that all states are finite.

        The check synchronises with the device, unless `finite` is on the CPU.

        Args:
            finite: copy of the attribute `finite`, (K,) bool. If None, the attribute is used.

        Raises:
            RunError: if a state is not finite.
        """
        sound = (self.finite if finite is None else finite).tolist()
        if not all(sound):
            bad = sound.index(False)
            raise RunError(
                f"sampler {self.sampler.label()}: the state is not finite after {_step(bad + 1, self.steps)} "
                f"({show_sigma(self.levels[bad], 4)}); try more steps, another spacing, or {argument('dtype', 'fp32')}."
            )


def drive(
    sampler: Sampler,
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    on_step: OnStep | None = None,
) -> Tensor:
    """Run a sampler over a grid and return the final state.

    Gradients are disabled during every step. A NaN or Inf stops the run immediately on the CPU. On other devices the
    check runs after the last step, because each check synchronises with the device. The error names the step.

    Args:
        sampler: the sampler.
        denoise: denoiser D(x, σ) of the batch.
        x: initial state at noise level sigmas[0], (B, C, H, W).
        sigmas: noise levels, (N+1,) float64 on the CPU, strictly decreasing.
        noise: noise source of the steps.
        on_step: callback after each step.

    Returns:
        The final state, (B, C, H, W).

    Raises:
        RunError: if a state is not finite, if the sampler raises an error, or if it does not yield exactly one Step
            with the shape, dtype and device of x per interval. A sampler that chooses its own steps may yield at most
            MOST_STEPS.
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
    """Run a sampler as `drive` does, without device synchronisation.

    On the CPU it checks that all states are finite. On other devices the caller must call `Walk.check`.

    Raises:
        RunError: see `drive`.
    """
    steps = _expected(sampler, sigmas)
    with plugin_call(sampler, "in steps"):
        # Clone the grid, so that a sampler that modifies it in place does not affect later batches.
        given = start_steps(sampler, denoise, x, sigmas.clone(), noise)
        run = iter(given) if isinstance(given, Iterable) else None
    if run is None:
        raise RunError(
            f"sampler {sampler.label()}: steps returned {_a(given)}; it must be a generator that yields a Step for "
            "each interval."
        )
    try:
        return _consume(run, sampler, x, steps, on_step)
    finally:
        # The traceback of a stored error references the suspended sampler. Close it to release its tensors.
        if isinstance(run, Generator):
            with suppress(Exception), plugin_call(sampler, "when it was closed"):
                run.close()


def _expected(sampler: Sampler, sigmas: Tensor) -> int | None:
    """The number of steps of a sampler on a grid. None if it chooses its own steps."""
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
                else f"sampler {sampler.label()} did not finish within {MOST_STEPS:,} steps."
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
            "interval of the grid. Set own_grid = True if the method defines its own grid. Return None from nfe if "
            "it chooses its own steps."
        )
    return walked


_END: Any = object()


def _checked(step: Any, sampler: Sampler, x: Tensor, here: str) -> Step:
    """Check a yielded value. Return it as a Step with a float noise level and a detached state."""
    who = f"sampler {sampler.label()} yielded"
    if not isinstance(step, Step):
        raise RunError(f"{who} {_a(step)} in {here}; it must yield Step(sigma, x).")
    sigma, state = step.sigma, step.x
    if isinstance(sigma, Tensor) and sigma.ndim == 0 and sigma.device.type == "cpu":
        sigma = float(sigma)
    if isinstance(sigma, bool) or not isinstance(sigma, float | int):
        raise RunError(
            f"{who} {_a(step.sigma)} as sigma in {here}; it must be a number, the noise level after the step."
        )
    if not -sys.float_info.max <= sigma <= sys.float_info.max:  # also rejects NaN
        raise RunError(f"{who} {shown(sigma)} as sigma in {here}; it must be finite, the noise level after the step.")
    for name, value in (("state", state), ("x0", step.x0)):
        if name == "x0" and value is None:
            continue
        if not isinstance(value, Tensor):
            raise RunError(f"{who} {_a(value)} as {name} in {here}; it must be a tensor.")
        if value.shape != x.shape:
            raise RunError(
                f"{who} a {name} of shape {tuple(value.shape)} in {here}; it must have the shape {tuple(x.shape)}."
            )
    if (state.dtype, state.device, state.layout) != (x.dtype, x.device, x.layout):
        raise RunError(f"{who} a state of {_kind(state)} in {here}; it must be {_kind(x)}.")
    if sigma is step.sigma and not state.requires_grad:
        return step
    return Step(float(sigma), state.detach(), step.x0)


def _step(number: int, steps: int | None) -> str:
    return f"step {number}" if steps is None else f"step {number} of {steps}"


def _a(value: Any) -> str:
    """Describe a value of the wrong type, for error messages."""
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _kind(x: Tensor) -> str:
    layout = "" if x.layout == torch.strided else f", {str(x.layout).removeprefix('torch.')}"
    return f"{str(x.dtype).removeprefix('torch.')} on {x.device}{layout}"


def _can_look(x: Tensor) -> bool:
    """Whether values of x can be read without device synchronisation."""
    return x.device.type == "cpu"
