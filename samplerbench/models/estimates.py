"""Numbers estimated from a model once and kept: posterior variances, learned schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from samplerbench.cache import cached_json
from samplerbench.sampling.meter import Meter

EVALUATIONS = " evaluations"
"""Ends the name under which the cost of a number is kept."""


@dataclass
class CachedEstimates:
    """The estimates of a model, in memory and in the user's cache (`samplerbench.sampling.view.Estimates`).

    Attributes:
        network: where evaluations are counted.
        known: the numbers, and what each of them cost.
        evaluations: network evaluations (rows) that the numbers returned so far took.
    """

    network: nn.Module
    known: dict[str, float]
    evaluations: int = 0
    _read: set[str] = field(default_factory=set)

    def get(self, name: str, compute: Callable[[], float]) -> float:
        """The number of that name: from the cache, or computed, counted and kept."""
        if name not in self.known:
            with Meter(self.network) as meter:
                value = compute()
            self.known |= {name: value, name + EVALUATIONS: meter.network}
        if name not in self._read:
            self._read.add(name)
            self.evaluations += int(self.known.get(name + EVALUATIONS, 0))
        return self.known[name]


@contextmanager
def estimates(network: nn.Module, name: str, identity: dict[str, Any]) -> Iterator[CachedEstimates]:
    """The estimates under a name and an identity; what is added is written to the user's cache at the end.

    Args:
        network: where evaluations are counted.
        name: of the quantity.
        identity: everything that the numbers depend on: the weights, their precision, settings.
    """
    with cached_json(name, identity) as known:
        yield CachedEstimates(network, known)
