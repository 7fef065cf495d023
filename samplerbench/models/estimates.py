"""Cached estimates of a model, such as posterior variances and learned schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from samplerbench.cache import cached_json
from samplerbench.sampling.meter import Meter

EVALUATIONS = " evaluations"
"""Suffix of the cache key for the cost of a value."""


@dataclass
class CachedEstimates:
    """Estimates of a model, in memory and in the cache (`samplerbench.sampling.view.Estimates`).

    Attributes:
        network: module whose evaluations are counted.
        known: values and their costs.
        evaluations: network evaluations (rows) to estimate the values returned so far.
    """

    network: nn.Module
    known: dict[str, float]
    evaluations: int = 0
    _read: set[str] = field(default_factory=set)

    def get(self, name: str, compute: Callable[[], float]) -> float:
        """Return a value from the cache, or compute it, count its evaluations and cache it.

        Args:
            name: name of the value.
            compute: function that computes the value.
        """
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
    """Open the cached estimates of a quantity. New values are saved when the context exits.

    Args:
        network: module whose evaluations are counted.
        name: name of the quantity.
        identity: everything that the values depend on: the weights, their precision and settings.
    """
    with cached_json(name, identity) as known:
        yield CachedEstimates(network, known)
