"""Schedulers of diffusers on rectified flows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from samplerbench.sampling import RECTIFIED_FLOW, Denoiser, FlowSchedule, Step, UserError

SMALLEST_TIME = 1e-4
"""Smallest time at which the velocity is computed from D. Rounded timesteps of diffusers may be 0."""


def supports_flows(cls: Any) -> bool:
    """Whether a scheduler class samples rectified flows: a flow-matching scheduler, or one with `use_flow_sigmas`."""
    return cls.__name__.startswith("FlowMatch") or "use_flow_sigmas" in inspect.signature(cls.__init__).parameters


def make_flow_scheduler(cls: Any, settings: dict[str, Any], flow: FlowSchedule) -> tuple[Any, dict[str, Any]]:
    """Create a scheduler with the schedule of a rectified flow.

    Args:
        cls: class of the scheduler.
        settings: parameters of the user. They override those of the model.
        flow: schedule of the model.

    Returns:
        The scheduler, and further arguments of its `set_timesteps`.
    """
    known = inspect.signature(cls.__init__).parameters
    schedule: dict[str, Any] = {"num_train_timesteps": flow.timesteps}
    arguments: dict[str, Any] = {}
    if "use_flow_sigmas" in known:
        schedule |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": flow.factor()}
    elif flow.dynamic and "use_dynamic_shifting" in known:
        schedule |= {"use_dynamic_shifting": True, "time_shift_type": flow.kind}
        arguments["mu"] = flow.mu
    else:
        schedule["shift"] = flow.factor()
    if "use_dynamic_shifting" in settings:
        raise UserError("use_dynamic_shifting is a property of the model; set shift instead.")
    if flow.dynamic and "shift" in settings and "use_dynamic_shifting" in known:
        schedule["use_dynamic_shifting"] = False
        arguments.clear()
    if flow.terminal is not None and "shift_terminal" in known:
        schedule["shift_terminal"] = flow.terminal
    return cls(**(schedule | settings)), arguments


def flow_steps(
    made: Any,
    arguments: dict[str, Any],
    denoise: Denoiser,
    z: Tensor,
    steps: int,
    flow: FlowSchedule,
    own_noise: Callable[[], Any],
) -> Iterator[Step]:
    """Run a scheduler on a rectified flow as a pipeline does.

    The network is evaluated at timestep/T, which several schedulers round to whole timesteps, and the scheduler gets
    v = (y - D)/t.

    Args:
        made: the scheduler.
        arguments: further arguments of its `set_timesteps`.
        denoise: denoiser D(x, σ).
        z: initial noise, (B, C, H, W).
        steps: number of steps.
        flow: schedule of the model.
        own_noise: context manager in which the scheduler draws the noise of samplerbench.
    """
    name = type(made).__name__
    try:
        made.set_timesteps(steps, device=z.device, **arguments)
    except Exception as error:  # schedulers raise many types for an unsupported number of steps
        raise UserError(f"diffusers/{name} does not support {steps} steps: {error}") from None
    y = z * float(getattr(made, "init_noise_sigma", 1.0))
    times = made.timesteps
    for i, timestep in enumerate(times):
        t = min(1.0, max(SMALLEST_TIME, float(timestep) / flow.timesteps))
        sigma = RECTIFIED_FLOW.level(t)
        given = made.scale_model_input(y, timestep) if hasattr(made, "scale_model_input") else y
        x0 = denoise(given * (sigma / t), sigma)
        with own_noise():
            y = made.step((given - x0) / t, timestep, y).prev_sample.to(z.dtype)
        last = i + 1 == len(times)
        reached = 0.0 if last else RECTIFIED_FLOW.level(min(1.0, float(made.sigmas[made.step_index])))
        yield Step(reached, y if last else y * (1 + reached), x0)


def check_flow_scheduler(cls: Any) -> None:
    """Check that a scheduler without a β schedule can sample rectified flows.

    Raises:
        UserError: if it cannot.
    """
    if not supports_flows(cls):
        raise UserError(
            f"diffusers/{cls.__name__} cannot sample a rectified flow: it has no flow mode (use_flow_sigmas); use "
            "diffusers/FlowMatchEulerDiscreteScheduler or diffusers/DPMSolverMultistepScheduler."
        )
