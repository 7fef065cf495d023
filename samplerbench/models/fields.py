"""The numbers and words of a checkpoint's configuration, checked where they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samplerbench.errors import UserError
from samplerbench.limits import MAX_SIDE
from samplerbench.untrusted import shorten


@dataclass(frozen=True)
class Fields:
    """A configuration, read by type.

    Every method takes a key and gives its value, or raises UserError with the file, the key, the value and what is
    accepted. A value is never converted: "1000" and true are not the number 1000.

    Attributes:
        values: the configuration.
        where: how an error begins: `FOLDER: unet/config.json`.
    """

    values: Mapping[str, Any]
    where: str

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number from low to high."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refusal(key, value, f"a whole number from {low:,} to {high:,}")
        return value

    def integer_or_none(self, key: str, low: int, high: int) -> int | None:
        """A whole number from low to high, or null."""
        return None if self.values.get(key) is None else self.integer(key, low, high)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number from low to high."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.refusal(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false; null is the default."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        """A string, or the default where there is none."""
        value = self._value(key, default)
        if value is not None and not isinstance(value, str):
            raise self.refusal(key, value, "a string")
        return value

    def numbers(self, key: str, low: float, high: float, longest: int) -> list[float] | None:
        """A list of finite numbers from low to high, or None for null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Sequence) or isinstance(value, str) or not 1 <= len(value) <= longest:
            raise self.refusal(key, value, f"a list of 1 to {longest:,} numbers")
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int | float) or not low <= item <= high:
                raise self.refusal(key, value, f"a list of numbers from {low:g} to {high:g}")
        return [float(item) for item in value]

    def sides(self, key: str) -> tuple[int, int]:
        """(H, W): a whole number for both, or a list of two."""
        value = self._value(key, None)
        pair = value if isinstance(value, list | tuple) else (value, value)
        if len(pair) != 2 or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in pair):
            raise self.refusal(key, value, f"a whole number from 1 to {MAX_SIDE:,}, or a list of two")
        return pair[0], pair[1]

    def refusal(self, key: str, value: Any, wanted: str) -> UserError:
        """The error for a value that is not what is wanted."""
        if value is None:
            return UserError(f"{self.where} has no {key}; it must be {wanted}.")
        try:
            shown = shorten(repr(value), 60)
        except ValueError:  # an integer with thousands of digits
            shown = f"a {type(value).__name__}"
        return UserError(f"{self.where}: {key} is {shown}; it must be {wanted}.")

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value


def is_finite_number(value: Any) -> bool:
    """Whether a value read from a file is a finite number, and no truth value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False
