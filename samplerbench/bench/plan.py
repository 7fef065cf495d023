"""Planning: creates the cells of a run from samplers, guidances, steps and budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplerbench.bench.cell import Cell, plugin_parameters
from samplerbench.errors import RunError, UserError, argument
from samplerbench.models.model import Model
from samplerbench.models.run_view import ModelRun
from samplerbench.sampling import Generator, Guidance, ModelView, Sampler, Spacing
from samplerbench.sampling.generator import bind_generator
from samplerbench.sampling.guidance import bind_guidance, evaluations_of
from samplerbench.sampling.sampler import planned_nfe
from samplerbench.sampling.spacing import bind_spacing, make_grid

LevelsOf = Callable[[Spacing, Sampler, Guidance | None, int], tuple[Spacing, Tensor]]
"""Function of a spacing, a sampler, a bound guidance and a number of steps: the bound spacing and its noise levels."""


def plan(
    model: Model,
    methods: Sequence[Sampler | Generator],
    steps: Sequence[int],
    guidances: Sequence[Guidance | None],
    spacing_of: Callable[[Sampler], Spacing],
    budgets: Sequence[int] = (),
    levels_of: LevelsOf | None = None,
) -> tuple[list[Cell], list[Unmet]]:
    """Create the cells of a run, in the order of the table.

    There is one cell for each method, guidance, and number of steps or budget. A sampler that chooses its own steps has
    one cell per guidance, which starts at the largest noise level of the model. A generator has one cell, without
    guidance. For a budget, a sampler uses the largest number of steps that fits. A budget that is smaller than the cost
    of one step has no cell, and its place in the table is empty.

    If a plugin fails during planning, the cell stores the exception in `error`. The cell fails when it is run, and the
    other cells are not affected.

    Args:
        model: The model of the run.
        methods: Samplers and generators.
        steps: Numbers of steps.
        guidances: Guidances. None is the unguided model.
        spacing_of: Function that returns the spacing of a sampler.
        budgets: Budgets, in network evaluations per image.
        levels_of: Function that binds a spacing and computes its noise levels. If None, `bind_levels` without the
            inputs of a run.

    Returns:
        The cells, and the budgets that are too small.

    Raises:
        UserError: If a spacing does not support a number of steps, or if a guidance or a generator does not support
            the model.
    """
    cells: list[Cell] = []
    unmet: list[Unmet] = []
    nowhere = model.levels.new_zeros(1)
    bound = [_bind(guidance, model) for guidance in guidances]
    for method in methods:
        if isinstance(method, Generator):
            cells.append(_generator_cell(model, method, nowhere))
            continue
        try:
            first = planned_nfe(method, 1)  # of one step; None if the sampler chooses its own steps
        except RunError as error:
            wanted = [(n, None) for n in steps] + [(None, budget) for budget in budgets]
            cells += [Cell(method, g, None, n, nowhere, b, error) for g in guidances for n, b in wanted]
            continue
        for guidance, failure in bound:
            if first is None:
                ends = torch.stack([model.levels[-1], model.levels.new_zeros(())])
                cells.append(Cell(method, guidance, None, None, ends, error=failure))
                continue
            for n in steps:
                cells.append(_cell(model, method, guidance, spacing_of(method), n, None, failure, levels_of))
            for budget in budgets:
                most = None
                try:
                    cost = evaluations_of(guidance) * model.rows_per_evaluation
                    most = most_steps(method, cost, budget, len(model.levels))
                except RunError as error:
                    cells.append(Cell(method, guidance, _shown(method, spacing_of), None, nowhere, budget, error))
                    continue
                if most is None:
                    unmet.append(Unmet(method, guidance, budget, cost * first))
                else:
                    cells.append(_cell(model, method, guidance, spacing_of(method), most, budget, failure, levels_of))
    return cells, unmet


def _without_inputs(model: Model) -> LevelsOf:
    return lambda spacing, sampler, guidance, steps: bind_levels(spacing, ModelRun(model, guidance), sampler, steps)


def bind_levels(spacing: Spacing, view: ModelView, sampler: Sampler, steps: int) -> tuple[Spacing, Tensor]:
    """Bind a spacing to a model, a sampler and a number of steps, and compute its noise levels.

    Args:
        spacing: The spacing.
        view: The model.
        sampler: The sampler.
        steps: Number of steps.

    Returns:
        The bound spacing, and the noise levels (N+1,), float64.

    Raises:
        UserError: If the spacing does not support the model or the number of steps.
        RunError: If the plugin fails.
    """
    bound = bind_spacing(spacing, view, sampler, steps)
    return bound, make_grid(bound, view.levels, steps)


def _bind(guidance: Guidance | None, model: Model) -> tuple[Guidance | None, RunError | None]:
    """Bind a guidance to the model. If its plugin fails, return the unbound guidance and the error."""
    if guidance is not None and model.by_own_call:
        raise UserError(
            f"{argument('guidance', guidance.spec)} is not supported: a pipeline that is run by its own call applies "
            "its own guidance; set its arguments, as in pipeline:SOURCE,guidance_scale=5."
        )
    try:
        return bind_guidance(guidance, model), None
    except RunError as error:
        return guidance, error


def _generator_cell(model: Model, generator: Generator, sigmas: Tensor) -> Cell:
    """Create the cell of a generator, which is bound to the model."""
    failure: RunError | None = None
    try:
        generator = bind_generator(generator, model)
    except RunError as error:
        failure = error
    return Cell(generator, None, None, None, sigmas, error=failure)


def _shown(sampler: Sampler, spacing_of: Callable[[Sampler], Spacing]) -> Spacing | None:
    return None if sampler.own_grid else spacing_of(sampler)


def _cell(
    model: Model,
    sampler: Sampler,
    guidance: Guidance | None,
    spacing: Spacing,
    steps: int,
    budget: int | None,
    failure: RunError | None,
    levels_of: LevelsOf | None,
) -> Cell:
    """Create the cell of a sampler. Its spacing is bound to the model and the sampler."""
    grid = model.levels.new_zeros(1)
    try:
        if failure is None:
            spacing, grid = (levels_of or _without_inputs(model))(spacing, sampler, guidance, steps)
    except RunError as error:
        failure = error
    return Cell(sampler, guidance, None if sampler.own_grid else spacing, steps, grid, budget, failure)


@dataclass(frozen=True)
class Unmet:
    """A budget that is smaller than the cost of one step of a sampler.

    Attributes:
        sampler: The sampler.
        guidance: The guidance, or None.
        budget: The budget, in network evaluations per image.
        least: Cost of one step, in network evaluations per image.
    """

    sampler: Sampler
    guidance: Guidance | None
    budget: int
    least: int

    @property
    def record(self) -> dict[str, Any]:
        """Record that replaces a result."""
        return {
            "sampler": self.sampler.spec,
            "guidance": None if self.guidance is None else self.guidance.spec,
            "spacing": None,
            "steps": None,
            "budget": self.budget,
            "metrics": {},
            "unmet": f"a budget of {self.budget} evaluations is too small: one step costs {self.least}",
            "protocol_fields": plugin_parameters(self.sampler, self.guidance),
        }


def most_steps(sampler: Sampler, cost: int, budget: int, limit: int = 0) -> int | None:
    """Return the largest number of steps that fits into a budget.

    Args:
        sampler: The sampler.
        cost: Network evaluations (rows) per evaluation of the denoiser, for example 2 for classifier-free guidance.
        budget: Network evaluations per image.
        limit: Largest number of steps for a sampler that makes steps without an evaluation.

    Returns:
        The number of steps, or None if one step costs more than the budget.
    """

    def fits(n: int) -> bool:
        return (planned_nfe(sampler, n) or 0) * cost <= budget

    most = next((n for n in range(budget // cost, 0, -1) if fits(n)), None)
    if most is not None and 0 < (planned_nfe(sampler, most) or 0) < most:
        while most < limit and fits(most + 1):
            most += 1
    return most
