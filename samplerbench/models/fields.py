"""Read and validate the values of a checkpoint configuration."""

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
    """Typed access to a configuration.

    Every method returns the value of a key. If the value is invalid, it raises a UserError with the file, the key, the
    value and the accepted values. Values are never converted: "1000" and true are not accepted as numbers.

    Attributes:
        values: the configuration.
        where: prefix of error messages, for example `FOLDER: unet/config.json`.
    """

    values: Mapping[str, Any]
    where: str

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """Return an integer from low to high."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refusal(key, value, f"a whole number from {low:,} to {high:,}")
        return value

    def integer_or_none(self, key: str, low: int, high: int) -> int | None:
        """Return an integer from low to high, or None for null."""
        return None if self.values.get(key) is None else self.integer(key, low, high)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """Return a finite number from low to high."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.refusal(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean, or the default for null."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        """Return a string, or the default for null."""
        value = self._value(key, default)
        if value is not None and not isinstance(value, str):
            raise self.refusal(key, value, "a string")
        return value

    def numbers(self, key: str, low: float, high: float, longest: int) -> list[float] | None:
        """Return a list of 1 to `longest` finite numbers from low to high, or None for null."""
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
        """Return (H, W). The value is an integer for both, or a list of two integers."""
        value = self._value(key, None)
        pair = value if isinstance(value, list | tuple) else (value, value)
        if len(pair) != 2 or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in pair):
            raise self.refusal(key, value, f"a whole number from 1 to {MAX_SIDE:,}, or a list of two")
        return pair[0], pair[1]

    def refusal(self, key: str, value: Any, wanted: str) -> UserError:
        """Return the error for an invalid value.

        Args:
            key: key of the value.
            value: the value. None if it is missing.
            wanted: description of the accepted values.
        """
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
    """Whether a value is a finite number and not a boolean."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False
