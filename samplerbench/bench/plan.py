"""From samplers, guidances and budgets to the cells of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from samplerbench.bench.cell import Cell, plugin_parameters
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

    Raises:
        UserError: a spacing that cannot give so many steps.
        RunError: a plugin raised, or said of its cost what is no number.
    """
    cells: list[Cell] = []
    unmet: list[Unmet] = []
    for sampler in samplers:
        first = planned_nfe(sampler, 1)  # of one step; None or 0 where steps mean nothing to it
        for guidance in guidances if first != 0 else (None,):
            if not first:
                ends = torch.stack([model.levels[-1], model.levels.new_zeros(())])
                cells.append(Cell(sampler, guidance, None, None, ends))
                continue
            spacing = spacing_of(sampler)
            shown = None if sampler.own_grid else spacing
            wanted: list[tuple[int, int | None]] = [(n, None) for n in steps]
            for budget in budgets:
                cost = evaluations_of(guidance)
                most = most_steps(sampler, cost, budget)
                if most is None:
                    unmet.append(Unmet(sampler, guidance, budget, cost * first))
                else:
                    wanted.append((most, budget))
            cells += [Cell(sampler, guidance, shown, n, make_grid(spacing, model.levels, n), b) for n, b in wanted]
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
