"""The Fréchet distance against 50-digit arithmetic and singular values: conditioning, ranks, and what is cached."""

import math

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from samplerbench.errors import RunError
from samplerbench.metrics import Moments
from samplerbench.metrics.frechet import frechet_distance, root_trace


def vectors(n: int, d: int, seed: int, decay: float = 0.0) -> Tensor:
    """(n, d) float64, whose k-th direction has the standard deviation (k + 1)^-decay."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    spread = torch.arange(1, d + 1, dtype=torch.float64) ** -decay
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * spread @ basis


def nuclear(one: Tensor, two: Tensor) -> float:
    """tr (Σ₁Σ₂)^½ = ‖X₁X₂ᵀ‖_* / √((n-1)(m-1)) of the centred vectors themselves: singular values, no covariance."""
    product = (one - one.mean(0)) @ (two - two.mean(0)).T
    return float(torch.linalg.svdvals(product).sum()) / math.sqrt((len(one) - 1) * (len(two) - 1))


def to_fifty_digits(one: Moments, two: Moments) -> float:
    """The distance of these float64 moments, as exact numbers, in 50-digit arithmetic."""
    with mpmath.workdps(50):
        a, b = (mpmath.matrix(m.covariance.tolist()) for m in (one, two))
        a, b = ((m + m.T) / 2 for m in (a, b))
        factor = mpmath.cholesky(b)
        values = mpmath.eigsy(factor.T * a * factor, eigvals_only=True)
        shift = [mpmath.mpf(p) - mpmath.mpf(q) for p, q in zip(one.mean.tolist(), two.mean.tolist(), strict=True)]
        traces = sum(a[i, i] + b[i, i] for i in range(a.rows))
        return float(sum(s * s for s in shift) + traces - 2 * sum(mpmath.sqrt(v) for v in values))


@pytest.mark.parametrize("decay", [0.0, 2.0, 4.0])
def test_it_is_the_distance_to_fifty_digits(decay: float) -> None:
    one, two = (Moments.of(vectors(60, 9, seed, decay) + 0.2 * seed) for seed in (1, 2))
    assert frechet_distance(one, two) == pytest.approx(to_fifty_digits(one, two), rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(50, 60), (50, 7), (7, 50), (9, 7), (7, 9), (25, 24), (24, 25), (2, 50), (2, 2)])
def test_it_is_the_nuclear_norm_whatever_the_ranks(n: int, m: int) -> None:
    one, two = vectors(n, 24, seed=3), vectors(m, 24, seed=4)
    assert root_trace(Moments.of(one), Moments.of(two)) == pytest.approx(nuclear(one, two), rel=1e-12)


def test_it_is_symmetric() -> None:
    for n, m in ((90, 80), (90, 10), (12, 10)):
        one, two = Moments.of(vectors(n, 16, seed=5)), Moments.of(vectors(m, 16, seed=6) + 1)
        assert frechet_distance(one, two) == pytest.approx(frechet_distance(two, one), rel=1e-13)


def test_features_that_repeat_each_other_do_no_harm() -> None:
    """Rank 5 of 8 although there are 70 vectors: the rank must be found, as no count tells it."""
    one, two = (vectors(70, 5, seed) for seed in (7, 8))
    repeat = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    found = root_trace(Moments.of(one[:, repeat]), Moments.of(two[:, repeat]))
    assert found == pytest.approx(nuclear(one[:, repeat], two[:, repeat]), rel=1e-12)
    moments = Moments.of(two[:, repeat])
    torch.testing.assert_close(moments.factor @ moments.factor.T, moments.covariance, rtol=0, atol=1e-13)


def test_vectors_that_are_all_one_have_no_root_trace() -> None:
    point, cloud = Moments.of(torch.ones(20, 6)), Moments.of(vectors(40, 6, seed=9))
    expected = float((1 - cloud.mean).square().sum()) + float(cloud.covariance.trace())
    for sides in ((point, cloud), (cloud, point)):
        assert frechet_distance(*sides) == pytest.approx(expected, rel=1e-12)


def test_the_factor_is_triangular_where_it_can_be() -> None:
    moments = Moments.of(vectors(40, 12, seed=10))
    assert moments.cholesky is moments.factor
    assert float(moments.factor.triu(1).abs().max()) == 0
    assert Moments.of(vectors(12, 12, seed=10)).cholesky is None


def test_a_factor_is_kept_until_the_stream_goes_on() -> None:
    reference, generated = Moments.of(vectors(50, 8, seed=11)), Moments.of(vectors(50, 8, seed=12))
    first = frechet_distance(generated, reference)
    assert reference.factor is reference.factor
    assert frechet_distance(generated, reference) == first  # what LAPACK overwrites is no one's
    more = vectors(30, 8, seed=13) + 2
    reference.update(more)
    whole = Moments.of(torch.cat([vectors(50, 8, seed=11), more]))
    assert frechet_distance(generated, reference) == pytest.approx(frechet_distance(generated, whole), rel=1e-12)


def test_a_state_that_was_given_away_keeps_its_value() -> None:
    moments = Moments.of(vectors(20, 5, seed=14))
    mean, scatter = moments.mean, moments.scatter
    copies = mean.clone(), scatter.clone()
    moments.update(vectors(20, 5, seed=15))
    moments.merge(Moments.of(vectors(20, 5, seed=16)))
    assert torch.equal(mean, copies[0])
    assert torch.equal(scatter, copies[1])
    np.testing.assert_array_equal(moments.n, 60)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    spoilt = vectors(20, 5, seed=17)
    spoilt[3, 2] = bad
    for sides in ((spoilt, vectors(20, 5, seed=18)), (vectors(20, 5, seed=18), spoilt)):
        with pytest.raises(RunError, match="features are not finite"):
            frechet_distance(*map(Moments.of, sides))
    mean = torch.tensor([0.0, bad])
    published = Moments.from_statistics(mean, torch.eye(2), None)
    for sides in ((published, Moments.of(vectors(20, 2, seed=19))), (Moments.of(vectors(20, 2, seed=19)), published)):
        with pytest.raises(RunError, match="features are not finite"):
            frechet_distance(*sides)
