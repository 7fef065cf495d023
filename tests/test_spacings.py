"""Every spacing against its published formula, and the timesteps against diffusers'."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from torch import Tensor

from samplerbench import registry
from samplerbench.errors import UserError
from samplerbench.models.schedule import alphas_cumprod, noise_levels
from samplerbench.sampling import Spacing
from samplerbench.sampling.spacing import make_grid

T = 1000
MANY = [*range(2, 131), 333, 500, 501, 667, 999, 1000]
TIMESTEP_SPACINGS = ("trailing", "leading", "linspace", "quadratic")
SIGMA_SPACINGS = ("karras", "geometric")
DDPM_LEVELS = noise_levels(alphas_cumprod({}))
INDEX = torch.arange(1, T + 1, dtype=torch.float64)
"""Levels that say which timestep they are: t + 1."""


def grid(spec: str, steps: int, levels: Tensor = DDPM_LEVELS) -> Tensor:
    return make_grid(registry.parse("spacing", spec), levels, steps)


def timesteps(spec: str, steps: int) -> list[int]:
    return [int(level) - 1 for level in grid(spec, steps, INDEX)[:-1].tolist()]


def of_diffusers(spacing: str, steps: int, offset: int = 0) -> list[int]:
    scheduler = DDIMScheduler(num_train_timesteps=T, timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


# --- Over timesteps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3, 5, 10, 20, 25, 50, 100, 250, 333, 500, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_those_of_diffusers(spacing: str, steps: int) -> None:
    assert timesteps(spacing, steps) == of_diffusers(spacing, steps)


def test_leading_offset_is_steps_offset_of_diffusers() -> None:
    for steps in (1, 10, 50, 999):
        assert timesteps("leading:offset=1", steps) == of_diffusers("leading", steps, offset=1)


def test_leading_ends_at_zero_and_starts_below_the_top() -> None:
    assert timesteps("leading", 50) == list(range(980, -1, -20))
    assert timesteps("leading", 1) == [0]


def test_trailing_rounds_exactly() -> None:
    """round(T - i T/N) - 1 in whole numbers; diffusers' float steps lose some ties, and give 62 steps for 61."""
    assert timesteps("trailing", 50) == list(range(999, 0, -20))
    assert timesteps("trailing", 1) == [999]
    for steps in MANY:
        assert timesteps("trailing", steps) == [round(Fraction(T) - Fraction(i * T, steps)) - 1 for i in range(steps)]


def test_linspace_has_both_ends_and_is_nearest_to_even() -> None:
    assert timesteps("linspace", 1) == [999]
    for steps in MANY:
        found = timesteps("linspace", steps)
        assert (found[0], found[-1]) == (999, 0)
        assert max(abs(t - 999 * (1 - i / (steps - 1))) for i, t in enumerate(found)) <= 0.5 + 1e-9


@pytest.mark.parametrize("steps", [10, 20])
def test_quadratic_is_that_of_the_ddim_authors(steps: int) -> None:
    """`(np.linspace(0, np.sqrt(num_timesteps * 0.8), S) ** 2)` as int: runners/diffusion.py of ermongroup/ddim."""
    published = [int(s) for s in np.linspace(0, np.sqrt(T * 0.8), steps) ** 2]
    assert timesteps("quadratic", steps) == published[::-1]


def test_quadratic_is_the_exact_floor_until_two_steps_would_meet() -> None:
    for steps in range(2, 30):
        exact = [math.floor(Fraction(800 * i * i, (steps - 1) ** 2)) for i in range(steps)]
        assert timesteps("quadratic", steps) == exact[::-1]
    assert timesteps("quadratic", 1) == [800]


def test_quadratic_gives_as_many_different_timesteps_as_steps() -> None:
    for steps in MANY:
        found = timesteps("quadratic", steps)
        assert len(found) == steps
        assert all(a > b for a, b in pairwise(found))
        assert found[-1] == 0
        assert 800 <= found[0] < T
    assert timesteps("quadratic", T) == list(range(999, -1, -1))
    # Where steps are pushed apart, only the small ones move: the large ones keep the formula.
    assert timesteps("quadratic", 50)[:40] == [math.floor(Fraction(800 * i * i, 49**2)) for i in range(49, 9, -1)]


def test_quadratic_ends_where_it_is_told() -> None:
    assert timesteps("quadratic:fraction=0.5", 10)[0] == 500
    assert timesteps("quadratic:fraction=1", 10)[0] == 999


@pytest.mark.parametrize("spec", TIMESTEP_SPACINGS)
def test_levels_of_timesteps_are_exactly_the_models(spec: str) -> None:
    known = set(DDPM_LEVELS.tolist())
    for steps in (1, 7, 50, T):
        assert set(grid(spec, steps)[:-1].tolist()) <= known


