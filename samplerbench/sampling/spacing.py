"""Spacings: plugins that choose the noise levels of a run, from σ_max to 0."""

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
    """Base class of spacing plugins."""

    kind: ClassVar[str] = "spacing"
    flows_only: ClassVar[bool] = False
    """Whether the spacing is only for rectified flows. It is refused for other models."""
    learned: ClassVar[bool] = False
    """Whether the levels are computed by an optimisation. One process of a run computes them, and the others receive
    them. A large number of steps may be refused."""

    def bind(self, model: ModelView, sampler: Sampler) -> Spacing:
        """Prepare the spacing for a model and a sampler, for example learn a schedule. By default, return `self`.

        Args:
            model: model to sample from. In a run it is a `RunView`, which also has the guidance, labels and prompts.
            sampler: sampler that uses the grid.

        Returns:
            A copy made by `with_state`. Do not modify the instance itself, because models share it.

        Raises:
            UserError: if the model does not meet the requirements of the spacing.
        """
        return self

    def for_steps(self, steps: int) -> Spacing:
        """Prepare a bound spacing for a number of steps, for example learn its levels. By default, return `self`.

        Args:
            steps: number of steps, N ≥ 1.

        Returns:
            A copy made by `with_state`, with `bound_evaluations`, the network evaluations that the levels cost.
        """
        return self

    @abstractmethod
    def grid(self, levels: Tensor, steps: int) -> Tensor:
        """Return the noise levels of a run.

        Args:
            levels: noise levels of the model, (T,) float64, increasing. Index t is timestep t.
            steps: number of steps, N ≥ 1.

        Returns:
            The noise levels, (N+1,) float64, strictly decreasing, ending at 0.
        """

    def timesteps(self, levels: Tensor, index: Tensor) -> Tensor:
        """Return the noise levels of a sequence of timesteps, followed by 0. For spacings over discrete timesteps.

        Args:
            levels: noise levels of the model, (T,) float64, increasing.
            index: timesteps, (N,), strictly decreasing.

        Returns:
            The noise levels, (N+1,) float64.

        Raises:
            UserError: if the timesteps are not N distinct decreasing values.
        """
        if len(index) > len(levels) or bool((index[1:] >= index[:-1]).any()):
            raise UserError(
                f"spacing {self.spec} cannot give {len(index)} steps: the model has {len(levels)} timesteps; "
                f"use fewer {argument('steps')}, or a continuous spacing."
            )
        return torch.cat([levels[index.long()], levels.new_zeros(1)])


def pick_spacing(
    sampler: Sampler | type[Sampler], requested: str | Spacing | None = None, default: str | None = None
) -> Spacing:
    """Select the spacing. All runs, figures, checks and schedulers use this function.

    Args:
        sampler: sampler instance or class.
        requested: spec or instance. If None, the first of these that exists is used: `default`, unless the sampler
            keeps its own (`keeps_spacing`); the default of the sampler; the default of samplerbench.
        default: default spacing of the model. None if it has none.

    Raises:
        UserError: if the spacing does not exist.
    """
    if requested == "":
        raise UserError(f"{argument('spacing')} is empty; name a spacing, or leave it out.")
    found: Spacing
    if requested is None and not (sampler.keeps_spacing and sampler.spacing):
        requested = default
    if requested is not None or not sampler.spacing:
        found = registry.parse("spacing", requested or registry.default("spacing"))
        return found
    try:
        found = registry.parse("spacing", sampler.spacing)
    except UserError as error:
        cls = sampler if isinstance(sampler, type) else type(sampler)
        raise UserError(f"the default spacing of the sampler {vars(cls).get('name', cls.__name__)}: {error}") from None
    return found


def bind_spacing(spacing: Spacing, model: ModelView, sampler: Sampler, steps: int | None = None) -> Spacing:
    """Call `spacing.bind(model, sampler)`, then `for_steps(steps)`, and check the results.

    Args:
        spacing: the spacing.
        model: model to sample from.
        sampler: sampler that uses the grid.
        steps: number of steps. None does not call `for_steps`.

    Raises:
        UserError: if the model does not meet the requirements of the spacing.
        RunError: if the plugin raises an error, or does not return a spacing with the same parameters.
    """
    if spacing.flows_only and model.flow is None:
        raise UserError(
            f"spacing {spacing.spec} is for rectified flows, and this model is none; use another spacing, such as "
            "trailing."
        )
    with plugin_call(spacing, "in bind"):
        bound = spacing.bind(model, sampler)
    _check_same(spacing, bound, "bind")
    if steps is None:
        return bound
    with plugin_call(bound, f"in for_steps({steps})"):
        ready = bound.for_steps(steps)
    _check_same(spacing, ready, "for_steps")
    return ready


def _check_same(spacing: Spacing, returned: Spacing, method: str) -> None:
    """Raise RunError if a method returned something else than a copy of the spacing."""
    if not isinstance(returned, Spacing) or returned != spacing:
        raise RunError(
            f"spacing {spacing.label()}: {method} returned {shown(returned)}; it must be a spacing with the same "
            "parameters."
        )


def make_grid(spacing: Spacing, levels: Tensor, steps: int) -> Tensor:
    """Return the grid of a spacing after a check.

    Args:
        spacing: the spacing.
        levels: noise levels of the model, (T,) float64, increasing.
        steps: number of steps, N ≥ 1.

    Returns:
        The noise levels, (N+1,) float64 on the CPU, finite, strictly decreasing, ending at 0.

    Raises:
        UserError: if steps is out of range, or the spacing returns an invalid grid.
        RunError: if the plugin raises an error.
    """
    if steps < 1:
        raise UserError(f"{argument('steps', steps)}: at least 1 step is needed.")
    if steps > MAX_STEPS:
        raise UserError(f"{argument('steps', steps)}: at most {MAX_STEPS:,} are possible.")
    with plugin_call(spacing, f"in grid for {steps} steps"):
        grid = spacing.grid(levels.double().clone(), steps)
    if not isinstance(grid, Tensor) or grid.is_complex() or grid.layout != torch.strided or grid.is_meta:
        raise UserError(
            f"spacing {spacing.spec}: grid returned a {type(grid).__name__}; it must be a real tensor of "
            "shape (steps+1,)."
        )
    grid = grid.detach().double().cpu()
    sound = grid.shape == (steps + 1,) and bool(grid.isfinite().all()) and grid[-1] == 0
    if not sound or bool((grid[1:] >= grid[:-1]).any()):
        raise UserError(
            f"spacing {spacing.spec} does not give {steps} decreasing noise levels followed by 0; "
            f"use another {argument('spacing')} or fewer {argument('steps')}."
        )
    return grid
