"""From samplers, guidances and budgets to the cells of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from samplerbench.bench.cell import Cell, plugin_parameters
from samplerbench.errors import RunError
from samplerbench.models.model import Model
from samplerbench.sampling import Guidance, Sampler, Spacing
from samplerbench.sampling.guidance import evaluations_of
from samplerbench.sampling.sampler import planned_nfe
from samplerbench.sampling.spacing import make_grid


def plan(
    model: Model,
    samplers: Sequence[Sampler],
    steps: Sequence[int],
    guidances: Sequence[Guidance | None],
    spacing_of: Callable[[Sampler], Spacing],
    budgets: Sequence[int] = (),
) -> tuple[list[Cell], list[Unmet]]:
    """The cells of a run, in the order of the table: every sampler, guidance, and number of steps or budget.

    A sampler that chooses its own steps has one cell, from the model's largest level; one that never asks the model has
    one cell, without guidance. Under a budget of network evaluations a sampler takes the most steps that fit; one that
    cannot be met is no cell but a row's gap.

    A cell whose plan fails in a plugin is a cell too, with its `error`: it fails when it is run, and the others go on.

    Raises:
        UserError: a spacing that cannot give so many steps.
    """
    cells: list[Cell] = []
    unmet: list[Unmet] = []
    nowhere = model.levels.new_zeros(1)
    for sampler in samplers:
        try:
            first = planned_nfe(sampler, 1)  # of one step; None or 0 where steps mean nothing to it
        except RunError as error:
            wanted = [(n, None) for n in steps] + [(None, budget) for budget in budgets]
            cells += [Cell(sampler, g, None, n, nowhere, b, error) for g in guidances for n, b in wanted]
            continue
        for guidance in guidances if first != 0 else (None,):
            if not first:
                ends = torch.stack([model.levels[-1], model.levels.new_zeros(())])
                cells.append(Cell(sampler, guidance, None, None, ends))
                continue
            spacing = spacing_of(sampler)
            shown = None if sampler.own_grid else spacing
            for n in steps:
                try:
                    cells.append(Cell(sampler, guidance, shown, n, make_grid(spacing, model.levels, n)))
                except RunError as error:
                    cells.append(Cell(sampler, guidance, shown, n, nowhere, None, error))
            for budget in budgets:
                most = None
                try:
                    cost = evaluations_of(guidance)
                    most = most_steps(sampler, cost, budget)
                    if most is None:
                        unmet.append(Unmet(sampler, guidance, budget, cost * first))
                    else:
                        grid = make_grid(spacing, model.levels, most)
                        cells.append(Cell(sampler, guidance, shown, most, grid, budget))
                except RunError as error:
                    cells.append(Cell(sampler, guidance, shown, most, nowhere, budget, error))
    return cells, unmet


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
