"""Names and order of the rows of a table."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

from samplerbench import plugin_file
from samplerbench.options import show_value
from samplerbench.registry import aliases, current_spec, split
from samplerbench.results.record import Record

Parameters = dict[str, Any]


class RowNames:
    """Names of the plugins in one table.

    The name of a plugin is its spec. If two rows of a plugin differ in a parameter, all its rows show the parameter,
    including default values: `ddim` next to `ddim:eta=0.5` is `ddim:eta=0`.

    Args:
        records: the rows of the table. The parameters are read from `protocol_fields`; if a record lacks them, its spec
            is used unchanged.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        found: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for record in records:
            for kind in ("sampler", "guidance", "spacing"):
                if record[kind]:
                    for name, value in _parameters(record, kind).items():
                        found[kind, _head(record[kind])][name].add(show_value(value))
        self._varied = {key: {k for k, v in values.items() if len(v) > 1} for key, values in found.items()}

    def plugin(self, record: Record, kind: str, hide: Collection[str] = ()) -> str:
        """The name of a record's sampler, guidance or spacing; "" for none. hide: parameters to omit."""
        spec = str(record[kind] or "")
        if not spec:
            return ""
        head, tail = _head(spec), split(spec)[2]
        given = [part.strip() for part in tail.split(",") if part.strip()]
        said = {name: value if equals else None for name, equals, value in (part.partition("=") for part in given)}
        known = _parameters(record, kind)
        added = {k for k in self._varied.get((kind, head), ()) if k in known and k not in said}
        if not added and not said.keys() & set(hide):
            return spec
        shown = [k for k in known if (k in said or k in added) and k not in hide]
        words = [f"{k}={said.get(k, show_value(known[k]))}" for k in shown]
        words += [k if v is None else f"{k}={v}" for k, v in said.items() if k not in known and k not in hide]
        return head + (":" + ",".join(words) if words else "")

    def spacing(self, record: Record) -> str:
        """The name of a record's spacing; "own" for a sampler that chooses its noise levels; "–" for a generator."""
        return self.plugin(record, "spacing") or (NO_STEPS if is_generator(record) else "own")

    def row(self, record: Record, hide: Collection[str] = ()) -> str:
        """The name of a row: sampler and guidance, as in `ddim:eta=0.5 + cfg:scale=2`."""
        guidance = self.plugin(record, "guidance", hide)
        return self.plugin(record, "sampler") + (f" + {guidance}" if guidance else "")


METRIC_TITLES = {
    "authenticity": "Authenticity",
    "fid": "FID",
    "fid-inf": "FID∞",
    "gap": "Gap",
    "inception-score": "Inception score",
    "kid": "KID",
    "label-accuracy": "Label accuracy",
    "nearest": "Nearest",
    "nll": "NLL",
    "precision": "Precision",
    "recall": "Recall",
    "vlb": "VLB",
}
"""The names of the built-in metrics in headings, as papers write them."""


def metric_title(name: str) -> str:
    """The name of a metric as a heading: `FID`, `Gap:images=4`. The names of plugins and of files are unchanged."""
    label, colon, parameters = name.partition(":")
    return name if plugin_file.split(name) else f"{METRIC_TITLES.get(label, label)}{colon}{parameters}"


NO_STEPS = "–"
"""The steps and the spacing of a generator, which has neither."""


def is_generator(record: Record) -> bool:
    """Whether a result is that of a generator, such as `real`: it has no noise levels and evaluates no network.

    An adaptive solver also has no number of steps, but it has noise levels.
    """
    if record["steps"] is not None:
        return False
    return record.get("nfe") == 0 or (record.get("protocol_fields") or {}).get("sigmas") == [0.0]


def steps_label(record: Record) -> str:
    """The number of steps as text: `10`; "own" for a sampler that chooses its steps; "–" for a generator."""
    return str(record["steps"]) if record["steps"] is not None else NO_STEPS if is_generator(record) else "own"


def own_head(records: Sequence[Record]) -> str:
    """The heading of the column of results without a number of steps: "–" if all are of generators, else "own"."""
    return NO_STEPS if all(map(is_generator, records)) else "own"


def versions_of(records: Sequence[Record]) -> dict[str, int]:
    """How many of the records each version made: `samplerbench 0.1.0, protocol format 1` by number of records.

    The format is part of what a protocol's hash is computed from, so results of different formats never share a key.
    """
    counts: dict[str, int] = {}
    for record in records:
        version, form = record["versions"].get("samplerbench", "unknown"), record["protocol_fields"].get("format")
        made_by = f"samplerbench {version}, protocol format {'unknown' if form is None else form}"
        counts[made_by] = counts.get(made_by, 0) + 1
    return dict(sorted(counts.items()))


def with_current_names(record: Record) -> Record:
    """A record in which metrics have their current names; the record itself where it has no former name.

    A metric that was renamed (`samplerbench.registry.aliases`) keeps its former name in the files that were written
    before. The seal and the protocol hash are those of the file, so check them first.
    """
    former = aliases("metric")
    if former.keys().isdisjoint(record["metrics"]):
        return record
    metrics = {former.get(name, name): entry for name, entry in record["metrics"].items()}
    fields = dict(record["protocol_fields"])
    if "metrics" in fields:
        fields["metrics"] = [current_spec("metric", spec) for spec in fields["metrics"]]
    if sources := fields.get("metric sources"):
        fields["metric sources"] = {current_spec("metric", spec): source for spec, source in sources.items()}
    return record | {"metrics": metrics, "protocol_fields": fields}


def row_order(record: Record) -> tuple[Any, ...]:
    """The sort key of a row: names, then parameter values. Rows without guidance come first."""
    plugins = [_plugin_order(record, kind) for kind in ("sampler", "guidance", "spacing")]
    return (*plugins, record.get("seed") or 0, record["steps"] or 0, record.get("nfe") or 0)


def natural(value: Any) -> tuple[int, float, list[str | float]]:
    """A sort key that orders numbers by value, also within a text: 2 before 10, `x2` before `x10`."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return 0, value, []
    parts = re.split(r"(\d+(?:\.\d+)?)", show_value(value))
    return 1, 0.0, [float(part) if i % 2 else part for i, part in enumerate(parts)]


def _plugin_order(record: Record, kind: str) -> tuple[Any, ...]:
    spec = record[kind] or ""
    values = [natural(value) for value in _parameters(record, kind).values()]
    return (natural(_head(spec) if spec else ""), values, natural(spec))


def _parameters(record: Record, kind: str) -> Parameters:
    """The single-valued parameters of a plugin, as far as they are recorded."""
    fields = record.get("protocol_fields") or {}
    described = fields.get(kind)
    found = described.get("parameters") if isinstance(described, dict) else None
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if not isinstance(v, dict | list | tuple)}


def _head(spec: str) -> str:
    """A spec without the part after its colon."""
    name, first, _ = split(spec)
    return name if first is None else f"{name}/{first}"
