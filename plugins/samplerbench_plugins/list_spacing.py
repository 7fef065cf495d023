"""A spacing with explicit noise levels."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from samplerbench.sampling import (
    SIGMA_INFINITY,
    ModelView,
    Sampler,
    Spacing,
    UserError,
    argument,
    is_infinite,
    option,
)


@dataclass(frozen=True)
class Listed(Spacing):
    """Explicit decreasing noise levels, inline (`list:levels=80;20;5;1;0.1`) or from a file with one per line.

    A final 0 is optional. The number of steps is the number of levels above 0. For a rectified flow the first level may
    be inf, the time t = 1.
    """

    levels: str = option("", "σ values separated by semicolons, or the path of a text file", positional=True)

    def bind(self, model: ModelView, sampler: Sampler) -> Self:
        if model.flow is None and self.levels and is_infinite(self.values()[0]):
            raise UserError("spacing list: only a rectified flow can start at inf; give a number.")
        return self

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        values = self.values()
        if len(values) - 1 != steps:
            raise UserError(
                f"spacing list: it has {len(values) - 1} levels above 0, so it needs "
                f"{argument('steps', len(values) - 1)}."
            )
        return torch.tensor(values, dtype=torch.float64)

    def values(self) -> list[float]:
        """The levels, followed by 0. Raises UserError if they are not decreasing positive numbers."""
        text = self.levels
        try:
            if Path(text).expanduser().is_file():
                text = Path(text).expanduser().read_text("utf-8").replace("\n", ";")
        except (OSError, RuntimeError, UnicodeDecodeError) as error:
            # A long list is too long for a file name, which raises an OSError.
            if ";" not in text:
                raise UserError(f"spacing list: {text} cannot be read ({error}).") from None
        try:
            values = [float(part) for part in text.split(";") if part.strip()]
        except ValueError as error:
            raise UserError(
                f"spacing list: {error}; write levels=80;20;5;1 or name a file with one level per line."
            ) from None
        if values and values[-1] == 0:
            values.pop()
        if (
            not values
            or not all(0 < v < math.inf for v in values[1:])
            or not values[0] > 0
            or any(b >= a for a, b in itertools.pairwise(values))
        ):
            raise UserError("spacing list: the levels must be decreasing numbers above 0, like levels=80;20;5;1.")
        return [min(values[0], SIGMA_INFINITY), *values[1:], 0.0]
