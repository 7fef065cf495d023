"""Select and join results in Python: `Results.filter` and `Results.join`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

from samplerbench import registry
from samplerbench.errors import ArgumentTypeError, UserError, argument
from samplerbench.options import Configurable
from samplerbench.results.record import Record

PLUGINS = {"sampler": ("sampler", "generator"), "guidance": ("guidance",), "spacing": ("spacing",)}
"""Fields that hold a spec, with the kinds of their plugins."""
NUMBERS = frozenset({"steps", "nfe", "n", "seed"})
"""Fields that hold a whole number."""
FIXED = ("model", "spacing", "labels", "n", "blocks", "seed")
"""Further fields that tell apart budgets that are too small for one step, which have no protocol."""


def matching(records: Sequence[Record], field: str, value: Any) -> list[Record]:
    """Return the records with a value, or one of several values, in a field.

    Args:
        records: The records.
        field: A name of `PLUGINS` or `NUMBERS`, or "model" or "labels". "nfe" is the budget of a cell, or its counted
            evaluations if it has no budget.
        value: A spec, an instance, a number or a text, or a list of them. "none" stands for no guidance or no spacing.

    Returns:
        The matching records, in their order.

    Raises:
        ArgumentTypeError: If a value has the wrong type for the field.
    """
    single = isinstance(value, str | int | float | Configurable) or not isinstance(value, Iterable)
    wanted = {_wanted(field, one, records) for one in ([value] if single else value)}
    return [record for record in records if _value(field, record) in wanted]


def _wanted(field: str, value: Any, records: Sequence[Record]) -> Any:
    """The form in which records store a value."""
    if field in NUMBERS:
        if isinstance(value, bool) or not isinstance(value, Real):  # also of NumPy
            raise ArgumentTypeError(f"{argument(field)} is of type {type(value).__name__}; give a number.")
        return float(value)
    if isinstance(value, Configurable) and value.kind in PLUGINS.get(field, ()):
        return value.spec
    if field == "labels" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        instance = ", or an instance" if field in PLUGINS else ""
        raise ArgumentTypeError(f"{argument(field)} is of type {type(value).__name__}; give text{instance}.")
    if field not in PLUGINS or value in {record[field] for record in records}:
        return value
    if value in ("none", "own"):
        return None
    for kind in PLUGINS[field]:
        try:
            return registry.parse(kind, value).spec  # ddim:eta=0 is stored as ddim
        except UserError:
            continue
    return value


def _value(field: str, record: Record) -> Any:
    if field != "nfe":
        return record.get(field)
    return record.get("nfe") if record.get("budget") is None else record["budget"]


def union(parts: Iterable[Sequence[Record]]) -> list[Record]:
    """Join lists of records. Of records of the same cell, the first is kept, or the first with a result.

    Args:
        parts: The lists.

    Returns:
        The records, in order of appearance.
    """
    found: dict[Any, Record] = {}
    for record in (record for part in parts for record in part):
        key = cell_of(record)
        if key not in found or ("error" in found[key] and "error" not in record):
            found[key] = record
    return list(found.values())


def cell_of(record: Record) -> tuple[Any, ...]:
    """The identity of a cell: its protocol and budget. A budget that is too small has no protocol."""
    if "protocol" in record:
        return record["protocol"], record.get("budget")
    return tuple(record.get(name) for name in ("sampler", "guidance", "budget", *FIXED))
