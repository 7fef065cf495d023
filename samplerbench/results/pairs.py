"""Pair and compare the cells of two stores, or of two selections of one store."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from samplerbench.errors import UserError, argument
from samplerbench.options import did_you_mean
from samplerbench.results.compare import difference
from samplerbench.results.groups import metric_identities
from samplerbench.results.names import RowNames, row_order

Record = dict[str, Any]

IDENTITY = ("sampler", "guidance", "spacing", "steps", "seed")
FIELDS = (*IDENTITY, "nfe", "budget", "n", "blocks", "model", "labels")
# Fields that a selected field determines: a sampler its default spacing, a budget the steps that fit.
BRINGS = {"sampler": {"spacing"}, "nfe": {"steps"}, "budget": {"steps"}}
# Fields of the protocol in which two compared cells may differ.
COMPARED = frozenset(
    {"sampler", "guidance", "spacing", "sigmas", "classifier", "seed", "versions", "metrics", "metric sources"}
)


@dataclass(frozen=True)
class Row:
    """One metric of one pair of cells.

    Attributes:
        cell: name of the pair.
        metric: name of the metric.
        better: direction of better values, lower or higher.
        a: value of A.
        b: value of B.
        change: B - A.
        margin: half the width of the 95% interval of the change; None without an interval.
        verdict: better, worse, cannot be told apart, no verdict, or not a number.
        how: how the interval was computed.
    """

    cell: str
    metric: str
    better: str
    a: float
    b: float
    change: float
    margin: float | None
    verdict: str
    how: str

    def as_dict(self) -> dict[str, Any]:
        """The row as plain data. NaN and infinity become null."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Paired:
    """The result of a comparison.

    Attributes:
        rows: one row per pair and metric.
        only_a: cells of A without a partner.
        only_b: cells of B without a partner.
        versions: the library versions that differ, or "".
    """

    rows: list[Row]
    only_a: list[str]
    only_b: list[str]
    versions: str


def parse_selection(text: str, name: str) -> dict[str, str]:
    """Parse a selection such as `sampler=ddim:eta=0.5,steps=5`. A spec may contain commas.

    Args:
        text: the selection. name: of the argument that it was given as, "a" or "b", for the error.

    Raises:
        UserError: an unknown field, or a part that is not FIELD=VALUE.
    """
    names = "|".join(FIELDS)
    found: dict[str, str] = {}
    for part in re.split(rf",(?=\s*(?:{names})=)", text) if text.strip() else []:
        key, equals, value = part.strip().partition("=")
        if not equals or key not in FIELDS:
            what = (
                f'there is no field "{key}".{did_you_mean(key, FIELDS)} The' if equals else "it is not FIELD=VALUE; the"
            )
            raise UserError(f"{argument(name, text)}: {what} fields are {', '.join(FIELDS)}.")
        found[key] = value.strip()
    return found


def select(records: Sequence[Record], text: str, name: str) -> list[Record]:
    """The records that match a selection; all for an empty one. `none` matches null.

    Raises:
        UserError: an invalid selection, or no matching record.
    """
    wanted = parse_selection(text, name)
    found = [r for r in records if all(_matches(r.get(key), value) for key, value in wanted.items())]
    if not found:
        alone = (k for k, v in wanted.items() if not any(_matches(r.get(k), v) for r in records))
        field = next(alone, "sampler")
        present = ", ".join(dict.fromkeys("none" if r.get(field) is None else str(r[field]) for r in records))
        raise UserError(f"{argument(name, text)}: no result matches; the results have {field}={present}.")
    return found


def _matches(value: Any, wanted: str) -> bool:
    if isinstance(value, int | float):
        try:
            return float(wanted) == value
        except ValueError:
            return False
    return wanted in ("none", "own") if value is None else bool(value == wanted)


