"""Metrics of degenerate images: classes without probability, identical images, features that are not finite."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from samplerbench import registry
from samplerbench.errors import RunError, UserError
from samplerbench.metrics import Batch, Context, Moments, Reference
from samplerbench.metrics.frechet import frechet_distance
from samplerbench.metrics.inception_score import inception_scores
from samplerbench.metrics.kernel import squared_mmd
from samplerbench.metrics.manifold import coverage


def draws(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Inception score -----------------------------------------------------------------------------------------------


def score_by_terms(logits: np.ndarray) -> float:
    """exp mean KL by a sum over the terms with p > 0, in extended precision."""
    exact = logits.astype(np.longdouble)
    p = np.exp(exact - exact.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    marginal = p.mean(axis=0)
    total = np.longdouble(0)
    for row in p:
        for own, whole in zip(row, marginal, strict=True):
            if own > 0:
                total += own * (np.log(own) - np.log(whole))
    return float(np.exp(total / len(p)))


def test_a_class_without_probability_contributes_nothing_to_the_inception_score() -> None:
    """Logits 800 below the others underflow to p = 0 in float64: 0·∞ without care."""
    logits = draws(60, 5, 0)
    logits[:, 3] -= 800
    scores = inception_scores(logits, 3)
    assert torch.isfinite(scores).all()
    without = inception_scores(logits[:, [0, 1, 2, 4]], 3)
    torch.testing.assert_close(scores, without, rtol=1e-14, atol=0)
    for score, part in zip(scores.tolist(), logits.split(20), strict=True):
        assert score == pytest.approx(score_by_terms(part.numpy()), rel=1e-12)


@pytest.mark.parametrize("depth", [300.0, 740.0, 744.4, 746.0, 1e6])
def test_the_inception_score_of_certain_classes_is_their_number(depth: float) -> None:
    """One-hot probabilities, evenly: exp KL = K. At -744 the probabilities are subnormal, below 0."""
    logits = torch.full((12, 4), -depth, dtype=torch.float64)
    logits[torch.arange(12), torch.arange(12) % 4] = 0
    assert inception_scores(logits, 1).item() == pytest.approx(4, rel=1e-12)
    one = torch.full((12, 4), -depth, dtype=torch.float64)
    one[:, 2] = 0
    assert inception_scores(one, 1).item() == pytest.approx(1, rel=1e-12)


def test_a_probability_of_the_smallest_float_beside_zeros_contributes_nothing() -> None:
    """The mean of 12 of them is 0 in float64, and its logarithm infinite."""
    logits = torch.zeros(12, 2, dtype=torch.float64)
    logits[:, 1] = -1e6
    logits[4, 1] = -744.4
    assert float(logits.softmax(dim=1)[4, 1]) == 5e-324
    assert inception_scores(logits, 1).item() == 1


# --- Identical images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "n"), [(5, 30), (64, 30), (64, 300), (2048, 30), (2048, 57)])
def test_copies_of_one_real_image_have_precision_one_and_recall_that_image(d: int, n: int) -> None:
    """Every ball of the copies has the radius 0, but for rounding, which must not put the copies outside of it."""
    real = draws(40, d, 1) + 5
    copies = real[7].repeat(n, 1)
    assert coverage(copies, real, 3) == 1
    assert coverage(real, copies, 3) == 1 / 40


def test_too_few_images_for_a_ball_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="balls to the 3-th neighbour need at least 4 images; there are 3"):
        coverage(draws(9, 2, 0), draws(3, 2, 1), 3)


def test_identical_images_have_no_distance_but_that_of_their_means() -> None:
    one, other = draws(1, 6, 2).repeat(20, 1), draws(1, 6, 3).repeat(30, 1)
    assert frechet_distance(Moments.of(one), Moments.of(one)) == 0
    expected = float((one[0] - other[0]).square().sum())
    assert frechet_distance(Moments.of(one), Moments.of(other)) == pytest.approx(expected, rel=1e-12)
    value, error = squared_mmd(one, other)
    kernel = [float(a @ b / 6 + 1) ** 3 for a, b in ((one[0], one[0]), (other[0], other[0]), (one[0], other[0]))]
    assert value == pytest.approx(kernel[0] + kernel[1] - 2 * kernel[2], rel=1e-9)
    assert error < 1e-6 * value


def test_kid_of_two_images_is_the_formula_written_out() -> None:
    x, y = draws(2, 3, 4), draws(2, 3, 5)

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 3 + 1) ** 3

    expected = k(x[0], x[1]) + k(y[0], y[1]) - sum(k(a, b) for a in x for b in y) / 2
    assert squared_mmd(x, y)[0] == pytest.approx(expected, rel=1e-12)


# --- Features that are not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric", ["fid", "fid-inf", "kid", "inception-score", "precision", "recall", "label-accuracy"]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_an_error_and_no_number(metric: str, bad: float) -> None:
    real = draws(60, 12, 6)
    generated = draws(60, 12, 7)
    generated[11, 5] = bad
    accumulator = registry.parse("metric", metric).start(Context(Reference(Moments.of(real), {}, {}), lambda _: real))

    def measure() -> None:
        accumulator.update(Batch(torch.zeros(1), generated, torch.arange(60) % 12))
        accumulator.result()

    fails_with(measure, "not finite")


def fails_with(call: Callable[[], None], reason: str) -> None:
    with pytest.raises(RunError, match=reason):
        call()
