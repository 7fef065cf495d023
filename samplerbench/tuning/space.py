"""The search space of `samplerbench tune`: samplers and their parameters, spacings, and guidance scales."""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from samplerbench import registry
from samplerbench.errors import SamplerbenchError
from samplerbench.options import Parameter, parameters_of, show_value

FACTORS = (0.5, 0.7, 1.0, 1.4, 2.0)
"""The values of a positive number without narrow bounds that are tried, as multiples of its default."""
WIDE = 10
"""Bounds are narrow if the upper one is at most this many times the default."""
PARTS = 4
"""A number with narrow bounds is tried at its default and at the ends of this many equal parts of its range."""
MOST_INTEGERS = 8
"""An integer with a larger range than this keeps its default."""
DEFAULT = "default"
"""The choice of the spacing that belongs to the sampler or to the model."""


class Trial(Protocol):
    """What the space needs of a trial of the library that proposes candidates."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of the choices."""


@dataclass(frozen=True)
class Candidate:
    """A combination that is tried.

    Attributes:
        sampler: spec of the sampler.
        guidance: spec of the guidance. None for the unguided model.
        spacing: spec of the spacing. None for the default of the sampler or the model.
    """

    sampler: str
    guidance: str | None = None
    spacing: str | None = None

    @property
    def label(self) -> str:
        """The candidate as text: `unipc:order=2 + cfg:scale=2, karras`."""
        guided = f" + {self.guidance}" if self.guidance else ""
        return f"{self.sampler}{guided}" + (f", {self.spacing}" if self.spacing else "")


def choices(parameter: Parameter) -> list[Any]:
    """List the values of a parameter that are tried. The first one is the default.

    Every choice of a `Literal` or a boolean is tried; integers with a small range; numbers with narrow bounds at equal
    distances; other positive numbers at multiples of their default. Other parameters keep their default.

    Args:
        parameter: the parameter.
    """
    default, bounds = parameter.default, parameter.bounds
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    values: Iterable[Any] = ()
    if parameter.rest:
        return [default]
    if typing.get_origin(parameter.type) is Literal:
        values = typing.get_args(parameter.type)
    elif parameter.type is bool:
        values = (False, True)
    elif parameter.type is int and low is not None and high is not None and high - low <= MOST_INTEGERS:
        values = range(math.ceil(low), math.floor(high) + 1)
    elif parameter.type is float and isinstance(default, int | float):
        narrow = low is not None and high is not None and high <= WIDE * abs(default)
        if low is not None and high is not None and (narrow or default <= 0):
            values = (round(low + (high - low) * i / PARTS, 6) for i in range(PARTS + 1))
        elif default > 0:
            values = (float(f"{default * factor:.3g}") for factor in FACTORS)
    inside = [v for v in values if v != default and not _outside(v, bounds)]
    return [default, *inside]


def _outside(value: Any, bounds: Mapping[str, float]) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    tests = {"gt": value > bounds.get("gt", -math.inf), "ge": value >= bounds.get("ge", -math.inf)}
    tests |= {"lt": value < bounds.get("lt", math.inf), "le": value <= bounds.get("le", math.inf)}
    return not all(tests.values())


@dataclass(frozen=True)
class Space:
    """What is searched: one choice of each kind, and the parameters of what was chosen.

    A spec may fix parameters: those of `dpm++:order=3` that are not `order` are searched.

    Attributes:
        samplers: specs of the samplers.
        spacings: specs of the spacings besides the default one.
        guidances: specs of the guidances. None for the unguided model.
    """

    samplers: tuple[str, ...]
    spacings: tuple[str, ...] = ()
    guidances: tuple[str | None, ...] = (None,)

    def defaults(self) -> list[Candidate]:
        """The default rows: every sampler and guidance with its default parameters and spacing."""
        return [Candidate(sampler, guidance) for guidance in self.guidances for sampler in self.samplers]

    def values_of(self, candidate: Candidate) -> dict[str, Any]:
        """The choices of a trial that give one of the default rows.

        Args:
            candidate: one of `defaults`.
        """
        values: dict[str, Any] = {"sampler": candidate.sampler, "spacing": DEFAULT}
        values["guidance"] = candidate.guidance or "none"
        for kind, spec in (("sampler", candidate.sampler), ("guidance", candidate.guidance)):
            if spec is not None:
                values |= {f"{spec} {name}": shown[0] for name, shown in _searched(kind, spec)}
        return values

    def suggest(self, trial: Trial) -> Candidate:
        """Make a candidate of a trial.

        Args:
            trial: the trial. It is asked for `sampler`, `spacing`, `guidance`, and the parameters of what it chose.
        """
        sampler = trial.suggest_categorical("sampler", self.samplers)
        spacing = trial.suggest_categorical("spacing", (DEFAULT, *self.spacings))
        guidance = trial.suggest_categorical("guidance", tuple(g or "none" for g in self.guidances))
        return Candidate(
            _suggested("sampler", sampler, trial),
            None if guidance == "none" else _suggested("guidance", guidance, trial),
            None if spacing == DEFAULT else _suggested("spacing", spacing, trial),
        )


@functools.lru_cache(maxsize=512)
def _searched(kind: str, spec: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The parameters of a plugin that have several choices and are not fixed in the spec, with the choices as text."""
    text = registry.split(spec)[2]
    fixed = registry.parse(kind, spec)
    known = parameters_of(type(fixed)).values()
    named = {part.partition("=")[0].strip() for part in text.split(",")} if text else set()
    unset = [p for p in known if p.name not in named and getattr(fixed, p.name) == p.default]
    listed = [(p.name, tuple(show_value(value) for value in choices(p))) for p in unset]
    return tuple((name, values) for name, values in listed if len(values) > 1)


def _suggested(kind: str, spec: str, trial: Trial) -> str:
    extended = spec
    for name, values in _searched(kind, spec):
        value = trial.suggest_categorical(f"{spec} {name}", values)
        if value != values[0]:
            extended = registry.extend(extended, f"{name}={value}")
    return extended


def all_specs(kind: Literal["sampler", "spacing"]) -> list[str]:
    """The names of the plugins of a kind that can be used without parameters and without a task.

    Learned spacings must be named.

    Args:
        kind: the kind.
    """
    usable = []
    for entry in registry.entries(kind):
        try:
            plugin = registry.parse(kind, entry.name)
        except SamplerbenchError:
            continue
        if not getattr(plugin, "learned", False) and not getattr(plugin, "needs_task", False):
            usable.append(entry.name)
    return usable


__all__ = ["Candidate", "Space", "all_specs", "choices"]
