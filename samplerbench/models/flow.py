"""Rectified flows: the base class of their adapters, and the schedule in a scheduler's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.limits import MAX_TIMESTEPS
from samplerbench.models.fields import Fields
from samplerbench.models.model import Model
from samplerbench.models.preconditioning import FLOW
from samplerbench.sampling.flow import FlowSchedule
from samplerbench.sampling.process import RECTIFIED_FLOW
from samplerbench.untrusted import shorten

_FLOW_MATCH = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
_FLOW_MODE = (
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "SASolverScheduler"),
)

FLOW_SCHEDULERS = (*_FLOW_MATCH, *_FLOW_MODE)
"""Schedulers of diffusers whose configuration may define a rectified flow. Their solver is not used."""


@dataclass
class RectifiedFlow(Model):
    """A network that predicts the velocity v = z - x₀ of a rectified flow, y = (1-t) x₀ + t z, at any time t.

    With σ = t/(1-t) the state is x = y/(1-t) = (1+σ) y, and D = y - t v (Liu et al. 2023; Lipman et al. 2023). An
    adapter implements `ask(y, t, condition)`, which returns v, and passes `flow_fields(schedule)` to the constructor.
    Sampling starts at t = 1, where σ = ∞ (`SIGMA_INFINITY`): the first evaluation is exact there, D = y - v and ε = y.
    """


def flow_fields(schedule: FlowSchedule) -> dict[str, Any]:
    """The fields of a `Model` that every rectified flow has: levels, process, preconditioning, schedule and spacing."""
    return {
        "levels": flow_levels(schedule.timesteps),
        "process": RECTIFIED_FLOW,
        "preconditioning": FLOW,
        "flow": schedule,
        "spacing": "flow",
    }


def flow_levels(timesteps: int) -> Tensor:
    """The noise levels σ = t/(1-t) at t = i/T, i = 1 … T-1, (T-1,) float64, increasing. t = 1, σ = ∞, is left out."""
    t = torch.arange(1, timesteps, dtype=torch.float64)
    return t / (timesteps - t)


def is_flow(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the configuration of a diffusers scheduler defines a rectified flow.

    Args:
        name: class name of the scheduler.
        config: its configuration.
    """
    return (
        name.startswith("FlowMatch")
        or config.get("use_flow_sigmas") is True
        or config.get("prediction_type") == "flow_prediction"
    )


def read_flow_schedule(name: str, config: Mapping[str, Any], source: str) -> FlowSchedule:
    """Read the schedule of a rectified flow from the configuration of a diffusers scheduler.

    Missing keys use the defaults of diffusers. Settings of the solver, such as `use_karras_sigmas`, are ignored.

    Args:
        name: class name of the scheduler.
        config: its configuration.
        source: path or hub id, for error messages.

    Raises:
        UserError: if the scheduler is not supported, or a setting is out of range.
    """
    if name not in FLOW_SCHEDULERS:
        raise UserError(
            f"{source} is a rectified flow with the scheduler {shorten(name)}; supported are "
            f"{', '.join(FLOW_SCHEDULERS)}."
        )
    if not is_flow(name, config):
        raise UserError(
            f"{source} is a rectified flow, but its {name} is not in flow mode; set use_flow_sigmas to true and "
            "prediction_type to flow_prediction in the scheduler's configuration."
        )
    fields = Fields(config, f"{source}: the configuration of its scheduler")
    if fields.flag("invert_sigmas", False):
        raise UserError(f"{source} has invert_sigmas set, so its time runs from data to noise; it is not supported.")
    kind = fields.text("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise fields.refusal("time_shift_type", kind, "exponential or linear")
    given = fields.values.get("shift_terminal")
    terminal = fields.number("shift_terminal", 1e-6, 0.999) if given else None
    dynamic = fields.flag("use_dynamic_shifting", False)
    shift = fields.number("shift" if name in _FLOW_MATCH else "flow_shift", 1e-3, 1e3, 1.0)
    most = MAX_TIMESTEPS
    return FlowSchedule(
        timesteps=fields.integer("num_train_timesteps", 2, most, 1000),
        shift=shift,
        dynamic=dynamic,
        kind=cast(Literal["exponential", "linear"], kind),
        base_shift=fields.number("base_shift", -20, 20, 0.5),
        max_shift=fields.number("max_shift", -20, 20, 1.15),
        base_tokens=fields.integer("base_image_seq_len", 1, 2**31, 256),
        max_tokens=fields.integer("max_image_seq_len", 1, 2**31, 4096),
        terminal=terminal,
    )


def flow_identity(schedule: FlowSchedule) -> dict[str, Any]:
    """The protocol fields of a flow's schedule."""
    shift: dict[str, Any] = {"shift": schedule.shift}
    if schedule.dynamic:
        shift = {"shift": f"dynamic, {schedule.kind}, {schedule.factor()!r} for {schedule.tokens} tokens"}
    if schedule.terminal is not None:
        shift["last time"] = schedule.terminal
    return {"prediction": "flow", "timesteps": schedule.timesteps} | shift
