"""Typed parameters of plugins, with bounds and help text.

    @dataclass(frozen=True)
    class DDIM(Sampler):
        eta: float = option(0.0, "0 is deterministic, 1 is ancestral", ge=0.0, le=1.0)

The fields of a plugin are its parameters. They are validated and converted with pydantic when an instance is created,
from Python or from a spec string.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import inspect
import sys
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

from samplerbench.errors import UserError
from samplerbench.limits import MAX_INTEGER
from samplerbench.untrusted import shorten

_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def option(
    default: Any,
    help: str,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    positional: bool = False,
    rest: bool = False,
) -> Any:
    """Declare a parameter of a plugin. The type annotation of the field is its type; `typing.Literal` lists choices.

    Args:
        default: default value.
        help: one line of help text.
        gt: values must be greater than this.
        ge: values must be greater than or equal to this.
        lt: values must be less than this.
        le: values must be less than or equal to this.
        positional: whether a spec can give the value without its name: `exact:gaussian` for `exact:problem=gaussian`.
            If the first parameter is the only number, this needs no declaration: `cfg:3` for `cfg:scale=3`.
        rest: whether the field collects all parameters without a field of their own, as (name, text) pairs. For
            plugins that wrap an object with its own parameters.
    """
    bounds = {k: v for k, v in (("gt", gt), ("ge", ge), ("lt", lt), ("le", le)) if v is not None}
    return dataclasses.field(
        default=default, metadata={"help": help, "bounds": bounds, "positional": positional, "rest": rest}
    )


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a plugin class.

    Attributes:
        name: name of the field.
        type: type annotation.
        default: default value.
        help: one line of help text.
        bounds: gt, ge, lt and le, as far as they are set.
        positional: as for `option`.
        rest: as for `option`.
    """

    name: str
    type: Any
    default: Any
    help: str
    bounds: Mapping[str, float]
    positional: bool
    rest: bool

    @property
    def type_name(self) -> str:
        """The type as text: `float`, `small | large`, `int or none`."""
        if self.rest:
            return "parameter=value, …"
        return _type_name(self.type)

    @property
    def is_integer(self) -> bool:
        """Whether its values are integers or None."""
        members = [m for m in typing.get_args(self.type) or (self.type,) if m is not type(None)]
        return members == [int]

    @property
    def is_number(self) -> bool:
        """Whether its values are integers, floats or None."""
        members = [m for m in typing.get_args(self.type) or (self.type,) if m not in (type(None), None)]
        if typing.get_origin(self.type) is typing.Literal:
            members = [type(m) for m in members]
        return bool(members) and all(member in (int, float) for member in members)

    @property
    def range(self) -> str:
        """The bounds as text: `≥ 0, ≤ 1`; "" if there are none."""
        return ", ".join(
            f"{_BOUNDS[k]} {v:,}" if isinstance(v, int) else f"{_BOUNDS[k]} {v:g}" for k, v in self.bounds.items()
        )

    def describe(self) -> str:
        """`eta: float, ≥ 0, ≤ 1, default 0.0`."""
        bounds = f", {self.range}" if self.bounds else ""
        default = show_value(self.default) or '""'
        return f"{self.name}: {self.type_name}{bounds}, default {default}"

    def convert(self, value: Any) -> Any:
        """Convert a value to the type of the parameter. Raises ValueError with a reason."""
        import pydantic

        if isinstance(value, str) and value.lower() == "none" and type(None) in typing.get_args(self.type):
            return None
        if isinstance(value, str) and typing.get_origin(self.type) is typing.Literal:
            value = next((c for c in typing.get_args(self.type) if show_value(c) == value), value)
        annotated: Any = self.type
        bounds: dict[str, Any] = dict(self.bounds)
        if self.is_integer:  # the largest integer that torch supports
            bounds = {"le": MAX_INTEGER} | bounds if "lt" not in bounds else bounds
            bounds = {"ge": -MAX_INTEGER} | bounds if "gt" not in bounds else bounds
            annotated = typing.Annotated[annotated, pydantic.Field(**bounds)]
        elif bounds:
            annotated = typing.Annotated[annotated, pydantic.Field(**bounds, allow_inf_nan=False)]
        try:
            return pydantic.TypeAdapter(annotated).validate_python(value)
        except pydantic.ValidationError as error:
            raise ValueError(explain(error.errors()[0])) from None


_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
    "greater_than": ("greater than", "gt"),
    "less_than": ("less than", "lt"),
}
_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text"}


