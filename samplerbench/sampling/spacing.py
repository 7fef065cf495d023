"""Spacings: where on the way from σ_max to 0 the steps are. A plugin; one function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from samplerbench.errors import SamplerbenchError, UserError
from samplerbench.limits import MAX_STEPS
from samplerbench.options import Configurable
from samplerbench.untrusted import reason


@dataclass(frozen=True)
class Spacing(Configurable, ABC):
    """Base of spacing plugins."""

    kind: ClassVar[str] = "spacing"

    @abstractmethod
    def grid(self, levels: Tensor, steps: int) -> Tensor:
        """The noise levels of a run: (steps+1,) float64, strictly decreasing, the last 0.

        Args:
            levels: (T,) float64, increasing: the model's own noise levels, timestep t at index t.
            steps: N ≥ 1.
        """

    def timesteps(self, levels: Tensor, index: Tensor) -> Tensor:
        """The grid of the timesteps `index` (N,), decreasing: their levels, then 0. For spacings over timesteps.

        Raises:
            UserError: the timesteps are not N different ones.
        """
        if len(index) > len(levels) or bool((index[1:] >= index[:-1]).any()):
            raise UserError(
                f"spacing {self.spec} cannot give {len(index)} steps: the model has {len(levels)} timesteps; "
                "use fewer --steps, or a continuous spacing."
            )
        return torch.cat([levels[index.long()], levels.new_zeros(1)])


def make_grid(spacing: Spacing, levels: Tensor, steps: int) -> Tensor:
    """The spacing's grid, checked: (steps+1,) float64, finite, strictly decreasing, the last 0.

    Raises:
        UserError: steps < 1, or a spacing that gave no such grid.
    """
    if steps < 1:
        raise UserError(f"--steps {steps}: at least 1 step is needed.")
    if steps > MAX_STEPS:
        raise UserError(f"--steps {steps}: at most {MAX_STEPS:,} are possible.")
    try:
        grid = spacing.grid(levels.double(), steps).double().cpu()
    except SamplerbenchError:
        raise
    except Exception as error:  # an overflow, say; whatever a spacing raises is the spacing's error
        raise UserError(
            f"spacing {spacing.spec} cannot give {steps} steps: {type(error).__name__}: {reason(error)}."
        ) from error
    sound = grid.shape == (steps + 1,) and bool(grid.isfinite().all()) and grid[-1] == 0
    if not sound or bool((grid[1:] >= grid[:-1]).any()):
        raise UserError(
            f"spacing {spacing.spec} gave no grid of {steps} decreasing levels that ends at 0; "
            "use another --spacing or fewer --steps."
        )
    return grid
