"""Candidates from results that exist: rows of a folder that have the protocol of the search."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samplerbench import registry
from samplerbench.results.compare import Difference, paired_difference
from samplerbench.results.record import Record
from samplerbench.tuning.arena import Arena, Entry
from samplerbench.tuning.space import Candidate, Space

MIN_SAMPLERS = 5
"""Results suffice if this many samplers use the budget, unless the samplers are named."""
USED = 0.8
"""A row uses the budget if it takes at least this part of it."""

_ANY = frozenset({"n", "blocks", "seed", "labels", "metrics", "metric sources", "features", "reference"})
"""Fields of a protocol that may differ, or are compared in another way."""
_OF_OTHER_METRICS = frozenset({"feature spaces", "data", "metric data", "real images"})
"""Fields of a protocol that belong to metrics."""

Block = tuple[int, int]
"""Seed, and number of the block."""


@dataclass(frozen=True)
class Stored:
    """A candidate with results that exist.

    Attributes:
        entry: the candidate.
        values: values of the metric by block. Lower is better.
        evaluations: network evaluations per image, counted.
        default: whether it is a default row.
    """

    entry: Entry
    values: Mapping[Block, float]
    evaluations: float
    default: bool

    @property
    def mean(self) -> float:
        """The mean over all blocks."""
        return statistics.fmean(self.values.values())

    @property
    def budget(self) -> int:
        """The budget of its cell."""
        assert self.entry.cell is not None
        return self.entry.cell.budget or 0


def images_per_block(records: Iterable[Record], arena: Arena) -> int | None:
    """The number of images per block that most results of the model and the metric have. None without results."""
    source, spec = str(arena.model.identity["source"]), arena.request.metrics[0].spec
    counts = Counter(
        record["n"]
        for record in records
        if record["model"] == source and spec in record["protocol_fields"].get("metrics", ())
    )
    return counts.most_common(1)[0][0] if counts else None


def stored_rows(records: Iterable[Record], arena: Arena, space: Space, fresh_from: int, most: float) -> list[Stored]:
    """The candidates of results with the protocol of an arena and at least two blocks or seeds.

    Every field of the protocol must be equal, except for the seed, the number of blocks and further metrics. The code
    of the plugins must be unchanged.

    Args:
        records: the results.
        arena: measures the candidates.
        space: the candidates. Only its samplers and guidances are considered.
        fresh_from: results with this seed or a larger one are left out, because they are measurements of winners.
        most: largest number of network evaluations per image.
    """
    base = _fixed(arena)
    names = {registry.split(sampler)[0] for sampler in space.samplers}
    guidances = {None if g is None else registry.split(g)[0] for g in space.guidances}
    values: dict[Entry, dict[Block, float]] = {}
    cost: dict[Entry, float] = {}
    for record in records:
        guidance = record["guidance"]
        known = registry.split(record["sampler"])[0] in names
        known &= (None if guidance is None else registry.split(guidance)[0]) in guidances
        if not known or record["seed"] >= fresh_from or not 0 < record["nfe"] <= most or not _same(record, base):
            continue
        measured = record["metrics"].get(arena.metric)
        numbers = [] if measured is None else measured.get("blocks") or [measured["value"]]
        if not numbers or not all(isinstance(v, int | float) and math.isfinite(v) for v in numbers):
            continue
        candidate = Candidate(record["sampler"], guidance, record["spacing"])
        entry = arena.entry(candidate, record["budget"] or math.ceil(record["nfe"]))
        if entry.cell is None or not _same(record, _comparable(arena.protocol(entry, 0))):
            continue
        known_values = values.setdefault(entry, {})
        known_values |= {(record["seed"], i): arena.sign * float(v) for i, v in enumerate(numbers)}
        cost[entry] = float(record["nfe"])
    budgets = {entry.cell.budget for entry in values if entry.cell is not None}
    usual = {arena.entry(row, budget) for row in space.defaults() for budget in budgets if budget is not None}
    return [Stored(e, found, cost[e], e in usual) for e, found in values.items() if len(found) > 1]


def suffices(rows: Sequence[Stored], space: Space, named: bool, share: Mapping[Entry, float]) -> bool:
    """Whether enough samplers use the budget.

    Args:
        rows: the rows within the budget.
        space: the candidates.
        named: whether the user named the samplers. Then all of them are needed.
        share: the part of the budget that each row takes.
    """
    using = {registry.split(row.entry.candidate.sampler)[0] for row in rows if share.get(row.entry, 0.0) >= USED - 1e-9}
    if named:
        return {registry.split(sampler)[0] for sampler in space.samplers} <= using
    return len(using) >= min(MIN_SAMPLERS, len(space.samplers))


def best_of(rows: Sequence[Stored]) -> Stored | None:
    """The row that no other one with at least two blocks in common is better than.

    It is the best of the rows with the most blocks, unless a row with fewer blocks is significantly better.

    Args:
        rows: the rows.
    """
    if not rows:
        return None
    blocks = max(len(row.values) for row in rows)
    best = min((row for row in rows if len(row.values) == blocks), key=lambda row: row.mean)
    for row in sorted(rows, key=lambda row: row.mean):
        difference = compared(row, best)
        if difference is not None and difference.mean < -difference.margin:
            best = row
    return best


def compared(one: Stored, other: Stored) -> Difference | None:
    """The paired difference of two rows over the blocks that they have in common; None with fewer than two."""
    common = sorted(one.values.keys() & other.values.keys())
    if len(common) < 2:
        return None
    return paired_difference([one.values[b] for b in common], [other.values[b] for b in common])


def _fixed(arena: Arena) -> dict[str, Any]:
    """The fields of the protocol that all candidates share."""
    fields = arena.shared(0)
    return _comparable(fields)


def _comparable(fields: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in fields.items() if name not in _ANY | _OF_OTHER_METRICS}
    return kept | {
        "mode": fields["labels"]["mode"],
        "n": fields["n"],
        "features": fields["features"],
        "reference": fields["reference"],
        "metric": {spec: fields.get("metric sources", {}).get(spec, "") for spec in fields["metrics"]},
    }


def _same(record: Record, expected: Mapping[str, Any]) -> bool:
    """Whether the protocol of a record has the expected fields."""
    fields = record["protocol_fields"]
    try:
        actual = _comparable(fields)
    except (KeyError, TypeError, AttributeError):
        return False
    for name, value in expected.items():
        if name == "metric":
            if any(actual["metric"].get(spec, None) != source for spec, source in value.items()):
                return False
        elif name in ("features", "reference"):
            if value is not None and actual[name] != value:
                return False
        elif actual.get(name) != value:
            return False
    per_cell = {"sampler", "guidance", "spacing", "sigmas", "format", "terminal", "quantisation", "versions"}
    more = actual.keys() - expected.keys() - per_cell
    return not more or "sigmas" not in expected


__all__ = ["MIN_SAMPLERS", "USED", "Stored", "best_of", "compared", "images_per_block", "stored_rows", "suffices"]