def explain(error: Mapping[str, Any]) -> str:
    """The reason of a validation error, without a full stop: `it must be at most 1`, `give a whole number`.

    Args:
        error: an entry of `pydantic.ValidationError.errors()`.
    """
    kind, values = error["type"], error.get("ctx", {})
    if kind in _LIMITS:
        words, name = _LIMITS[kind]
        limit = values[name]
        return f"it must be {words} {f'{limit:,}' if isinstance(limit, int) else show_value(limit)}"
    if kind == "finite_number":
        return "give a finite number"
    if kind == "literal_error":
        return "choose one of " + values["expected"].replace("'", "").replace(" or ", ", ")
    head, _, tail = kind.partition("_")
    if head in _TYPES and tail in ("parsing", "type", "from_float", "parsing_size"):
        return f"give {_TYPES[head]}"
    return str(error["msg"][0].lower() + error["msg"][1:])


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    members = typing.get_args(annotation)
    if type(None) in members:
        return " or ".join([_type_name(m) for m in members if m is not type(None)] + ["none"])
    return getattr(annotation, "__name__", str(annotation))


def show_value(value: Any) -> str:
    """A value as written in a spec: 0.5, true, none, karras."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:.12g}"
        return short if float(short) == value else repr(value)
    try:
        return str(value)
    except ValueError:  # Python does not convert integers with thousands of digits
        return f"an integer of {value.bit_length()} bits"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The sentence ` Did you mean "x"?` with the known word nearest to `word`; "" if none is close."""
    best = nearest(word, known)
    return f' Did you mean "{best}"?' if best else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word nearest to `word`; "" if none is close."""

    def likeness(name: str) -> tuple[float, bool]:
        a, b = name.lower(), word.lower()
        # For equally near names, prefer the same letters: "ddmi" is "ddim", not "ddpm".
        return difflib.SequenceMatcher(None, a, b).ratio(), sorted(a) == sorted(b)

    best = max(known, key=likeness, default="")
    return best if best and likeness(best)[0] >= 0.5 else ""


class Configurable:
    """Base class of all plugins: a frozen dataclass whose fields are its parameters.

    Decorate each subclass with `@dataclass(frozen=True)`. Creating an instance validates and converts every field.

    Attributes:
        kind: kind of the plugin.
        name: registered name, set by the registry.

    Raises:
        UserError: a value of the wrong type or out of bounds. The message lists the parameters.
    """

    kind: ClassVar[str] = "plugin"
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for parameter in parameters_of(type(self)).values():
            value = getattr(self, parameter.name)
            try:
                converted = parameter.convert(value)
            except ValueError as reason:
                raise UserError(
                    f"{self.kind} {self.label()}: {parameter.name}={shorten(show_value(value))}: {reason}. "
                    f"{list_parameters(type(self))}"
                ) from None
            object.__setattr__(self, parameter.name, converted)

    bound_evaluations: ClassVar[int] = 0
    """Network evaluations (rows) of the estimates that a bound instance uses; set by `with_state` in `bind`."""

    @classmethod
    def label(cls) -> str:
        """The registered name, or the name of the class if it is not registered."""
        return cls.name or cls.__name__

    def with_state(self, **state: Any) -> Self:
        """A copy with further attributes, which are no parameters: for `bind`.

        They are part of neither the spec nor equality, and a copy has those of the instance it is made from.

        Raises:
            TypeError: one of them is a parameter.
        """
        if parameters := [name for name in state if name in parameters_of(type(self))]:
            raise TypeError(f"{parameters[0]} is a parameter; use dataclasses.replace to change it")
        made = copy.copy(self)
        for name, value in state.items():
            object.__setattr__(made, name, value)
        return made

    @property
    def parameters(self) -> dict[str, Any]:
        """All parameters with their values, including defaults, as recorded in the protocol."""
        return {name: getattr(self, name) for name in parameters_of(type(self))}

    @property
    def spec(self) -> str:
        """The spec of this instance: the name, the positional value, and all values that differ from the defaults."""
        known = parameters_of(type(self)).values()
        slot = next((p.name for p in known if p.positional), None)
        changed: list[str] = []
        first = ""
        for p in known:
            value = getattr(self, p.name)
            # After a slash a spec has one value, without a colon.
            if p.name == slot and (text := show_value(value)) and ":" not in text:
                first = f"/{text}"
            elif p.rest:
                changed += [f"{key}={text}" for key, text in value]
            elif value != p.default:
                changed.append(f"{p.name}={show_value(value)}")
        return self.label() + first + (":" + ",".join(changed) if changed else "")


def parameters_of(cls: Any) -> dict[str, Parameter]:
    """The parameters of a plugin class, by name, in the order of their declaration.

    Raises:
        UserError: the class has fields but is not a dataclass, defines its own `__init__`, or has a field that is not
            declared with `option` or that overrides an attribute of every plugin.
    """
    path = _where(cls)
    if bare := [name for name, value in vars(cls).items() if isinstance(value, dataclasses.Field)]:
        raise UserError(
            f"{path} has the option {bare[0]} but is not a dataclass; decorate it with @dataclass(frozen=True)."
        )
    if not dataclasses.is_dataclass(cls):
        return {}
    _check_init(cls, path)
    hints = _hints(cls)  # type: ignore[arg-type]
    parameters = {}
    for field in dataclasses.fields(cls):
        if hasattr(Configurable, field.name):
            raise UserError(
                f"{path}: a parameter cannot be called {field.name}, an attribute of every plugin; rename it."
            )
        if "help" not in field.metadata:
            raise UserError(
                f"{path}: the field {field.name} has no help and no bounds; "
                f'declare it as {field.name}: {_type_name(hints[field.name])} = option(default, "what it does")'
            )
        parameters[field.name] = Parameter(
            name=field.name,
            type=hints[field.name],
            default=field.default,
            help=field.metadata["help"],
            bounds=field.metadata["bounds"],
            positional=field.metadata["positional"],
            rest=field.metadata["rest"],
        )
    return parameters


@functools.lru_cache(maxsize=1024)
def _hints(cls: Any) -> dict[str, Any]:
    """The types of the fields of a class. Its specs are compared often, and resolving the types takes a millisecond."""
    return typing.get_type_hints(cls)


def _where(cls: Any) -> str:
    """The name of a class in messages: `package.module.Class`, or `PATH.py:CLASS` for a class in a file."""
    name = vars(cls).get("name")
    from_file = hasattr(sys.modules.get(cls.__module__), "__samplerbench_source__")
    return name if from_file and isinstance(name, str) else f"{cls.__module__}.{cls.__qualname__}"


def _check_init(cls: Any, path: str) -> None:
    """Raise UserError for a class whose parameters are not its fields, so the protocol would not record them."""
    if "__dataclass_params__" not in vars(cls):
        for name, annotation in vars(cls).get("__annotations__", {}).items():
            if "ClassVar" not in str(annotation) and not any(hasattr(base, name) for base in cls.__mro__[1:]):
                raise UserError(
                    f"{path} has the field {name} but is not a dataclass; decorate it with "
                    f"@dataclass(frozen=True), and "
                    f'declare the field as {name}: TYPE = option(default, "what it does").'
                )
    owner = next(c for c in cls.__mro__ if "__init__" in vars(c))
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    taken = list(inspect.signature(owner.__init__).parameters)[1:]
    if set(taken) != fields or (fields and "__dataclass_params__" not in vars(owner)):
        raise UserError(
            f"{path} defines its own __init__, so its parameters are unknown; make it a frozen dataclass without "
            '__init__, whose parameters are fields: eta: float = option(0.0, "what it does").'
        )


def list_parameters(cls: type[Configurable]) -> str:
    """A sentence that lists the parameters of a class with type, bounds and default, for error messages."""
    known = parameters_of(cls)
    if not known:
        return f"{cls.label()} has no parameters."
    return f"Parameters of {cls.label()}: " + "; ".join(p.describe() for p in known.values()) + "."


def short_parameter(cls: type[Configurable]) -> Parameter | None:
    """The parameter that a number without a name sets, as in `cfg:3` for `cfg:scale=3`; None if there is none.

    It is the first parameter of a class, if it is the only number among the parameters, and no parameter is declared
    as positional. The spec of an instance always has the name: `cfg:scale=3`.

    Args:
        cls: the plugin class.
    """
    known = list(parameters_of(cls).values())
    if any(p.positional or p.rest for p in known) or [p.is_number for p in known].count(True) != 1:
        return None
    return known[0] if known[0].is_number else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def build(
    cls: type[Configurable], arguments: Mapping[str, str], positional: Iterable[str] = (), slash: bool = False
) -> Any:
    """Create an instance of a plugin class from the strings of a spec.

    Args:
        cls: the plugin class.
        arguments: parameter → value.
        positional: values without a name, for the positional parameters, or a number for `short_parameter`.
        slash: whether the first of them follows a slash, as in `exact/gaussian`. Then it is for a positional
            parameter only.

    Raises:
        UserError: an unknown parameter, a parameter given twice, or an invalid value.
    """
    known = parameters_of(cls)
    values: dict[str, Any] = {}
    rest = next((p.name for p in known.values() if p.rest), None)
    slots = [p.name for p in known.values() if p.positional]
    short = None if slash else short_parameter(cls)
    for value in positional:
        if short is not None and _is_number(value):
            slots, short = [short.name], None
        if not slots:
            problem = f"has no value; write {value}=VALUE" if value in known else "has no name; write parameter=value"
            raise UserError(f'{cls.kind} {cls.label()}: "{shorten(value)}" {problem}. {list_parameters(cls)}')
        values[slots.pop(0)] = value
    for name, value in arguments.items():
        if rest is not None and (name not in known or name == rest):
            values[rest] = (*values.get(rest, ()), (name, value))
            continue
        if name not in known:
            raise UserError(
                f'{cls.kind} {cls.label()} has no parameter "{shorten(name)}".{did_you_mean(name, known)} '
                f"{list_parameters(cls)}"
            )
        if name in values:
            raise UserError(f"{cls.kind} {cls.label()}: {name} is given twice.")
        values[name] = value
    return cls(**values)
