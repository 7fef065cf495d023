"""Schedules as files: the noise levels for `list`, and for the schedulers of diffusers; and their figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from samplerbench import registry
from samplerbench.bench.prepare import Prepared
from samplerbench.errors import UserError
from samplerbench.models.model import Model
from samplerbench.models.timesteps import timestep_at
from samplerbench.report.plots import SETTINGS
from samplerbench.report.style import style
from samplerbench.sampling import is_infinite
from samplerbench.sampling.spacing import pick_spacing
from samplerbench.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Schedule:
    """The noise levels of one number of steps.

    Attributes:
        spacing: spec of the spacing.
        sampler: spec of the sampler.
        guidance: spec of the guidance. None for no guidance.
        model: source of the model.
        nfe: budget of network evaluations. None if the number of steps was given.
        steps: number of steps N.
        levels: noise levels, N+1 floats, decreasing to 0. `SIGMA_INFINITY` stands for t = 1 of a rectified flow.
        evaluations: network evaluations that learning the levels cost. They are not part of the NFE.
        sigmas: argument `sigmas` of diffusers' schedulers. None if the model has no such argument.
        timesteps: argument `timesteps` of diffusers' schedulers. None if two levels have the same timestep.
    """

    spacing: str
    sampler: str
    guidance: str | None
    model: str
    nfe: int | None
    steps: int
    levels: tuple[float, ...]
    evaluations: int
    sigmas: tuple[float, ...] | None
    timesteps: tuple[int, ...] | None

    @property
    def listed(self) -> str:
        """The spec of the spacing `list` with these levels."""
        return "list:levels=" + ";".join("inf" if is_infinite(s) else repr(s) for s in self.levels[:-1])

    @property
    def short(self) -> str:
        """`listed` with six digits of each level, for a terminal."""
        return "list:levels=" + ";".join("inf" if is_infinite(s) else f"{s:.6g}" for s in self.levels[:-1])

    def as_dict(self) -> dict[str, Any]:
        """The values as plain data, which can be written as JSON or TOML."""
        values = {"sigmas": self.sigmas, "timesteps": self.timesteps}
        found = {
            "nfe": self.nfe,
            "steps": self.steps,
            "levels": ["inf" if is_infinite(s) else s for s in self.levels[:-1]],
            "list": self.listed,
            "diffusers": {name: list(value) for name, value in values.items() if value is not None},
            "evaluations": self.evaluations,
            "spacing": self.spacing,
            "sampler": self.sampler,
            "guidance": self.guidance,
            "model": self.model,
        }
        return {k: v for k, v in found.items() if v is not None}


def compared(sampler: str, requested: Sequence[str]) -> list[str]:
    """The specs of the spacings that a figure shows for comparison.

    Args:
        sampler: spec of the sampler.
        requested: specs of spacings. Empty: the default spacing of the sampler.
    """
    return list(requested) or [pick_spacing(registry.parse("sampler", sampler)).spec]


def make_schedules(prepared: Prepared) -> list[Schedule]:
    """The schedules of the cells of a prepared request.

    Args:
        prepared: the request.

    Raises:
        SamplerbenchError: if a plugin failed, or a sampler chooses its own noise levels.
    """
    model = prepared.model
    found = []
    for cell in prepared.cells:
        cell.check()
        if cell.spacing is None or cell.steps is None:
            raise UserError(f"sampler {cell.sampler.spec} chooses its own noise levels; name another sampler.")
        levels = tuple(cell.sigmas.tolist())
        found.append(
            Schedule(
                spacing=cell.spacing.spec,
                sampler=cell.sampler.spec,
                guidance=None if cell.guidance is None else cell.guidance.spec,
                model=str(model.identity["source"]),
                nfe=cell.budget,
                steps=cell.steps,
                levels=levels,
                evaluations=cell.spacing.bound_evaluations,
                sigmas=diffusers_sigmas(model, levels),
                timesteps=diffusers_timesteps(model, levels),
            )
        )
    return found


def diffusers_sigmas(model: Model, levels: Sequence[float]) -> tuple[float, ...] | None:
    """The argument `sigmas` of diffusers' schedulers for noise levels.

    For a variance-preserving model, the levels with the last one, 0, as EulerDiscreteScheduler takes them. For a
    rectified flow, the times t = σ/(1+σ) without the last one, before the shift of the checkpoint's scheduler, which
    FlowMatchEulerDiscreteScheduler applies to them: t = s t'/(1 + (s-1) t').

    Args:
        model: the model.
        levels: noise levels, N+1 floats, decreasing to 0.

    Returns:
        The values. None if the scheduler stretches its times to a last one, which cannot be undone for other levels.
    """
    if model.flow is None:
        return tuple(levels)
    if model.flow.terminal is not None:
        return None
    shift = model.flow.factor()
    return tuple(1.0 if is_infinite(s) else (s / shift) / (1 + s / shift) for s in levels[:-1])


def diffusers_timesteps(model: Model, levels: Sequence[float]) -> tuple[int, ...] | None:
    """The argument `timesteps` of diffusers' schedulers: the nearest timestep of each level above 0.

    Args:
        model: the model.
        levels: noise levels, N+1 floats, decreasing to 0.

    Returns:
        The timesteps, decreasing. None for a rectified flow, and if two levels have the same one.
    """
    if model.flow is not None:
        return None
    known = model.levels.tolist()
    found = tuple(round(min(max(timestep_at(known, s), 0), len(known) - 1)) for s in levels[:-1])
    return found if len(set(found)) == len(found) else None


def as_json(schedules: Sequence[Schedule]) -> str:
    """The schedules as JSON: an object with a list `schedules`."""
    return json.dumps({"schedules": [one.as_dict() for one in schedules]}, indent=1) + "\n"


def as_toml(schedules: Sequence[Schedule]) -> str:
    """The schedules as TOML: an array of tables `schedules`. JSON strings, numbers and lists are valid TOML."""
    lines: list[str] = []
    for one in schedules:
        fields = one.as_dict()
        table = fields.pop("diffusers")
        lines += ["[[schedules]]", *(f"{key} = {json.dumps(value)}" for key, value in fields.items())]
        lines += ["[schedules.diffusers]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()), ""]
    return "\n".join(lines)


def schedule_figure(schedules: Sequence[Schedule]) -> Figure:
    """Where the steps go: one panel for each number of evaluations, with the levels of each spacing over log σ.

    Args:
        schedules: the schedules of one or more spacings, at the same budgets or numbers of steps.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    lengths = list(dict.fromkeys((one.nfe, one.steps if one.nfe is None else None) for one in schedules))
    spacings = list(dict.fromkeys(one.spacing for one in schedules))
    with matplotlib.rc_context(SETTINGS):
        height = 0.8 + len(lengths) * (0.35 + 0.2 * len(spacings))
        figure = Figure(figsize=(8, height), layout="constrained")
        panels = figure.subplots(len(lengths), 1, squeeze=False, sharex=True)[:, 0]
        for axes, (nfe, steps) in zip(panels, lengths, strict=True):
            for one in schedules:
                if one.nfe == nfe and steps in (None, one.steps):
                    i = spacings.index(one.spacing)
                    finite = [s for s in one.levels[:-1] if not is_infinite(s)]
                    looks = style(i)
                    axes.plot(finite, [-i] * len(finite), color=looks["color"], marker=looks["marker"], linewidth=0.8)
            axes.set_yticks([-i for i in range(len(spacings))], [printable(spec) for spec in spacings])
            axes.set_ylim(0.4 - len(spacings), 0.6)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_title(f"{steps} steps" if nfe is None else f"{nfe} NFE", fontsize=9, loc="left")
        panels[0].invert_xaxis()
        panels[-1].set_xlabel("noise level σ of each step")
        first = schedules[0]
        figure.suptitle(printable(f"{first.sampler} on {first.model}"), fontsize=8, color="#555555", x=0.01, ha="left")
    return figure
