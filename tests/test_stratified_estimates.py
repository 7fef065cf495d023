"""Under balanced labels the number of images of each class is fixed: KID and FID∞ must know it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.synthetic_results import record
from torch import Tensor

from samplerbench import registry
from samplerbench.bench import prepare, request
from samplerbench.bench.cell import metric_sources
from samplerbench.bench.labels import balanced_labels
from samplerbench.cli.app import main
from samplerbench.data import ImageSet, load_data
from samplerbench.errors import RunError
from samplerbench.metrics import Batch, Context, Moments, Reference
from samplerbench.metrics.extractors import load_extractor
from samplerbench.metrics.fid_infinity import _shuffled, extrapolate
from samplerbench.metrics.frechet import frechet_distance
from samplerbench.metrics.kernel import squared_mmd
from samplerbench.metrics.strata import strata_of, variance_of_mean
from samplerbench.results.groups import group, metric_identities
from samplerbench.results.store import Store

CLASSES = 10
DEGREE = 3


def kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** DEGREE


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load_data("digits")


@pytest.fixture(scope="module")
def features(digits: ImageSet) -> Tensor:
    """Of all digits, (1797, 64) float64."""
    return load_extractor("digits-cnn", torch.device("cpu"))(digits.images).double()


def draw_by_class(labels: Tensor, wanted: Tensor, rng: np.random.Generator, replace: bool = False) -> Tensor:
    """Numbers (n,) of random images with the wanted labels (n,)."""
    drawn = torch.empty(len(wanted), dtype=torch.int64)
    for a in range(CLASSES):
        places, own = (wanted == a).nonzero()[:, 0], (labels == a).nonzero()[:, 0]
        drawn[places] = torch.from_numpy(rng.choice(own.numpy(), len(places), replace))
    return drawn


# --- The estimator -------------------------------------------------------------------------------------------------


def test_the_estimate_is_the_sum_over_pairs_of_classes_written_out() -> None:
    """Σ_ab w_a w_b k̄_ab, where k̄_aa is over pairs of different images; by loops, for unequal classes on both sides."""
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.normal(size=(n, 4))) for n in (23, 31))
    one, two = (torch.from_numpy(np.concatenate([[0, 0, 1, 1, 2, 2], rng.integers(0, 3, n - 6)])) for n in (23, 31))

    def within(z: Tensor, labels: Tensor) -> float:
        k, total = kernel(z, z), 0.0
        for a in range(3):
            for b in range(3):
                pairs = [
                    float(k[i, j])
                    for i in range(len(z))
                    for j in range(len(z))
                    if labels[i] == a and labels[j] == b and i != j
                ]
                total += float((labels == a).sum() * (labels == b).sum()) / len(z) ** 2 * np.mean(pairs)
        return total

    expected = within(x, one) + within(y, two) - 2 * float(kernel(x, y).mean())
    assert squared_mmd(x, y, DEGREE, labels=one, real_labels=two)[0] == pytest.approx(expected, rel=1e-12)
    iid = float((kernel(y, y).sum() - kernel(y, y).diagonal().sum()) / (31 * 30))
    expected = within(x, one) + iid - 2 * float(kernel(x, y).mean())
    assert squared_mmd(x, y, DEGREE, labels=one, chunk=7)[0] == pytest.approx(expected, rel=1e-12)


def test_one_class_is_the_ordinary_estimate_and_error() -> None:
    rng = np.random.default_rng(1)
    x, y = (torch.from_numpy(rng.normal(size=(n, 5))) for n in (40, 50))
    same = squared_mmd(x, y, labels=torch.zeros(40, dtype=torch.int64), real_labels=torch.zeros(50, dtype=torch.int64))
    assert same == pytest.approx(squared_mmd(x, y), rel=1e-12)


def test_it_is_unbiased_for_a_mixture_with_fixed_numbers_of_draws() -> None:
    """Classes that lie far apart, against independent draws of the mixture: the ordinary estimate is biased by -B/n."""
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(3, 2)) * 2
    wanted = np.repeat([0, 1, 2], [4, 8, 12])
    labels = torch.from_numpy(wanted)
    found, ordinary = [], []
    for _ in range(1000):
        x = centres[wanted] + 0.5 * rng.normal(size=(24, 2))
        y = centres[rng.choice(3, 30, p=[1 / 6, 1 / 3, 1 / 2])] + 0.5 * rng.normal(size=(30, 2))
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        found.append(squared_mmd(x, y, labels=labels)[0])
        ordinary.append(squared_mmd(x, y)[0])
    for values, unbiased in ((found, True), (ordinary, False)):
        z = np.mean(values) / (np.std(values, ddof=1) / math.sqrt(len(values)))
        assert (abs(z) < 4) == unbiased, z


# --- Real images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [200, 500])
def test_real_digits_under_balanced_labels_have_the_kid_of_their_classes(
    digits: ImageSet, features: Tensor, n: int
) -> None:
    """Digits of balanced labels against all the others, 16 times.

    Every pair of two different digits of given classes is equally likely, so the expectation is known exactly:
    (w - v)ᵀ K̄ (w - v), with K̄ the classes' mean kernels, and w, v the two sides' shares of the classes, which differ by
    rounding only. The ordinary estimate is lower by B (1/n + 1/m): -15.2 at n = 200.
    """
    labels = digits.labels
    assert labels is not None
    wanted = balanced_labels(n, digits.class_counts())
    rng = np.random.default_rng(3)
    values, ordinary, rest = [], [], torch.ones(0)
    for _ in range(16):
        drawn = draw_by_class(labels, wanted, rng)
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[drawn] = False
        values.append(squared_mmd(features[drawn], features[rest], labels=wanted, real_labels=labels[rest])[0])
        ordinary.append(squared_mmd(features[drawn], features[rest])[0])
    one_hot = torch.nn.functional.one_hot(labels, CLASSES).double()
    k = kernel(features, features).fill_diagonal_(0)
    sizes = one_hot.sum(0)
    means = (one_hot.T @ k @ one_hot) / (sizes[:, None] * sizes - sizes.diag())
    w, v = (torch.bincount(x).double() / len(x) for x in (wanted, labels[rest]))
    truth = float((w - v) @ means @ (w - v))
    error = np.std(values, ddof=1) / math.sqrt(16)
    assert abs(np.mean(values) - truth) < 4 * error
    assert truth < 0.2
    m = len(labels) - n
    between = float(w @ means.diagonal() - w @ means @ w)
    assert np.mean(ordinary) == pytest.approx(-between * (1 / n + 1 / m), rel=0.05)
    assert np.mean(ordinary) < -15 * error


def test_real_digits_without_labels_have_no_kid(digits: ImageSet, features: Tensor) -> None:
    """Independent draws, disjoint from the others: the expectation of the ordinary estimate is exactly 0."""
    rng = np.random.default_rng(4)
    values = []
    for _ in range(16):
        order = torch.from_numpy(rng.permutation(len(features)))
        values.append(squared_mmd(features[order[:200]], features[order[200:]])[0])
    assert abs(np.mean(values)) < 4 * np.std(values, ddof=1) / math.sqrt(16)


@pytest.mark.parametrize("labels", [None, balanced_labels(150, [1, 2, 2, 5])])
def test_the_standard_error_is_the_spread_over_repeats(labels: Tensor | None) -> None:
    """Of two mixtures that differ; the standard deviation of 250 values is known to 4.5%."""
    rng = np.random.default_rng(5)
    shares = np.array([1, 2, 2, 5]) / 10
    centres = rng.normal(size=(4, 3)) * 3
    pairs = []
    for _ in range(250):
        own = rng.choice(4, 150, p=shares) if labels is None else labels.numpy()
        x = centres[own] + rng.normal(size=(150, 3)) + 1
        y = centres[rng.choice(4, 900, p=shares)] + rng.normal(size=(900, 3))
        pairs.append(squared_mmd(torch.from_numpy(x), torch.from_numpy(y), labels=labels))
    values, errors = np.array(pairs).T
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(ddof=1), rel=0.15)


def test_fid_infinity_of_balanced_digits_is_that_of_their_population(digits: ImageSet, features: Tensor) -> None:
    """Draws with replacement from half of the digits, whose own Fréchet distance is the truth.

    Random subsets of balanced images are not balanced: the line through them has another slope, and the extrapolated
    value is too low by the variance between classes over n.
    """
    labels = digits.labels
    assert labels is not None
    n = 1300
    half = torch.arange(0, len(features), 2)
    rest = torch.arange(1, len(features), 2)
    population, classes, reference = features[half], labels[half], Moments.of(features[rest])
    counts = torch.bincount(classes)
    wanted = balanced_labels(n, counts.tolist())
    weights = (torch.bincount(wanted) / n / counts)[classes].double()
    mean = weights @ population
    covariance = (population - mean).T @ (weights[:, None] * (population - mean))
    truth = frechet_distance(Moments.from_statistics(mean, covariance, None), reference)
    rng = np.random.default_rng(6)
    pairs, plain = [], []
    for _ in range(12):
        x = population[draw_by_class(classes, wanted, rng, replace=True)]
        pairs.append(extrapolate(x, reference, 5, wanted))
        plain.append(extrapolate(x, reference, 5)[0])
    values, errors = np.array(pairs).T
    assert abs(values.mean() - truth) < 3 * np.sqrt(np.mean(errors**2) / 12)
    assert np.mean(plain) < truth - 3 * np.sqrt(np.mean(errors**2))


# --- Strata --------------------------------------------------------------------------------------------------------


def test_classes_with_one_image_form_a_stratum_together() -> None:
    assert strata_of(torch.tensor([2, 0, 2, 1, 1, 0])).tolist() == [2, 0, 2, 1, 1, 0]
    assert strata_of(torch.tensor([3, 0, 1, 1, 5])).tolist() == [0, 0, 1, 1, 0]
    assert strata_of(torch.tensor([4, 4, 4, 0, 1, 1])).tolist() == [4, 4, 4, 1, 1, 1]
    assert torch.bincount(strata_of(torch.arange(7))).max() == 7


def test_the_variance_of_a_stratified_mean_is_the_sum_over_strata() -> None:
    values, strata = torch.tensor([1.0, 3.0, 10.0, 14.0, 18.0]).double(), torch.tensor([0, 0, 2, 2, 2])
    assert variance_of_mean(values, strata) == pytest.approx((2 * 2 + 3 * 16) / 25, rel=1e-14)
    assert variance_of_mean(values) == pytest.approx(float(values.var()) / 5, rel=1e-14)


def test_shuffled_images_keep_their_places_labels() -> None:
    labels = balanced_labels(97, [3, 1, 7])
    order = _shuffled(97, labels, torch.Generator().manual_seed(1))
    assert torch.equal(labels[order], labels)
    assert sorted(order.tolist()) == list(range(97))
    assert not torch.equal(order, torch.arange(97))


# --- In a run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kid", "fid-inf"])
def test_labels_reach_the_metric_through_batches_states_and_merges(name: str) -> None:
    rng = torch.Generator().manual_seed(7)
    x, real = (torch.randn(n, 4, generator=rng, dtype=torch.float64) for n in (60, 50))
    labels = balanced_labels(60, [1, 1, 2])
    x += labels[:, None]
    context = Context(Reference(Moments.of(real), {}, {}), lambda _: real, stratified=True)
    metric = registry.parse("metric", name)
    whole, merged = metric.start(context), metric.start(context)
    for cut in (slice(0, 25), slice(25, 60)):
        part = metric.start(context)
        batch = Batch(torch.zeros(1), x[cut], labels[cut])
        part.update(batch)
        whole.update(batch)
        merged.merge(part.state())
    expected = (
        squared_mmd(x, real, labels=labels) if name == "kid" else extrapolate(x, context.reference.moments, 15, labels)
    )
    assert whole.result() == merged.result() == {"value": expected[0], "standard_error": expected[1]}
    plain = metric.start(Context(context.reference, lambda _: real))
    plain.update(Batch(torch.zeros(1), x, labels))
    assert plain.result()["value"] != expected[0]
    with pytest.raises(RunError, match="have none"):
        metric.start(context).update(Batch(torch.zeros(1), x, None))


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def test_a_run_takes_balanced_labels_as_strata_on_both_sides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The KID of a run is that of its own images, written out by `sample`, with the labels of both sides."""
    real, extractor = load_data("digits:split=train"), load_extractor("digits-cnn", torch.device("cpu"))
    cell = ["-s", "ddim", "--steps", "3", "--n", "60"]
    assert run(["run", *cell, "--metric", "kid", "--json", "--out", str(tmp_path / "out")]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert run(["sample", str(tmp_path / "g.png"), *cell, "--png-dir", str(tmp_path / "images")]) == 0
    made = load_data(str(tmp_path / "images")).images
    wanted = balanced_labels(60, real.class_counts())
    expected = squared_mmd(extractor(made), extractor(real.images), labels=wanted, real_labels=real.labels)
    entry = record["metrics"]["kid"]
    assert entry["value"] == pytest.approx(expected[0], rel=1e-4)
    assert entry["standard_error"] == pytest.approx(expected[1], rel=1e-4)


@pytest.mark.parametrize(
    ("mode", "stratified", "strata"), [("balanced", True, True), ("none", False, False), ("4", False, False)]
)
def test_what_a_session_says_of_its_labels(tmp_path: Path, mode: str, stratified: bool, strata: bool) -> None:
    asked = request.Request([request.Grid(["ddim"], [2])], n=40, labels=mode, metrics=("fid", "kid"))
    prepared = prepare.prepare(asked, "cpu")
    measurement = prepare.make_session(prepared, prepare.measure_reference(prepared), 0, Store(tmp_path)).measurement
    assert measurement.stratified is stratified
    found = measurement.strata()
    assert (found is not None) is strata
    assert measurement.shared.get("metric sources") == ({"kid": "stratified"} if stratified else None)
    measurement.model.class_counts = [1, *[2] * 9]  # shares that are not those of the real images
    assert measurement.strata() is None


def test_the_estimator_is_in_the_protocol_and_only_where_it_is_new() -> None:
    metrics = [
        registry.parse("metric", spec) for spec in ("fid", "kid:degree=2", "precision", "inception-score", "gap")
    ]
    assert metric_sources(metrics, stratified=False) == {}
    assert metric_sources(metrics, stratified=True) == {"metric sources": {"kid:degree=2": "stratified"}}


def test_old_and_new_kid_never_share_a_column_and_their_fid_may() -> None:
    def with_kid(value: float, **more: Any) -> dict[str, Any]:
        made = record(metrics={"kid": [value, value + 1]})
        made["protocol_fields"] |= {"metrics": ["kid"], **more}
        return made | {"protocol": f"{value:064.0f}"}

    old, new = with_kid(-15), with_kid(1, **{"metric sources": {"kid": "stratified"}})
    assert metric_identities(old) == {"kid": "kid"}
    assert metric_identities(new) == {"kid": "kid stratified"}
    assert len(group([old, new])) == 2
    assert len(group([new, with_kid(2, **{"metric sources": {"kid": "stratified"}})])) == 1
