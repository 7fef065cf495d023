"""Combine the results of several blocks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any


def error_of_mean(errors: Sequence[float]) -> float:
    """The standard error of the mean of B independent values with standard errors s_b: √(Σ s_b²)/B."""
    return math.hypot(*errors) / len(errors)


def mean(values: Sequence[float]) -> float:
    """The mean. Infinities of one sign give that infinity; NaN, or infinities of both signs, give NaN."""
    if not all(map(math.isfinite, values)):
        return float(sum(values))
    try:
        return statistics.fmean(values)
    except OverflowError:  # the sum overflows
        return math.fsum(value / len(values) for value in values)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of two or more values; NaN if a value is not finite."""
    try:
        return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
    except OverflowError:
        return math.inf


COMBINE: dict[str, Callable[[Sequence[float]], float]] = {"standard_error": error_of_mean}
"""How to combine the values of an entry over blocks. All other entries are averaged."""


def summarise_blocks(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Combine the results of a metric for several blocks.

    `value` is the mean over blocks. With more than one block, `sd` is the standard deviation over blocks and `blocks`
    are the values. `standard_error` is the error of the mean, √(Σ s_b²)/B, because blocks are independent. Other
    numbers are averaged; a whole number that is the same in all blocks stays one. Other data is kept if it is equal in
    all blocks. Entries that a block lacks are omitted.

    Args:
        results: the value of `Accumulator.result` for each block, at least one.

    Returns:
        The combined result; {} if the metric has no value for one of the blocks.
    """
    if not all(results):
        return {}
    if len(results) == 1:
        return dict(results[0])
    values = [result["value"] for result in results]
    summary: dict[str, Any] = {}
    for name in results[0]:
        entries = [result[name] for result in results if name in result]
        if len(entries) < len(results):
            continue
        if name != "value" and all(type(x) is int and x == entries[0] for x in entries):
            summary[name] = entries[0]
        elif all(isinstance(x, int | float) and not isinstance(x, bool) for x in entries):
            summary[name] = COMBINE.get(name, mean)(entries)
        elif all(x == entries[0] for x in entries):
            summary[name] = entries[0]
    return summary | {"sd": deviation(values), "blocks": values}
