"""Times and what they were measured under: a time stands only beside times of the same conditions.

Batch size, device, processes and threads change no image, so they are not in a cell's protocol; they change its time.
A record therefore has `timings`, one entry for each set of conditions it was timed under. The entry's fields are also
at the top of the record, for the first of them: that is all a record of an older version has.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from samplerbench.results.record import Record

CONDITIONS = ("batch_size", "processes", "device", "device_name", "threads", "graphs")
"""What a time depends on, beside the protocol. device: like `cuda:0`. device_name: the GPU's; "" on a CPU. graphs:
whether batches were replayed as CUDA graphs."""

MEASURED = ("seconds", "decoder_seconds", "metric_seconds", "images_per_second", "finished")
"""What was measured under them."""

CLOSE = 1e-4
"""The relative difference up to which two runs of a cell count as one: what another batch size or device may change."""


def conditions_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions of a timing or a record; a record of an older version does not know all of them."""
    return {name: entry[name] for name in CONDITIONS if name in entry}


def timings_of(record: Record) -> list[dict[str, Any]]:
    """The timings of a record, the first measurement first. Empty where no time is of one set of conditions alone."""
    if "timings" in record:
        return list(record["timings"])
    return [{name: record[name] for name in (*CONDITIONS, *MEASURED) if name in record}]


def timing_under(record: Record, conditions: Mapping[str, Any]) -> dict[str, Any] | None:
    """The timing of a record that was measured under these conditions, or None.

    A condition that one of the two does not know is not compared.
    """
    for entry in timings_of(record):
        if all(entry.get(name, value) == value for name, value in conditions.items()):
            return entry
    return None


def under(record: Record, conditions: Mapping[str, Any]) -> Record:
    """The record with the times measured under these conditions at its top, and null where there are none."""
    found = timing_under(record, conditions)
    if found is not None:
        return record | found
    return record | {name: None for name in MEASURED if name in record and name != "finished"}


def common_conditions(records: Sequence[Record]) -> dict[str, Any]:
    """The conditions under which most of the records were timed, of several such the first; {} for none."""
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
    """`cpu, 2 threads, batches of 256`; what is not known is left out."""
    threads, processes, batch = (conditions.get(name) for name in ("threads", "processes", "batch_size"))
    parts = [
        str(conditions.get("device_name") or conditions.get("device") or ""),
        f"{threads} thread{'s' if threads != 1 else ''}" if threads else "",
        f"{processes} processes" if processes and processes != 1 else "",
        f"batches of {batch}" if batch else "",
        "CUDA graphs" if conditions.get("graphs") else "",
    ]
    return ", ".join(part for part in parts if part)


def seconds_per_image(timing: Mapping[str, Any]) -> float | None:
    """Sampling time per image of a timing or a record; None where it was not measured."""
    rate = timing["images_per_second"]
    return 1 / rate if rate and math.isfinite(1 / rate) else None


def combine(before: Record | None, now: Record) -> Record:
    """A cell's record after it was run again: `now`, with the timings of `before` under other conditions.

    Where the two agree in every metric and in the evaluations to a relative 1e-4 (what another batch size or device may
    change), the values of `before` stay and the timing of `now` is added, in the place of one under the same
    conditions. Where they do not, `now` replaces `before`, timings and all.

    Args:
        before: the sealed record there was, or None.
        now: the new record, of the same protocol, with at most one timing.
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
