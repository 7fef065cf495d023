"""Suites: TOML files with the fields of a `Request`. Their grids can also have `parameters` and published tables."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from samplerbench import registry
from samplerbench.bench.request import Grid, Published, Request, RequestError
from samplerbench.errors import Argument, Message, UserError, spell
from samplerbench.limits import MAX_CELLS, MAX_INTEGER
from samplerbench.options import did_you_mean, explain, nearest, show_value
from samplerbench.untrusted import parse_toml, read_text, reason, shorten, user_path

Number = Annotated[float, Field(allow_inf_nan=True)] | Annotated[int, Field(ge=-(2**53), le=2**53)]
Value = Annotated[float, Field(allow_inf_nan=False)] | Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)]

PLURAL = {name: f"{name}s" for name in ("sampler", "guidance", "spacing", "task", "metric", "seed", "prompt")}
"""Keys of a suite by the argument name of an error, where the two differ."""


class Table(BaseModel):
    """Published values for a `[[grid]]`: a table per metric, one row per sampler, one column per step count.

    The rows are in the order samplers × parameters × guidances. Missing values are nan.

    Attributes:
        source: The paper and the table.
    """

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, list[list[Number]]]

    source: Annotated[str, Field(min_length=1)]


class Expansion(BaseModel):
    """Keys of a `[[grid]]` in addition to the fields of `Grid`.

    Attributes:
        parameters: Values by parameter name. Every sampler is run with every combination of them.
        published: The published values, or None.
    """

    model_config = ConfigDict(strict=True)

    parameters: dict[str, list[Value | bool | str]] = {}
    published: Table | None = None


TOP = ("name", *(name for name in Request.model_fields if name not in ("grids", "offline")), "grid")
"""The keys of a suite."""
KEYS = ("samplers", "parameters", "steps", "nfe", "guidances", "spacings", "published")
"""The keys of a `[[grid]]`."""


def in_toml(given: Argument) -> str:
    """Format an argument as TOML, for errors of a suite: `labels = "balanced"`, `n = 5`.

    Args:
        given: The argument.
    """
    name = PLURAL.get(given.name, given.name)
    return name if given.value is None else f"{name} = {json.dumps(given.value, ensure_ascii=False, default=str)}"


def load_suite(file: Path) -> Request:
    """Load a suite file.

    Args:
        file: The file.

    Returns:
        The request.

    Raises:
        UserError: If the file is invalid. The message starts with `FILE:LINE`.
    """
    try:
        text = read_text(user_path(file))
    except FileNotFoundError:
        raise UserError(f"the suite {file} does not exist.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"the suite {file} cannot be read: {reason(error)}.") from None
    try:
        data = parse_toml(text)
    except ValueError as error:
        line = re.search(r"line (\d+)", str(error))
        raise UserError(f"{file}:{line.group(1) if line else 1}: it is not valid TOML: {reason(error)}.") from None
    return Suite(file, text, data).request()


@dataclass(frozen=True)
class Suite:
    """A suite file.

    Attributes:
        file: The file.
        text: Content of the file.
        data: The parsed content.
    """

    file: Path
    text: str
    data: dict[str, Any]

    def request(self) -> Request:
        """Return the request of the file.

        Raises:
            UserError: If the file is invalid. The message contains the line.
        """
        self._check_keys(self.data, TOP, [])
        if not isinstance(self.data.get("name", ""), str):
            raise self.error(["name"], "name: give text.")
        tables = self.data.get("grid", [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise self.error(["grid"], "grid: write each grid as a table, [[grid]].")
        with self._placing([]):
            request = Request((), **{key: value for key, value in self.data.items() if key not in ("name", "grid")})
        if not request.metrics:
            raise self.error(["metrics"], "metrics is empty; give at least one.")
        if not tables:
            raise self.error([], "grid is missing; a suite needs at least one [[grid]].")
        return request.replace(grids=[self._grid(i, table) for i, table in enumerate(tables)])

    def error(self, place: Sequence[Any], message: object, value: str | None = None) -> UserError:
        """Create an error with the message `FILE:LINE: message`.

        Args:
            place: Path of the field (see `find_line`).
            message: The message.
            value: Text of the item (see `find_line`).
        """
        line = find_line(self.text, list(place), value)
        return UserError(Message([f"{self.file}:{line}: {spell(message, in_toml)}"]))

    @contextmanager
    def _placing(self, place: list[Any]) -> Iterator[None]:
        """Add the file and line to errors of a request or of a part of it."""
        try:
            yield
        except RequestError as error:
            at = [*place, *error.place]
            value = self._at(at)
            raise self.error(at, error, value if isinstance(value, str) else None) from error.__cause__

    def _at(self, place: list[Any]) -> Any:
        """Return the value at a path in the file, or None."""
        found: Any = self.data
        with suppress(KeyError, IndexError, TypeError):
            for part in place:
                found = found[part]
            return found
        return None

    def _check_keys(self, table: dict[str, Any], known: Sequence[str], place: list[Any]) -> None:
        for key in table:
            if key not in known:
                hint = f"{_elsewhere(key, bool(place)) or did_you_mean(key, known)} Known: {', '.join(known)}."
                raise self.error([*place, key], f'there is no key "{shorten(key)}" here.{hint}')

    def _grid(self, number: int, table: dict[str, Any]) -> Grid:
        place: list[Any] = ["grid", number]
        self._check_keys(table, KEYS, place)
        if bool(table.get("steps")) == bool(table.get("nfe")):
            what = "both steps and nfe" if table.get("steps") else "neither steps nor nfe"
            raise self.error(place, f"this grid has {what}; give one of them.")
        try:
            more = Expansion(**{key: value for key, value in table.items() if key in Expansion.model_fields})
        except ValidationError as error:
            first, inside = _first(error.errors())
            raise self.error([*place, *inside], _explain(first, ["grid", *inside])) from None
        named = {key: value for key, value in table.items() if key in Grid.model_fields and key != "published"}
        sizes = [len(value) for value in named.values() if value and isinstance(value, list)]
        if math.prod([*sizes, *map(len, more.parameters.values())]) > MAX_CELLS:
            raise self.error(place, f"this grid has more than {MAX_CELLS:,} cells; remove some values.")
        if "samplers" not in table:
            raise self.error(place, 'samplers is missing in this [[grid]]; give at least one: samplers = ["ddim"].')
        if empty := [name for name, values in more.parameters.items() if not values]:
            at = [*place, "parameters", empty[0]]
            raise self.error(at, f"parameters.{empty[0]} is empty; give at least one value.")
        if isinstance(named.get("spacings"), list):
            named["spacings"] = [None if s == "default" else s for s in named["spacings"]]
        with self._placing(place):
            grid = Grid(**named)
        if more.parameters:
            specs = [spec for base in named["samplers"] for spec in _with(base, more.parameters)]
            try:
                grid = grid.replace(samplers=specs)
            except RequestError as error:
                raise self.error([*place, "parameters"], error) from error.__cause__
        return grid.replace(published=self._published(place, grid, more.published))

    def _published(self, place: list[Any], grid: Grid, table: Table | None) -> list[Published]:
        """Return the published values of a grid, one per cell and metric."""
        rows = [(sampler, guidance) for sampler in grid.samplers for guidance in grid.guidances]
        columns = grid.steps or grid.nfe
        found: list[Published] = []
        for metric, values in ({} if table is None else table.__pydantic_extra__).items():
            here = [*place, "published", metric]
            metric = registry.current_name("metric", metric)
            known = {e.name for e in registry.entries("metric")}
            if metric not in known:
                raise self.error(here, f'no metric "{metric}".{did_you_mean(metric, known)}')
            if len(grid.spacings) != 1:
                raise self.error(here, "published values belong to one spacing; this grid has several.")
            if len(values) != len(rows) or any(len(row) != len(columns) for row in values):
                raise self.error(
                    here,
                    f"published.{metric} has rows of lengths {[len(row) for row in values]}; this grid needs "
                    f"{[len(columns)] * len(rows)}: one row for each sampler, parameter and guidance, and one value "
                    "for each column.",
                )
            assert table is not None
            for (sampler, guidance), row in zip(rows, values, strict=True):
                for column, value in zip(columns, row, strict=True):
                    if value == value:
                        found.append(
                            Published(
                                sampler=sampler,
                                guidance=guidance,
                                column=column,
                                metric=metric,
                                value=float(value),
                                source=table.source,
                            )
                        )
        return found


def _elsewhere(key: str, inside: bool) -> str:
    """The sentence that says where an unknown key belongs; "" if it is not a key of the other table.

    Args:
        key: The key.
        inside: Whether it was written in a `[[grid]]`.
    """
    other = TOP if inside else KEYS
    word = next((word for word in (key, f"{key}s") if word in other), nearest(key, (*TOP, *KEYS)))
    if word not in other:
        return ""
    return f" Write {word} " + ("above the first [[grid]]." if inside else "in a [[grid]].")


def _with(spec: str, parameters: dict[str, list[Any]]) -> Iterator[str]:
    """Yield a spec with every combination of the parameter values."""
    for values in itertools.product(*parameters.values()):
        extra = ",".join(f"{k}={show_value(v)}" for k, v in zip(parameters, values, strict=True))
        yield registry.extend(spec, extra)


_TYPES = ("str", "int", "float", "bool", "constrained-int", "constrained-float")
"""Names of the possible types of a value in pydantic errors."""


def _first(errors: list[Any]) -> tuple[Any, list[Any]]:
    """Return the first error and its path in the file. For a union, prefer the error of the own type."""
    first = errors[0]
    same = [e for e in errors if e["loc"][:-1] == first["loc"][:-1] and e["loc"][-1:] in [(t,) for t in _TYPES]]
    if first in same:
        first = next((e for e in same if not e["type"].endswith("_type")), first)
    place = [part for part in first["loc"] if not (isinstance(part, str) and "[" in part)]
    return first, place[:-1] if first in same else place


def _explain(error: Any, place: list[Any]) -> str:
    names = [str(part) for part in place if not isinstance(part, int)]
    name = ".".join(names)
    if error["type"] == "missing":
        return f"{names[-1]} is missing in [{'.'.join(names[:-1])}]; name the paper and the table as text."
    if error["type"] in ("dict_type", "model_type"):
        return f"{name}: write it as a table, [{name}]."
    return f"{name}: {explain(error)}."


def find_line(text: str, place: list[Any], value: str | None = None) -> int:
    """Return the line number of a field in a suite file.

    Args:
        text: Content of the file.
        place: Path of the field. For example, ["grid", 1, "samplers", 0] is in the second [[grid]].
        value: Text of a list item, which locates the item in a list of several lines.

    Returns:
        The line number, from 1.
    """
    lines = text.split("\n")
    first, place = 0, list(place)
    last = next((i for i, line in enumerate(lines) if line.strip().startswith("[")), len(lines))
    if place and place[0] == "grid":
        headers = [i for i, line in enumerate(lines) if re.match(r"\s*\[\[\s*grid\s*\]\]", line)]
        if len(place) < 2 or not headers:
            return (headers[0] if headers else 0) + 1
        first = headers[min(place[1], len(headers) - 1)]
        last = next((i for i in headers if i > first), len(lines))
        place = place[2:]
    keys = [part for part in place if isinstance(part, str)]
    at = first
    for key in keys:
        pattern = rf"\s*(\[.*\b)?[\"']?{re.escape(key)}[\"']?\s*(=|\])"
        at = next((i for i in range(first, last) if re.match(pattern, lines[i])), at)
    if value is not None:
        at = next((i for i in range(at, last) if f'"{value}"' in lines[i] or f"'{value}'" in lines[i]), at)
    return at + 1
