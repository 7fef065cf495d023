"""Groups of comparable results, and the names of their rows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from samplerbench.registry import split
from samplerbench.results.names import RowNames, row_order
from samplerbench.results.record import Record
from samplerbench.results.timings import common_conditions, describe_conditions, seconds_per_image, timing_under
from samplerbench.text import printable

# Fields in which the rows of a table may differ. All other fields of the protocol must be equal.
PER_ROW = frozenset(
    {"sampler", "guidance", "spacing", "sigmas", "classifier", "seed", "metrics", "metric sources", "real images"}
)


@dataclass(frozen=True)
class Group:
    """Comparable results.

    Attributes:
        title: the fields in which the group differs from other groups; "" for a single group.
        protocol: the fields that all results share.
        records: the results.
        labels: protocol hash → name of the row. Results in one row differ only in their steps.
    """

    title: str
    protocol: dict[str, Any]
    records: list[Record]
    labels: dict[str, str]

    def label(self, record: Record) -> str:
        """The row of a result."""
        return self.labels[record["protocol"]]

    def rows(self) -> list[str]:
        """The names of all rows, in order of appearance."""
        return list(dict.fromkeys(self.label(r) for r in self.records))

    def metrics(self) -> list[str]:
        """The metrics of all results."""
        return list(dict.fromkeys(m for r in self.records for m in r["metrics"]))

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """The most frequent timing conditions. Only times under these conditions are compared."""
        return common_conditions(self.records)

    def seconds_per_image(self, record: Record) -> float | None:
        """Sampling time per image under the group's conditions, in seconds; None if it was not measured."""
        timing = timing_under(record, self.conditions)
        return None if timing is None else seconds_per_image(timing)

    def describe_times(self) -> str:
        """The timing conditions, and the number of results without a time under them; "" if they are unknown."""
        conditions = describe_conditions(self.conditions)
        without = sum(timing_under(r, self.conditions) is None for r in self.records)
        if not without:
            return conditions
        more = f"{without} of {len(self.records)} results were timed under other conditions and have no time here"
        return f"{conditions}; {more}" if conditions else more

    def describe(self) -> str:
        """The protocol in one line, for a caption."""
        r = self.records[0]
        p = self.protocol
        times = f"{r['blocks']} blocks of {r['n']} images" if r["blocks"] > 1 else f"{r['n']} images"
        return printable(f"{r['model']}, {times}, labels {r['labels']}, {p.get('dtype', 'dtype unknown')}")


def shared_protocol(record: Record) -> dict[str, Any]:
    """The part of a protocol that all rows of a table share."""
    return {k: v for k, v in record["protocol_fields"].items() if k not in PER_ROW}


def group(records: Sequence[Record], merge: bool = True) -> list[Group]:
    """Group results by protocol, the largest group first. Titles name the fields in which the groups differ.

    Results with different parameters of the same metric are in different groups.

    Args:
        records: the results.
        merge: merge results that differ only in their metrics.
    """
    found: dict[str, list[Record]] = defaultdict(list)
    records = merge_metrics(records) if merge else records
    for record in sorted(records, key=row_order):
        found[json.dumps(_key(record, records), sort_keys=True)].append(record)
    members = sorted(found.values(), key=lambda group: -len(group))
    return [
        Group(title, shared_protocol(rows[0]), rows, _labels(rows))
        for title, rows in zip(_titles(members, records), members, strict=True)
    ]


def _titles(members: Sequence[Sequence[Record]], records: Sequence[Record]) -> list[str]:
    """The fields in which each group differs from the others; "" for a single group."""
    keys = [_key(group[0], records) for group in members]
    fields = differing(keys)
    return [", ".join(f"{name} = {_short(dict(flatten(key)).get(name))}" for name in fields) for key in keys]


