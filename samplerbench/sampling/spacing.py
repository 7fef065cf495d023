"""Spacings: the grid of noise levels from σ_max to 0. A plugin; one function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from samplerbench import registry
from samplerbench.boundary import plugin_call, shown
from samplerbench.errors import RunError, UserError, argument
from samplerbench.limits import MAX_STEPS
from samplerbench.options import Configurable
from samplerbench.sampling.sampler import Sampler
from samplerbench.sampling.view import ModelView


@dataclass(frozen=True)
class Spacing(Configurable, ABC):
    """Base of spacing plugins."""

    kind: ClassVar[str] = "spacing"

    def bind(self, model: ModelView, sampler: Sampler) -> Spacing:
        """The spacing prepared for a model and a sampler: with a learned schedule, for example. By default, itself.

        Args:
            model: the model that will be sampled.
            sampler: the sampler that will walk the grid.

        Returns:
            A copy made by `with_state`. The instance itself is shared between models and must not change.

        Raises:
            UserError: the model lacks what the spacing needs.
        """
        return self

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
                f"use fewer {argument('steps')}, or a continuous spacing."
            )
        return torch.cat([levels[index.long()], levels.new_zeros(1)])


def pick_spacing(sampler: Sampler | type[Sampler], requested: str | Spacing | None = None) -> Spacing:
    """The spacing of every run, figure, check and scheduler.

    Args:
        sampler: the sampler, or its class.
        requested: a spec or an instance; None is the sampler's own spacing, or the toolkit's default if it has none.

    Raises:
        UserError: there is no such spacing.
    """
    if requested == "":
        raise UserError(f"{argument('spacing')} is empty; name a spacing, or leave it out.")
    found: Spacing
    if requested is not None or not sampler.spacing:
        found = registry.parse("spacing", requested or registry.default("spacing"))
        return found
    try:
        found = registry.parse("spacing", sampler.spacing)
    except UserError as error:
        cls = sampler if isinstance(sampler, type) else type(sampler)
        raise UserError(f"the default spacing of the sampler {vars(cls).get('name', cls.__name__)}: {error}") from None
    return found


def bind_spacing(spacing: Spacing, model: ModelView, sampler: Sampler) -> Spacing:
    """`spacing.bind(model, sampler)`, checked.

    Raises:
        UserError: the model lacks what the spacing needs.
        RunError: the plugin raised, or returned something else than a spacing of the same spec.
    """
    with plugin_call(spacing, "in bind"):
        bound = spacing.bind(model, sampler)
    if not isinstance(bound, Spacing) or bound != spacing:
        raise RunError(
            f"spacing {spacing.label()}: bind returned {shown(bound)}; it must be a spacing with the same parameters."
        )
    return bound


def make_grid(spacing: Spacing, levels: Tensor, steps: int) -> Tensor:
    """The spacing's grid, checked: (steps+1,) float64, finite, strictly decreasing, the last 0.

    Raises:
        UserError: steps < 1, or a spacing that gave no such grid.
        RunError: the plugin raised.
    """
    if steps < 1:
        raise UserError(f"{argument('steps', steps)}: at least 1 step is needed.")
    if steps > MAX_STEPS:
        raise UserError(f"{argument('steps', steps)}: at most {MAX_STEPS:,} are possible.")
    with plugin_call(spacing, f"in grid for {steps} steps"):
        grid = spacing.grid(levels.double().clone(), steps)
    if not isinstance(grid, Tensor) or grid.is_complex() or grid.layout != torch.strided or grid.is_meta:
        raise UserError(
            f"spacing {spacing.spec}: grid returned a {type(grid).__name__}; it must be a real tensor (steps+1,)."
        )
    grid = grid.detach().double().cpu()
    sound = grid.shape == (steps + 1,) and bool(grid.isfinite().all()) and grid[-1] == 0
    if not sound or bool((grid[1:] >= grid[:-1]).any()):
        raise UserError(
            f"spacing {spacing.spec} gave no grid of {steps} decreasing levels that ends at 0; "
            f"use another {argument('spacing')} or fewer {argument('steps')}."
        )
    return grid
