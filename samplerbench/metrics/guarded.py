"""A wrapper of a metric plugin's accumulator that checks every call: exceptions, return values and side effects."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samplerbench.boundary import plugin_call, shown
from samplerbench.errors import RunError
from samplerbench.limits import MAX_RECORDED, MAX_RECORDED_TEXT
from samplerbench.metrics.metric import Accumulator, Batch, Context, Metric
from samplerbench.sampling.cost import Cost
from samplerbench.text import is_unicode
from samplerbench.untrusted import shorten

RESERVED = ("sd", "blocks", "features", "reference", "better", "of", "data", "unit")
"""Names in a record that the result of a metric must not use."""

COUNTS = "/counts"
"""Name of the counted evaluations in the state of a metric of the data."""

MOST_NAMES = 100
"""The maximum number of names in a result."""


class Guarded(Accumulator):
    """An accumulator of a metric plugin, with every call checked.

    Args:
        metric: the plugin.
        context: the context passed to `Metric.start`.

    Attributes:
        cost: network evaluations of a metric of the data, as counted by `count`.
        images: number of images that they are of.

    Raises:
        RunError: from any method, if the plugin raises an exception or violates the interface of its base class.
    """

    def __init__(self, metric: Metric, context: Context) -> None:
        self.metric = metric
        self.cost, self.images = Cost(), 0
        if metric.better not in ("lower", "higher"):
            raise RunError(
                f'metric {metric.label()}: better is {shown(metric.better)}; it must be "lower" or "higher".'
            )
        with self._call("start"):
            found = metric.start(context)
        if not isinstance(found, Accumulator):
            raise RunError(f"metric {metric.label()}: start returned {shown(found)}; it must be an Accumulator.")
        self.inner = found

    def update(self, batch: Batch) -> None:
        tensors = [t for t in (batch.images, batch.features, batch.labels, batch.index, batch.states) if t is not None]
        before = [_version(t) for t in tensors]
        with self._call("update"):
            self.inner.update(batch)
        if [_version(t) for t in tensors] != before:
            raise RunError(
                f"metric {self.metric.label()} modified its batch, which other metrics read too; it must work on a "
                "copy."
            )

    def count(self, cost: Cost, images: int) -> None:
        """Add the evaluations that the metric took for some images. They are part of the state and of the result."""
        self.cost, self.images = self.cost + cost, self.images + images

    def state(self) -> dict[str, Tensor]:
        with self._call("state"):
            found = self.inner.state()
        who = f"metric {self.metric.label()}: state returned"
        if not isinstance(found, Mapping):
            raise RunError(f"{who} {shown(found)}; it must be a dictionary of tensors.")
        seen: set[int] = set()
        state: dict[str, Tensor] = {}
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
                raise RunError(f"{who} {shown(name)}: {shown(value)}; it must be a dictionary of dense tensors.")
            # A safetensors file cannot contain tensors that share memory.
            place = value.untyped_storage().data_ptr()
            state[name] = value.detach().clone() if place in seen else value.detach()
            seen.add(place)
        if self.images:
            state[COUNTS] = torch.tensor([self.images, *astuple(self.cost)])
        return state

    def merge(self, state: dict[str, Tensor]) -> None:
        if COUNTS in state:
            images, *rows = state[COUNTS].tolist()
            self.count(Cost(*rows), images)
            state = {name: tensor for name, tensor in state.items() if name != COUNTS}
        with self._call("merge"):
            self.inner.merge(state)

    def result(self) -> dict[str, Any]:
        """The result of the metric as plain data: `{"value": …}` and optional further entries, or `{}` for no value.

        NumPy numbers and zero-dimensional tensors are converted to Python numbers. NaN and infinity are valid and are
        recorded. Entries other than "value" may also be a string, a bool or None. Finite numbers above MAX_RECORDED,
        strings longer than MAX_RECORDED_TEXT, and strings that are not valid Unicode raise an error.

        The evaluations of a metric of the data are added as `images`, `nfe`, `network_backward` and so on, per image.
        """
        with self._call("result"):
            found = self.inner.result()
        who = f"metric {self.metric.label()}: result returned"
        if not isinstance(found, Mapping):
            raise RunError(f'{who} {shown(found)}; it must be a dictionary with "value", or {{}}.')
        if not found:
            return {}
        if len(found) > MOST_NAMES:
            raise RunError(f"{who} {len(found)} names; at most {MOST_NAMES} can be recorded.")
        result: dict[str, Any] = {}
        for name, value in found.items():
            if not isinstance(name, str) or name in RESERVED or _unfit(name):
                raise RunError(f"{who} the name {shown(name)}, which it may not use.")
            if name != "value" and (value is None or isinstance(value, bool | str)):
                if isinstance(value, str) and (problem := _unfit(value)):
                    raise RunError(f"{who} {shorten(name, 60)} = {shown(value)}: {problem}.")
                result[name] = value
                continue
            number = _number(value)
            if number is None:
                raise RunError(f"{who} {shorten(name, 60)} = {shown(value)}, which is not a real number.")
            if MAX_RECORDED < abs(number) < math.inf:
                raise RunError(
                    f"{who} {shorten(name, 60)} = {number:.3g}; numbers up to {MAX_RECORDED:.0e} can be recorded."
                )
            result[name] = number
        if "value" not in result:
            raise RunError(f'{who} no "value", only {shorten(", ".join(result))}.')
        return self._counts() | result

    def _counts(self) -> dict[str, Any]:
        if not self.images:
            return {}
        per_image = self.cost.per_image(self.images)
        return {"images": self.images} | {name: rows for name, rows in per_image.items() if rows or name == "nfe"}

    def _call(self, method: str) -> plugin_call:
        return plugin_call(self.metric, f"in {method}", memory=False)


def min_images_of(metric: Metric) -> int:
    """The minimum number of images of a metric, checked.

    Raises:
        RunError: the plugin raised an exception, or did not return an integer of at least 1.
    """
    with plugin_call(metric, "in min_images"):
        found = metric.min_images
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise RunError(f"metric {metric.label()}: min_images is {shown(found)}; it must be a whole number, at least 1.")
    return found


def _unfit(text: str) -> str:
    """Why a record cannot contain a text; "" if it can."""
    if len(text) > MAX_RECORDED_TEXT:
        return f"texts of up to {MAX_RECORDED_TEXT} characters can be recorded"
    return "" if is_unicode(text) else "it has half of a surrogate pair, which is no character"


def _number(value: Any) -> int | float | None:
    if isinstance(value, Tensor | np.ndarray):
        if value.ndim or (isinstance(value, Tensor) and value.is_meta):
            return None
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        return None
    try:
        return int(value) if isinstance(value, numbers.Integral) and -(2**63) < int(value) < 2**63 else float(value)
    except OverflowError:
        return None


def _version(x: Tensor) -> int:
    """The version counter of a tensor, which torch increments at each in-place operation; -1 for inference tensors."""
    return -1 if x.is_inference() else x._version