def comparable(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Split the records of one or several runs into those that one table may hold, in their order.

    Records that differ only in their metrics are merged. A budget that is too small for a sampler belongs to every
    table with this budget.

    Args:
        records: the records, also those of failed cells and of budgets that are too small.

    Returns:
        For each table the fields in which it differs from the others, as in `Group.title`, and its records.
    """
    measured = [r for r in records if "protocol" in r]
    budgets = dict.fromkeys(r.get("budget") for r in measured)
    # The same result under two budgets is in two columns, so only records of one budget are merged.
    merged = [r for b in budgets for r in merge_metrics([r for r in measured if r.get("budget") == b])]
    place = {(r["protocol"], r.get("budget")): i for i, r in reversed(list(enumerate(measured)))}
    found: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(merged, key=lambda r: place[r["protocol"], r.get("budget")]):
        found[json.dumps(_key(record, merged), sort_keys=True)].append(record)
    members = list(found.values())
    unmet = [r for r in records if "protocol" not in r]
    if not members:
        return [("", unmet)] if unmet else []
    titles = _titles(members, merged)
    columns = [{r.get("budget") for r in group} for group in members]
    return [
        (title, group + [r for r in unmet if len(members) == 1 or r.get("budget") in budgets])
        for title, group, budgets in zip(titles, members, columns, strict=True)
    ]


def merge_metrics(records: Sequence[Record]) -> list[Record]:
    """Merge results that differ only in their metrics. The costs are those of the first."""
    found: dict[str, Record] = {}
    for record in records:
        fields = {k: v for k, v in record["protocol_fields"].items() if k not in ("metrics", "metric sources")}
        specs = metric_identities(record)
        for key, first in found.items():
            if key.startswith(json.dumps(fields, sort_keys=True)) and not any(
                metric_identities(first).get(name, spec) != spec for name, spec in specs.items()
            ):
                before, more = first["protocol_fields"], record["protocol_fields"]
                both = before | {"metrics": sorted({*before.get("metrics", []), *more.get("metrics", [])})}
                if sources := before.get("metric sources", {}) | more.get("metric sources", {}):
                    both["metric sources"] = sources
                merged = {"metrics": {**record["metrics"], **first["metrics"]}, "protocol_fields": both}
                if reasons := record.get("inapplicable", {}) | first.get("inapplicable", {}):
                    merged["inapplicable"] = reasons
                found[key] = first | merged
                break
        else:
            found[json.dumps(fields, sort_keys=True) + record["protocol"]] = record
    return list(found.values())


def differing(protocols: Sequence[dict[str, Any]]) -> list[str]:
    """The dotted names of the fields in which protocols differ. Per-class counts are omitted if n differs."""
    leaves = [dict(flatten(p)) for p in protocols]
    names = list(dict.fromkeys(name for leaf in leaves for name in leaf))
    found = [name for name in names if len({json.dumps(leaf.get(name)) for leaf in leaves}) > 1]
    return [name for name in found if name != "labels.counts" or "n" not in found]


def flatten(value: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries, with dotted names."""
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from flatten(inner, f"{before}{name}.")
        else:
            yield f"{before}{name}", inner


def metric_specs(record: Record) -> dict[str, str]:
    """The metrics of a result: name → spec."""
    return {split(spec)[0]: spec for spec in record["protocol_fields"].get("metrics", [])}


def metric_identities(record: Record) -> dict[str, str]:
    """The metrics of a result: name → spec and source hash, which must be equal within a column."""
    sources = record["protocol_fields"].get("metric sources", {})
    return {name: f"{spec} {sources.get(spec, '')}".rstrip() for name, spec in metric_specs(record).items()}


def _key(record: Record, others: Sequence[Record]) -> dict[str, Any]:
    """The shared protocol, with the specs of metrics that occur with several parameters."""
    ambiguous = {
        name: spec
        for name, spec in metric_identities(record).items()
        if any(metric_identities(other).get(name, spec) != spec for other in others)
    }
    return shared_protocol(record) | ({"metrics": ambiguous} if ambiguous else {})


def _labels(records: Sequence[Record]) -> dict[str, str]:
    """Names of rows. Distinguishing fields are added only where needed."""
    names = RowNames(records)
    labels = {r["protocol"]: printable(names.row(r)) for r in records}

    def spacing(record: Record) -> str:
        return f"on {names.plugin(record, 'spacing') or 'its own grid'}"

    for addition in (spacing, _seed, _source, _protocol):
        rows = defaultdict(list)
        for r in records:
            rows[labels[r["protocol"]]].append(r)
        for members in rows.values():
            if len({addition(r) for r in members}) > 1 and not _is_row(members, addition):
                for r in members:
                    labels[r["protocol"]] += f" {printable(addition(r))}"
    return labels


def _is_row(members: Sequence[Record], addition: Callable[[Record], str]) -> bool:
    """Whether members form one row: at most one result per number of steps, and only the hash could be added."""
    steps = [r["steps"] for r in members]
    return addition is _protocol and len(set(steps)) == len(steps)


def _seed(record: Record) -> str:
    return f"seed {record['seed']}"


def _source(record: Record) -> str:
    fields = record["protocol_fields"]
    described = [fields.get("sampler"), fields.get("guidance"), fields.get("classifier")]
    return "source " + "/".join(
        str(d.get("source", ""))[:6] if isinstance(d, dict) else str(d)[:6] for d in described if d
    )


def _protocol(record: Record) -> str:
    return f"[{record['protocol'][:6]}]"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return printable(text if len(text) <= 24 else text[:12] + "…")