def pair(ones: Sequence[Record], twos: Sequence[Record], a: str, b: str, metrics: Sequence[str] = ()) -> Paired:
    """Pair cells that agree in IDENTITY, except for the selected fields, and compare each pair.

    Args:
        ones: records of A.
        twos: records of B.
        a: selection of A.
        b: selection of B.
        metrics: names of the metrics; all if empty.

    Raises:
        UserError: no pairs, a cell with two partners, or protocols of a pair that differ in other fields.
    """
    named = {*parse_selection(a, "a"), *parse_selection(b, "b")}
    free = named.union(*(BRINGS.get(name, set()) for name in named))
    keys = [name for name in IDENTITY if name not in free]
    ones, twos = sorted(ones, key=row_order), sorted(twos, key=row_order)
    names = RowNames([*ones, *twos])
    left, right = _keyed(ones, keys, "a", names), _keyed(twos, keys, "b", names)
    if len(left) == len(right) == 1 and named:
        right = dict(zip(left, right.values(), strict=True))
    common = [key for key in left if key in right]
    if not common:
        raise UserError(
            f"no cell of A has a partner in B with the same {', '.join(keys)}; name what differs with "
            f"{argument('a')} and {argument('b')}."
        )
    rows = [row for key in common for row in _compare(left[key], right[key], metrics, names)]
    if not rows:
        if metrics:
            names_of = dict.fromkeys(m for r in (*left.values(), *right.values()) for m in r["metrics"])
            raise UserError(f"{argument('metric', metrics[0])}: the results have {', '.join(names_of)}.")
        raise UserError("the paired cells have no metric in common; run them with the same metrics.")
    return Paired(
        rows,
        [title(r, names) for key, r in left.items() if key not in right],
        [title(r, names) for key, r in right.items() if key not in left],
        _versions(left[common[0]], right[common[0]]),
    )


def _keyed(records: Sequence[Record], keys: Sequence[str], side: str, names: RowNames) -> dict[tuple[Any, ...], Record]:
    found: dict[tuple[Any, ...], Record] = {}
    for r in records:
        key = tuple(r[name] for name in keys)
        if key in found:
            other = found[key]
            apart = [n for n in FIELDS if r.get(n) != other.get(n)] or _differing(r, other, frozenset())
            todo = "keep results of different protocols in different folders"
            if apart[0] in FIELDS:
                todo = f"narrow the selection, as in {argument(side, f'{apart[0]}={r[apart[0]]}')}"
            raise UserError(
                f"{argument(side)}: {title(r, names)} and {title(other, names)} both match, and differ in "
                f"{' and '.join(apart)}; {todo}."
            )
        found[key] = r
    return found


def _compare(a: Record, b: Record, metrics: Sequence[str], names: RowNames) -> list[Row]:
    one, two = title(a, names), title(b, names)
    fields = _differing(a, b, COMPARED)
    common = [m for m in a["metrics"] if m in b["metrics"] and (not metrics or m in metrics)]
    specs = [metric_identities(r) for r in (a, b)]
    fields += [f"metric {m}" for m in common if specs[0].get(m) != specs[1].get(m)]
    if fields:
        raise UserError(
            f"{one} and {two} were measured under different protocols: they differ in "
            f"{', '.join(fields)}; run one of them again with the protocol of the other."
        )
    cell = one if one == two else f"{one} → {two}"
    return [_row(cell, m, a, b) for m in common]


def _row(cell: str, metric: str, a: Record, b: Record) -> Row:
    one, two = a["metrics"][metric], b["metrics"][metric]
    values = one["value"], two["value"]
    change = values[1] - values[0]
    if not math.isfinite(change):
        verdict = "worse" if math.isfinite(values[0]) else "not a number"
        return Row(cell, metric, one["better"], *values, change, None, verdict, "a value is not a number")
    found = difference(b, a, metric)
    if found is None:
        return Row(cell, metric, one["better"], *values, change, None, "no verdict", "one block: no interval")
    how = "paired over blocks" if a["seed"] == b["seed"] else "other seeds: Welch, unpaired"
    better = (found.mean < 0) == (one["better"] == "lower")
    verdict = "cannot be told apart" if found.tied else "better" if better else "worse"
    return Row(cell, metric, one["better"], *values, change, found.margin, verdict, how)


def _differing(a: Record, b: Record, allowed: frozenset[str]) -> list[str]:
    """The dotted names of the protocol fields in which two records differ, except the allowed ones."""
    one, two = a["protocol_fields"], b["protocol_fields"]
    found = []
    for name in dict.fromkeys([*one, *two]):
        x, y = one.get(name), two.get(name)
        if name in allowed or x == y:
            continue
        if isinstance(x, dict) and isinstance(y, dict):
            found += [f"{name}.{k}" for k in dict.fromkeys([*x, *y]) if x.get(k) != y.get(k)]
        else:
            found.append(name)
    return [name for name in found if name != "labels.counts" or "n" not in found]


def _versions(a: Record, b: Record) -> str:
    x, y = a["versions"], b["versions"]
    return ", ".join(f"{k} {x.get(k)} and {y.get(k)}" for k in dict.fromkeys([*x, *y]) if x.get(k) != y.get(k))


def title(record: Record, names: RowNames) -> str:
    """The title of a cell: `ddim:eta=0.5 + cfg, 50 steps, seed 0`."""
    steps = "its own steps" if record["steps"] is None else f"{record['steps']} steps"
    return f"{names.row(record)}, {steps}, seed {record['seed']}"
