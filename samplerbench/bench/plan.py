"""From samplers, guidances and budgets to the cells of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from samplerbench.bench.cell import Cell, plugin_parameters
from samplerbench.errors import RunError
from samplerbench.models.model import Model
from samplerbench.sampling import Generator, Guidance, Sampler, Spacing
from samplerbench.sampling.guidance import bind_guidance, evaluations_of
from samplerbench.sampling.sampler import planned_nfe
from samplerbench.sampling.spacing import bind_spacing, make_grid


def plan(
    model: Model,
    methods: Sequence[Sampler | Generator],
    steps: Sequence[int],
    guidances: Sequence[Guidance | None],
    spacing_of: Callable[[Sampler], Spacing],
    budgets: Sequence[int] = (),
) -> tuple[list[Cell], list[Unmet]]:
    """The cells of a run, in the order of the table: every method, guidance, and number of steps or budget.

    A sampler that chooses its own steps has one cell, from the model's largest level; a generator has one cell, without
    guidance. Under a budget of network evaluations a sampler takes the most steps that fit; a budget that cannot be met
    is not a cell but a gap in the sampler's row.

    A cell whose plan fails in a plugin is a cell too, with its `error`: it fails when it is run, and the others go on.

    Args:
        model: the model of the run.
        methods: samplers and generators.
        steps: numbers of steps.
        guidances: None is the unguided model.
        spacing_of: gives the spacing of a sampler.
        budgets: of network evaluations per image.

    Raises:
        UserError: a spacing that cannot give so many steps, or a guidance that does not fit the model.
    """
    cells: list[Cell] = []
    unmet: list[Unmet] = []
    nowhere = model.levels.new_zeros(1)
    bound = [_bind(guidance, model) for guidance in guidances]
    for method in methods:
        if isinstance(method, Generator):
            cells.append(Cell(method, None, None, None, nowhere))
            continue
        try:
            first = planned_nfe(method, 1)  # of one step; None where steps mean nothing to it
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
                cells.append(_cell(model, method, guidance, spacing_of(method), n, None, failure))
            for budget in budgets:
                most = None
                try:
                    cost = evaluations_of(guidance)
                    most = most_steps(method, cost, budget)
                except RunError as error:
                    cells.append(Cell(method, guidance, _shown(method, spacing_of), None, nowhere, budget, error))
                    continue
                if most is None:
                    unmet.append(Unmet(method, guidance, budget, cost * first))
                else:
                    cells.append(_cell(model, method, guidance, spacing_of(method), most, budget, failure))
    return cells, unmet


def _bind(guidance: Guidance | None, model: Model) -> tuple[Guidance | None, RunError | None]:
    """A guidance bound to the model, or as it is with the error of its plugin."""
    try:
        return bind_guidance(guidance, model), None
    except RunError as error:
        return guidance, error


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
) -> Cell:
    """A sampler's cell on the grid of its spacing, bound to the model and the sampler."""
    grid = model.levels.new_zeros(1)
    try:
        if failure is None:
            spacing = bind_spacing(spacing, model, sampler)
            grid = make_grid(spacing, model.levels, steps)
    except RunError as error:
        failure = error
    return Cell(sampler, guidance, None if sampler.own_grid else spacing, steps, grid, budget, failure)


@dataclass(frozen=True)
class Unmet:
    """A budget of evaluations below what even one step of a sampler costs."""

    sampler: Sampler
    guidance: Guidance | None
    budget: int
    least: int

    @property
    def record(self) -> dict[str, Any]:
        """What stands in the place of a result."""
        return {
            "sampler": self.sampler.spec,
            "guidance": None if self.guidance is None else self.guidance.spec,
            "spacing": None,
            "steps": None,
            "budget": self.budget,
            "metrics": {},
            "unmet": f"a budget of {self.budget} evaluations is below the {self.least} of one step",
            "protocol_fields": plugin_parameters(self.sampler, self.guidance),
        }


def most_steps(sampler: Sampler, cost: int, budget: int) -> int | None:
    """The most steps whose evaluations, `cost` network rows each, are within the budget; None if one is too many."""
    return next((n for n in range(budget // cost, 0, -1) if (planned_nfe(sampler, n) or 0) * cost <= budget), None)
