"""One entry from the results of several blocks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any


def error_of_mean(errors: Sequence[float]) -> float:
    """The standard error of the mean of B independent values with these standard errors: √(Σ s_b²)/B."""
    return math.hypot(*errors) / len(errors)


def mean(values: Sequence[float]) -> float:
    """The mean: of infinities of one sign, that infinity; NaN where a value is NaN or the signs differ."""
    if not all(map(math.isfinite, values)):
        return float(sum(values))
    try:
        return statistics.fmean(values)
    except OverflowError:  # of the sum
        return math.fsum(value / len(values) for value in values)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of two or more values; NaN where a value is not finite."""
    try:
        return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
    except OverflowError:
        return math.inf


COMBINE: dict[str, Callable[[Sequence[float]], float]] = {"standard_error": error_of_mean}
"""How the numbers of a name are combined over blocks; those of any other name are averaged."""


def summarise_blocks(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a metric's results for several blocks say together.

    `value` is the mean, `sd` the standard deviation over blocks and `blocks` the values themselves, where there is more
    than one block. `standard_error` is that of the mean, √(Σ s_b²)/B, since blocks are independent. Other numbers are
    averaged; anything else is kept where all blocks agree, and left out where they do not. A name that a block lacks is
    left out.

    Args:
        results: what `Accumulator.result` returned for each block, at least one.

    Returns:
        the combined result; {} where the metric has no value for one of the blocks.
    """
    if not all(results):
        return {}
    if len(results) == 1:
        return dict(results[0])
    values = [result["value"] for result in results]
    summary: dict[str, Any] = {}
    for name in results[0]:
        found = [result[name] for result in results if name in result]
        if len(found) < len(results):
            continue
        if all(isinstance(x, int | float) and not isinstance(x, bool) for x in found):
            summary[name] = COMBINE.get(name, mean)(found)
        elif all(x == found[0] for x in found):
            summary[name] = found[0]
    return summary | {"sd": deviation(values), "blocks": values}