@pytest.mark.parametrize("spec", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("steps", [T + 1, T + 7, 2 * T, 3 * T + 1])
def test_more_steps_than_timesteps_are_refused(spec: str, steps: int) -> None:
    with pytest.raises(UserError, match=f"spacing {spec} cannot give {steps} steps: the model has 1000 timesteps"):
        grid(spec, steps)


def test_an_offset_that_pushes_two_steps_together_is_refused() -> None:
    with pytest.raises(UserError, match="spacing leading:offset=1 cannot give 1000 steps"):
        grid("leading:offset=1", T)


# --- Over noise levels ---------------------------------------------------------------------------------------------


def test_karras_is_equation_5() -> None:
    low, high, n, rho = 0.002, 80.0, 18, 7.0
    found = grid(f"karras:sigma_min={low},sigma_max={high}", n).tolist()
    roots = [high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho)) for i in range(n)]
    assert found == pytest.approx([*(r**rho for r in roots), 0], rel=1e-12, abs=0)
    scheduler = EDMEulerScheduler(sigma_min=low, sigma_max=high, rho=rho, sigma_schedule="karras")
    scheduler.set_timesteps(n)
    assert found == pytest.approx(scheduler.sigmas.tolist(), rel=1e-5, abs=0)  # diffusers keeps float32


def test_karras_with_rho_one_is_even() -> None:
    found = grid("karras:rho=1,sigma_min=1,sigma_max=10", 10)
    assert found.tolist() == pytest.approx([10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0], abs=1e-12)


def test_larger_rho_puts_more_steps_at_small_noise() -> None:
    below = [int((grid(f"karras:rho={rho}", 50) < 1).sum()) for rho in (1, 3, 7, 20)]
    assert below == sorted(set(below))


def test_geometric_has_one_ratio() -> None:
    found = grid("geometric:sigma_min=0.01,sigma_max=1", 10)
    assert found[:-1].tolist() == pytest.approx([10 ** (-2 * i / 9) for i in range(10)], rel=1e-12)
    ratios = found[1:-1] / found[:-2]
    assert float(ratios.max() - ratios.min()) < 1e-14


@pytest.mark.parametrize("spec", SIGMA_SPACINGS)
def test_the_ends_are_the_models_own_unless_given(spec: str) -> None:
    own = grid(spec, 20)
    assert own[[0, -2]].tolist() == pytest.approx(DDPM_LEVELS[[-1, 0]].tolist(), rel=1e-12)
    given = grid(f"{spec}:sigma_min=0.5,sigma_max=7", 20)
    assert given[[0, -2]].tolist() == pytest.approx([7, 0.5], rel=1e-12)
    assert float(grid(f"{spec}:sigma_max=7", 1)[0]) == pytest.approx(7)


@pytest.mark.parametrize("spec", SIGMA_SPACINGS)
def test_ends_that_are_crossed_are_refused(spec: str) -> None:
    for steps in (1, 5):
        with pytest.raises(UserError, match=r"sigma_min = 9 is not below sigma_max = 1\."):
            grid(f"{spec}:sigma_min=9,sigma_max=1", steps)


@pytest.mark.parametrize("spec", SIGMA_SPACINGS)
def test_a_continuous_spacing_has_any_number_of_steps(spec: str) -> None:
    assert len(grid(spec, 2 * T)) == 2 * T + 1


# --- All of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", TIMESTEP_SPACINGS + SIGMA_SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50, T])
def test_a_grid_is_float64_decreasing_and_ends_at_zero(spec: str, steps: int) -> None:
    found = registry.parse("spacing", spec).grid(DDPM_LEVELS, steps)
    assert found.dtype == torch.float64
    assert found.shape == (steps + 1,)
    assert found[-1] == 0
    assert bool((found[1:] < found[:-1]).all())


@pytest.mark.parametrize("steps", [0, -1])
def test_less_than_one_step_is_refused(steps: int) -> None:
    with pytest.raises(UserError, match=f"steps={steps}: at least 1 step is needed"):
        grid("karras", steps)


@pytest.mark.parametrize(
    "levels",
    [[1.0, 2.0, 0.0], [2.0, 1.0], [2.0, 1.0, 0.1], [2.0, 2.0, 0.0], [math.nan, 1.0, 0.0], [math.inf, 1.0, 0.0]],
)
def test_a_spacing_that_gives_no_grid_is_refused(levels: list[float]) -> None:
    class Wrong(Spacing):
        def grid(self, _: Tensor, steps: int) -> Tensor:
            return torch.tensor(levels)

    with pytest.raises(UserError, match="spacing Wrong does not give 2 decreasing noise levels followed by 0"):
        make_grid(Wrong(), DDPM_LEVELS, 2)
