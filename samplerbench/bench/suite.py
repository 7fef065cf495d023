"""Suites: TOML files that list cells as grids."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from samplerbench import registry
from samplerbench.bench.request import Grid, Published, Request
from samplerbench.errors import UserError
from samplerbench.limits import MAX_BATCH, MAX_CELLS, MAX_CLASSES, MAX_IMAGES, MAX_INTEGER, MAX_SEED, MAX_STEPS
from samplerbench.models.files import LoadOptions
from samplerbench.options import did_you_mean, show_value
from samplerbench.untrusted import parse_toml, read_text, shorten, user_path

Count = Annotated[int, Field(ge=1, le=MAX_IMAGES)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Number = Annotated[float, Field(allow_inf_nan=True)] | Annotated[int, Field(ge=-(2**53), le=2**53)]
Value = Annotated[float, Field(allow_inf_nan=False)] | Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)]


class SuitePublished(BaseModel):
    """What a paper reports for a `[[grid]]`: its source, and per metric a row for each sampler, a column for each step.

    The rows are in the order of samplers × parameters × guidances; a value that the paper does not give is nan.
    """

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, list[list[Number]]]

    source: Annotated[str, Field(min_length=1)]


class SuiteGrid(BaseModel):
    """One `[[grid]]`: samplers × parameters × guidances × spacings × steps (or nfe)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    samplers: Annotated[list[str], Field(min_length=1)]
    parameters: dict[str, list[Value | bool | str]] = {}
    steps: list[Steps] = []
    nfe: list[Steps] = []
    guidances: list[str] = ["none"]
    spacings: list[str] = ["default"]
    published: SuitePublished | None = None


class Suite(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = ""
    model: str = "digits"
    labels: str | Annotated[int, Field(ge=0, le=MAX_CLASSES)] | None = None
    n: Count | None = None
    blocks: Count = 1
    seeds: Annotated[list[Annotated[int, Field(ge=0, le=MAX_SEED)]], Field(min_length=1)] = [0]
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH)] | Literal["auto"] = 256
    dtype: str = "fp32"
    metrics: Annotated[list[str], Field(min_length=1)] = ["fid"]
    features: str | None = None
    features_weights: str | None = None
    data: str | None = None
    revision: str | None = None
    variant: str | None = None
    prompts: str | None = None
    negative_prompt: str | None = None
    compile: bool = False
    graphs: bool = False
    grid: Annotated[list[SuiteGrid], Field(min_length=1)]


def load_suite(file: Path) -> Request:
    """The request of a suite file.

    Raises:
        UserError: `FILE:LINE: what is wrong`, for anything from a typing error to a sampler that does not exist.
    """
    try:
        text = read_text(user_path(file))
    except (OSError, ValueError) as error:
        raise UserError(f"the suite {file} cannot be read: {error}") from None
    try:
        data = parse_toml(text)
    except ValueError as error:
        line = re.search(r"line (\d+)", str(error))
        raise UserError(f"{file}:{line.group(1) if line else 1}: {error}") from None
    try:
        suite = Suite.model_validate(data)
    except ValidationError as error:
        first, place = _first(error.errors())
        raise UserError(f"{file}:{find_line(text, place)}: {_explain(first, place)}") from None
    _check_specs(file, text, suite)
    return Request(
        grids=[_grid(file, text, i, grid) for i, grid in enumerate(suite.grid)],
        model=suite.model,
        labels=None if suite.labels is None else str(suite.labels),
        n=suite.n,
        blocks=suite.blocks,
        seeds=suite.seeds,
        batch_size=suite.batch_size,
        dtype=suite.dtype,
        metrics=suite.metrics,
        features=suite.features,
        features_weights=suite.features_weights,
        data=suite.data,
        load=LoadOptions(
            suite.revision,
            suite.variant,
            suite.prompts,
            suite.negative_prompt,
            compile=suite.compile,
            graphs=suite.graphs,
        ),
    )


_TYPES = ("str", "int", "float", "bool", "constrained-int", "constrained-float")
"""What pydantic calls the types of which a value could have been one."""


def _first(errors: list[Any]) -> tuple[Any, list[Any]]:
    """The first error, and its place in the file; of a value that could be of several types, that of its own type."""
    first = errors[0]
    same = [e for e in errors if e["loc"][:-1] == first["loc"][:-1] and e["loc"][-1:] in [(t,) for t in _TYPES]]
    if first in same:
        first = next((e for e in same if not e["type"].endswith("_type")), first)
    place = [part for part in first["loc"] if not (isinstance(part, str) and "[" in part)]
    return first, place[:-1] if first in same else place


