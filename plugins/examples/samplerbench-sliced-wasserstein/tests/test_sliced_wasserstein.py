"""What must be true of sliced-wasserstein: the conformance checks, closed forms, and SciPy's distance."""

import math

import pytest
import torch
from samplerbench.metrics import Batch, Context, Moments, Reference
from samplerbench.sampling import UserError
from samplerbench.testing import parametrize_with_checks
from scipy.stats import wasserstein_distance

from samplerbench_sliced_wasserstein import SlicedWasserstein, sliced_wasserstein, wasserstein_1d


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def started(real: torch.Tensor | None, **parameters: float):
    reference = Reference(Moments(2), {"name": "draws", "split": "all", "n": None}, {"name": "pairs", "weights": ""})
    return SlicedWasserstein(**parameters).start(Context(reference, None if real is None else lambda layer: real))


def batch(features: torch.Tensor) -> Batch:
    return Batch(torch.zeros(len(features), 1, 2, 2, dtype=torch.uint8), features, None)


# --- One dimension -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "width"), [(0.0, 1.0), (2.0, 1.0), (0.0, 0.5), (-1.0, 3.0)])
def test_two_gaussians(mean: float, width: float) -> None:
    """W_2² = (μ - μ')² + (s - s')², here of the quantiles of N(0, 1), of mean 0, and of their image."""
    quantiles = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)[:, None]
    expected = mean**2 + (1 - width) ** 2 * float(quantiles.square().mean())
    shuffled = quantiles[torch.randperm(4000, generator=torch.Generator().manual_seed(0))]
    assert float(wasserstein_1d(shuffled, mean + width * quantiles, 2.0)) == pytest.approx(
        expected, rel=1e-9, abs=1e-12
    )
    assert expected == pytest.approx(mean**2 + (1 - width) ** 2, rel=2e-3)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_samples_of_two_sizes_by_hand(power: float) -> None:
    """0 against {0, 1}: half of the mass moves by 1. {0, 1} against {0, 1, 2}: a sixth by 1 and a third by 1."""
    zero, two, three = (torch.arange(n, dtype=torch.float64)[:, None] for n in (1, 2, 3))
    assert float(wasserstein_1d(zero, two, power)) == pytest.approx(1 / 2, rel=1e-12)
    assert float(wasserstein_1d(two, three, power)) == pytest.approx(1 / 6 + 1 / 3, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(7, 7), (7, 12), (30, 4), (1, 9)])
def test_it_is_scipy_s_distance(n: int, m: int) -> None:
    x, y = draws(n, 3), 1 + 2 * draws(m, 3, seed=1)
    expected = [wasserstein_distance(x[:, k].numpy(), y[:, k].numpy()) for k in range(3)]
    torch.testing.assert_close(wasserstein_1d(x, y, 1.0), torch.tensor(expected), rtol=1e-12, atol=0)


def test_in_one_dimension_every_direction_is_the_same() -> None:
    x, y = draws(20, 1), draws(30, 1, seed=1)
    expected = float(wasserstein_1d(x, y, 2.0)) ** 0.5
    for directions in (1, 5):
        assert sliced_wasserstein(x, y, directions) == pytest.approx(expected, rel=1e-12)


# --- Many dimensions -----------------------------------------------------------------------------------------------


def test_a_shift_is_seen_in_the_mean_over_directions() -> None:
    """Of x and x + c it is E (θ·c)² = |c|²/d; (θ·c)²/|c|² has the variance 3/(d(d+2)) - 1/d². Within 5 deviations."""
    d, directions = 6, 20_000
    x, c = draws(5, d), draws(d, seed=1)
    found = sliced_wasserstein(x, x + c, directions) ** 2 / float(c.square().sum())
    deviation = math.sqrt((3 / (d * (d + 2)) - 1 / d**2) / directions)
    assert abs(found - 1 / d) < 5 * deviation


def test_it_is_symmetric_and_0_for_the_same_images() -> None:
    x, y = draws(8, 4), draws(11, 4, seed=1)
    assert sliced_wasserstein(x, x[torch.arange(7, -1, -1)]) == 0
    assert sliced_wasserstein(x, y) == pytest.approx(sliced_wasserstein(y, x), rel=1e-12)
    assert sliced_wasserstein(3 * x, 3 * y) == pytest.approx(3 * sliced_wasserstein(x, y), rel=1e-12)


def test_the_directions_are_the_seed_s_and_no_global_state_is_touched() -> None:
    x, y = draws(8, 4), draws(11, 4, seed=1)
    before = torch.get_rng_state()
    assert sliced_wasserstein(x, y, seed=1) == sliced_wasserstein(x, y, seed=1) != sliced_wasserstein(x, y, seed=2)
    assert torch.equal(before, torch.get_rng_state())


# --- The metric ----------------------------------------------------------------------------------------------------


@parametrize_with_checks(["sliced-wasserstein", "sliced-wasserstein:directions=20,power=1,seed=3"], kind="metric")
def test_it_is_what_it_says(check) -> None:
    check()


def test_its_value_is_the_distance_with_its_parameters() -> None:
    made, real = draws(9, 4), draws(12, 4, seed=1)
    measured = started(real, directions=100, power=1.0, seed=3)
    measured.update(batch(made))
    assert measured.result()["value"] == sliced_wasserstein(made, real, 100, 1.0, 3)


def test_it_needs_the_real_images() -> None:
    measured = started(None)
    measured.update(batch(draws(3, 2)))
    with pytest.raises(UserError, match="needs the real images"):
        measured.result()
