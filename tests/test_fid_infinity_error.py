"""The standard error of FID∞ is the spread of its value over other images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from samplerbench.bench.labels import balanced_labels
from samplerbench.metrics.fid_infinity import _shuffled, extrapolate
from samplerbench.metrics.frechet import frechet_distance, frechet_influence
from samplerbench.metrics.moments import Moments


def draws(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weighted_distance(x: Tensor, p: Tensor, reference: Moments) -> float:
    """The Fréchet distance of x (n, d) with weights p (n,) that sum to 1, through the singular values of YA."""
    n, mean = len(x), p @ x
    y = math.sqrt(n / (n - 1)) * p.sqrt()[:, None] * (x - mean)
    root = float(torch.linalg.svdvals(y @ reference.factor).sum())
    shift = mean - reference.mean
    return float(shift @ shift + y.square().sum() + reference.covariance.trace()) - 2 * root


@pytest.mark.parametrize(
    ("n", "d", "m"),
    [(50, 6, 200), (12, 20, 300), (40, 20, 9), (15, 20, 9), (2, 5, 40)],
    ids=["full rank", "few images", "few real images", "few of both", "two images"],
)
def test_the_influence_is_the_derivative_by_the_weight(n: int, d: int, m: int) -> None:
    """Against central differences of an independent formula, for covariances of every rank."""
    x, reference = 2 * draws(n, d, 0) + 0.3, Moments.of(draws(m, d, 1))
    influence = frechet_influence(x, Moments.of(x), reference)
    p = torch.full((n,), 1 / n, dtype=torch.float64)
    assert weighted_distance(x, p, reference) == pytest.approx(frechet_distance(Moments.of(x), reference), rel=1e-12)
    step, expected = 1e-4 / n, []
    for i in range(min(n, 8)):
        direction = torch.nn.functional.one_hot(torch.tensor(i), n) - p
        ends = [weighted_distance(x, p + sign * step * direction, reference) for sign in (1, -1)]
        expected.append((ends[0] - ends[1]) / (2 * step))
    scale = float(influence.abs().max()) + 1e-3
    np.testing.assert_allclose(influence[: len(expected)], expected, rtol=0, atol=1e-5 * scale)
    assert abs(float(influence.sum())) < 1e-10 * scale * n


def test_the_influence_of_identical_images_is_zero() -> None:
    one = draws(1, 4, 2).repeat(9, 1)
    assert frechet_influence(one, Moments.of(one), Moments.of(draws(30, 4, 3))).abs().max() < 1e-12


def line(features: Tensor, left_out: int | None, reference: Moments, points: int, subsets: list[Tensor]) -> float:
    """FID∞ through given subsets, without one image."""
    kept = [s if left_out is None else s[s != left_out] for s in subsets]
    sizes = np.array([len(s) for s in subsets])
    values = [frechet_distance(Moments.of(features[s]), reference) for s in kept]
    return float(np.polyfit(1 / sizes, values, 1)[1])


def test_the_error_is_that_of_the_jackknife_which_leaves_each_image_out_in_turn() -> None:
    """√((n-1)/n Σ (θ_(i) - θ̄)²), by n recomputations; the infinitesimal one is its limit for large n."""
    n, points = 160, 4
    x, reference = 1.3 * draws(n, 3, 4) + 0.5, Moments.of(draws(500, 3, 5))
    value, error = extrapolate(x, reference, points)
    generator = torch.Generator().manual_seed(0)
    sizes = np.linspace(n // 10, n, points).astype(int)
    subsets = [_shuffled(n, None, generator)[:size] for size in sizes]
    assert line(x, None, reference, points, subsets) == pytest.approx(value, rel=1e-10)
    left_out = np.array([line(x, i, reference, points, subsets) for i in range(n)])
    assert error == pytest.approx(math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()), rel=0.1)


@pytest.mark.parametrize("labels", [None, balanced_labels(400, [1, 1, 2])], ids=["independent", "balanced"])
def test_the_error_is_the_spread_over_repeats_and_covers_the_truth(labels: Tensor | None) -> None:
    """Mixtures of three Gaussians, whose moments are known: 150 repeats of n = 400, d = 4.

    A right 95% interval covers 136 to 148 of 150, in 98 of 100 trials. The residuals of the line gave an interval that
    covers 90 of them.
    """
    n, d = 400, 4
    shares = torch.tensor([1.0, 1.0, 2.0]).double() / 4
    centres = 2 * draws(3, d, 6)
    mean = shares @ centres
    covariance = (centres - mean).T @ (shares[:, None] * (centres - mean)) + torch.eye(d)
    reference = Moments.from_statistics(torch.ones(d).double(), 2 * torch.eye(d).double(), None)
    truth = frechet_distance(Moments.from_statistics(mean, covariance, None), reference)
    rng = np.random.default_rng(7)
    pairs = []
    for i in range(150):
        own = torch.from_numpy(rng.choice(3, n, p=shares.numpy())) if labels is None else labels
        pairs.append(extrapolate(centres[own] + draws(n, d, 100 + i), reference, 5, labels))
    values, errors = np.array(pairs).T
    # The standard deviation of 150 values is known to 6%.
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(ddof=1), rel=0.2)
    assert 136 <= int((np.abs(values - truth) <= 1.96 * errors).sum()) <= 149


def test_balanced_images_have_a_smaller_error_than_independent_ones() -> None:
    labels = balanced_labels(300, [1, 1])
    x = draws(300, 3, 8) + 5 * labels[:, None]
    reference = Moments.of(draws(300, 3, 9) + 1)
    assert extrapolate(x, reference, 5, labels)[1] < extrapolate(x, reference, 5)[1] / 2