def _explain(error: Any, place: list[Any]) -> str:
    name = ".".join(str(part) for part in place if not isinstance(part, int))
    if error["type"] == "extra_forbidden":
        known = SuiteGrid.model_fields if place[0] == "grid" else Suite.model_fields
        key = shorten(str(place[-1]))
        return f'there is no key "{key}" here.{did_you_mean(key, known)} Known: {", ".join(known)}.'
    if error["type"] == "missing":
        return f"{name} is missing" + ("; a suite has at least one [[grid]]." if name == "grid" else ".")
    return f"{name}: {error['msg'][0].lower()}{error['msg'][1:]}."


def _check_specs(file: Path, text: str, suite: Suite) -> None:
    """Every spec in the file, parsed, so that an error names its line."""
    named: list[tuple[str, str, list[Any]]] = [("metric", m, ["metrics", i]) for i, m in enumerate(suite.metrics)]
    for g, grid in enumerate(suite.grid):
        named += [("sampler", s, ["grid", g, "samplers", i]) for i, s in enumerate(grid.samplers)]
        named += [("guidance", s, ["grid", g, "guidances", i]) for i, s in enumerate(grid.guidances) if s != "none"]
        named += [("spacing", s, ["grid", g, "spacings", i]) for i, s in enumerate(grid.spacings) if s != "default"]
        if bool(grid.steps) == bool(grid.nfe):
            what = "both steps and nfe" if grid.steps else "neither steps nor nfe"
            raise UserError(f"{file}:{find_line(text, ['grid', g])}: this grid has {what}; give one of them.")
    for kind, spec, place in named:
        try:
            registry.parse(kind, spec)
        except UserError as error:
            raise UserError(f"{file}:{find_line(text, place, spec)}: {error}") from None


def _grid(file: Path, text: str, number: int, grid: SuiteGrid) -> Grid:
    sizes = [len(grid.samplers), *map(len, grid.parameters.values()), len(grid.guidances), len(grid.spacings)]
    if math.prod([*sizes, len(grid.steps) + len(grid.nfe)]) > MAX_CELLS:
        line = find_line(text, ["grid", number])
        raise UserError(f"{file}:{line}: this grid has more than {MAX_CELLS:,} cells; leave some out.")
    samplers = []
    for spec in grid.samplers:
        for values in itertools.product(*grid.parameters.values()):
            extra = ",".join(f"{k}={show_value(v)}" for k, v in zip(grid.parameters, values, strict=True))
            full = registry.extend(spec, extra)
            try:
                registry.parse("sampler", full)
            except UserError as error:
                line = find_line(text, ["grid", number, "parameters"])
                raise UserError(f"{file}:{line}: {error}") from None
            samplers.append(full)
    spacings = [None if s == "default" else s for s in grid.spacings]
    rows = [(sampler, guidance) for sampler in samplers for guidance in grid.guidances]
    return Grid(samplers, grid.steps, grid.nfe, grid.guidances, spacings, _published(file, text, number, grid, rows))


def _published(file: Path, text: str, number: int, grid: SuiteGrid, rows: list[tuple[str, str]]) -> list[Published]:
    """The published values of a grid, one per cell and metric."""
    if grid.published is None:
        return []
    columns = grid.steps or grid.nfe
    found = []
    for metric, values in grid.published.__pydantic_extra__.items():
        line = find_line(text, ["grid", number, "published", metric])
        metric = registry.current_name("metric", metric)
        if metric not in {e.name for e in registry.entries("metric")}:
            raise UserError(f'{file}:{line}: there is no metric "{metric}" to compare with.')
        if len(grid.spacings) != 1:
            raise UserError(f"{file}:{line}: published values belong to one spacing; this grid has several.")
        if len(values) != len(rows) or any(len(row) != len(columns) for row in values):
            raise UserError(
                f"{file}:{line}: {metric} has {len(values)} rows of {sorted({len(row) for row in values})} values; "
                f"this grid has {len(rows)} rows (samplers × parameters × guidances) of {len(columns)}."
            )
        for (sampler, guidance), row in zip(rows, values, strict=True):
            for column, value in zip(columns, row, strict=True):
                if value == value:
                    found.append(Published(sampler, guidance, column, metric, float(value), grid.published.source))
    return found


def find_line(text: str, place: list[Any], value: str | None = None) -> int:
    """The line, from 1, of a place in a suite file: ["grid", 1, "samplers", 0] is in the second [[grid]].

    value: for an item of a list, its text, which tells its own line where the list has several.
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
