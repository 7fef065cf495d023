"""Timings and their conditions. Only times that were measured under the same conditions are compared.

Batch size, device, processes and threads do not change the images, so they are not part of the protocol. They do change
the time. A record therefore has `timings`, one entry for each set of conditions. The fields of the first entry are also
at the top level of the record; records of older versions have only those.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from samplerbench.results.record import Record

CONDITIONS = ("batch_size", "processes", "device", "device_name", "threads", "graphs", "memory")
"""The conditions of a timing, in addition to the protocol.

device is the torch device, such as `cuda:0`. device_name is the name of the GPU, "" on a CPU. graphs tells whether
batches were run as CUDA graphs. memory names the ways in which memory was saved, "" for none.
"""

MEASURED = ("seconds", "decoder_seconds", "metric_seconds", "images_per_second", "finished")
"""The measured fields of a timing."""

CLOSE = 1e-4
"""Relative tolerance for two runs of one cell, for rounding with another batch size or device."""


def conditions_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions of a timing or a record. Records of older versions lack some of them."""
    return {name: entry[name] for name in CONDITIONS if name in entry}


def timings_of(record: Record) -> list[dict[str, Any]]:
    """The timings of a record, in the order of measurement. Empty if no timing is valid."""
    if "timings" in record:
        return list(record["timings"])
    return [{name: record[name] for name in (*CONDITIONS, *MEASURED) if name in record}]


def timing_under(record: Record, conditions: Mapping[str, Any]) -> dict[str, Any] | None:
    """The timing of a record under these conditions, or None. Unknown conditions are not compared."""
    for entry in timings_of(record):
        if all(entry.get(name, value) == value for name, value in conditions.items()):
            return entry
    return None


def under(record: Record, conditions: Mapping[str, Any]) -> Record:
    """The record with the timing under these conditions at its top level, or null if there is none."""
    found = timing_under(record, conditions)
    if found is not None:
        return record | found
    return record | {name: None for name in MEASURED if name in record and name != "finished"}


def common_conditions(records: Sequence[Record]) -> dict[str, Any]:
    """The most frequent conditions of the records, or the first of several; {} if there are none."""
    found: Counter[str] = Counter()
    for record in records:
        found.update({json.dumps(conditions_of(entry), sort_keys=True) for entry in timings_of(record)})
    if not found:
        return {}
    most = max(found.values())
    for record in records:
        for entry in timings_of(record):
            if found[json.dumps(conditions_of(entry), sort_keys=True)] == most:
                return conditions_of(entry)
    return {}


def describe_conditions(conditions: Mapping[str, Any]) -> str:
    """The conditions as text: `cpu, 2 threads, batches of 256`. Unknown conditions are omitted."""
    threads, processes, batch = (conditions.get(name) for name in ("threads", "processes", "batch_size"))
    parts = [
        str(conditions.get("device_name") or conditions.get("device") or ""),
        f"{threads} thread{'s' if threads != 1 else ''}" if threads else "",
        f"{processes} processes" if processes and processes != 1 else "",
        f"batches of {batch}" if batch else "",
        "CUDA graphs" if conditions.get("graphs") else "",
        str(conditions.get("memory") or ""),
    ]
    return ", ".join(part for part in parts if part)


def seconds_per_image(timing: Mapping[str, Any]) -> float | None:
    """Sampling time per image of a timing or a record, in seconds; None if it was not measured."""
    rate = timing["images_per_second"]
    return 1 / rate if rate and math.isfinite(1 / rate) else None


def combine(before: Record | None, now: Record) -> Record:
    """The record of a cell after it was run again.

    If the metrics and the evaluations of the two records agree to a relative 1e-4, the values of `before` are kept, and
    the timing of `now` is added or replaces the one under the same conditions. Otherwise `now` replaces `before`,
    including its timings.

    Args:
        before: the existing sealed record, or None.
        now: the new record with the same protocol, with at most one timing.
    """
    if before is None or not _agree(before, now):
        return now
    new = timings_of(now)
    kept = timings_of(before)
    for entry in new:
        same = [i for i, old in enumerate(kept) if timing_under({"timings": [old]}, conditions_of(entry)) is not None]
        if same:
            kept[same[0]] = entry
        else:
            kept.append(entry)
    first = kept[0] if kept else {}
    return {**{k: v for k, v in before.items() if k != "seal"}, **first, "timings": kept}


def _agree(a: Record, b: Record) -> bool:
    if a["metrics"].keys() != b["metrics"].keys() or not _close(a["nfe"], b["nfe"]):
        return False
    return all(_close(entry["value"], b["metrics"][name]["value"]) for name, entry in a["metrics"].items())


def _close(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b)) or abs(a - b) <= CLOSE * max(abs(a), abs(b))
