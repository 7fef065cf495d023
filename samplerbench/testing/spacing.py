"""The checks of a spacing."""

from __future__ import annotations

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.models.exact import exact
from samplerbench.models.run_view import ModelRun
from samplerbench.sampling import SIGMA_INFINITY, Spacing
from samplerbench.sampling.spacing import bind_spacing, make_grid
from samplerbench.testing.checks import NotApplicableError
from samplerbench.testing.common import (
    Checks,
    Euler,
    check_documented,
    check_picklable,
    require,
    untouched_random_state,
)

LEARNED_STEPS = 4
"""Number of steps for which learned spacings are checked."""


def _bound(spacing: Spacing) -> tuple[Spacing, Tensor]:
    """The spacing bound to a Gaussian problem, a rectified flow if it needs one, and the problem's noise levels."""
    model = exact("gaussian", shape="1x2x2", process="flow" if spacing.flows_only else "vp")
    return bind_spacing(spacing, ModelRun(model), Euler()), model.levels


def _fixed(spacing: Spacing, levels: Tensor) -> int | None:
    """The number of steps of a spacing with explicit levels; None if it supports any number."""
    if spacing.learned:
        return None
    try:
        spacing.grid(levels, 7)
    except UserError:
        return next((n for n in range(1, 200) if _gives(spacing, levels, n)), 0)
    return None


def _gives(spacing: Spacing, levels: Tensor, steps: int) -> bool:
    try:
        make_grid(spacing, levels, steps)
    except UserError:
        return False
    return True


def check_grid(spacing: Spacing) -> str:
    """The grid has N+1 finite float64 levels, strictly decreasing to 0, for N = 1, 2, 10, 50 and 1000.

    For a learned spacing, N = 1, 2 and 4.
    """
    spacing, levels = _bound(spacing)
    fixed = _fixed(spacing, levels)
    if fixed == 0:
        raise NotApplicableError("it has no levels of its own to check (give some)")
    counts: tuple[int, ...] = (1, 2, 10, 50, 1000) if fixed is None else (fixed,)
    if spacing.learned:
        counts = (1, 2, LEARNED_STEPS)
    for steps in counts:
        raw = spacing.grid(levels, steps)
        require(raw.dtype == torch.float64, f"the grid is {raw.dtype}, not float64")
        require(tuple(raw.shape) == (steps + 1,), f"{steps} steps give {len(raw)} levels, not {steps + 1}")
        make_grid(spacing, levels, steps)
    return ", ".join(map(str, counts)) + " steps"


def check_range(spacing: Spacing) -> str:
    """The levels are within those of the model."""
    spacing, levels = _bound(spacing)
    fixed = _fixed(spacing, levels)
    if fixed is not None:
        raise NotApplicableError("its levels are its own")
    grid = make_grid(spacing, levels, LEARNED_STEPS if spacing.learned else 20)
    given = any(spacing.parameters.get(k) is not None for k in ("sigma_min", "sigma_max"))
    if given:
        raise NotApplicableError("its range is given")
    low, high = float(levels[0]), SIGMA_INFINITY if spacing.flows_only else float(levels[-1])
    require(float(grid[0]) <= high * (1 + 1e-9), f"it starts at σ = {grid[0]:.4g}; the model's largest is {high:.4g}")
    require(float(grid[-2]) >= low * (1 - 1e-9), f"its last level is {grid[-2]:.4g}; the model's smallest is {low:.4g}")
    return f"σ from {float(grid[0]):.4g} to {float(grid[-2]):.4g}"


def check_too_many(spacing: Spacing) -> str:
    """More steps than timesteps are supported, or raise a one-line error."""
    spacing, levels = _bound(spacing)
    steps = len(levels) + 1
    try:
        make_grid(spacing, levels, steps)
    except UserError as error:
        require(len(str(error)) > 20, "the refusal says too little")
        return "refused"
    return "given: it is continuous"


def check_random_state(spacing: Spacing) -> str:
    """It is deterministic, and does not use global random generators."""
    spacing, levels = _bound(spacing)
    fixed = _fixed(spacing, levels)
    if fixed == 0:
        raise NotApplicableError("it has no levels of its own to check (give some)")
    with untouched_random_state():
        one, two = (spacing.grid(levels, LEARNED_STEPS if spacing.learned else fixed or 12) for _ in range(2))
    require(torch.equal(one, two), "two calls give two grids")
    return "untouched"


CHECKS: Checks = [
    ("documented", check_documented),
    ("picklable", check_picklable),
    ("grid", check_grid),
    ("range", check_range),
    ("too-many", check_too_many),
    ("random-state", check_random_state),
]
