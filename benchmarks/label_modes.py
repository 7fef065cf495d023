"""Measure every metric on real images, with every --labels mode.

python benchmarks/label_modes.py                   # n = 200, 500 and 1536, 60 repeats

Real digits take the place of generated ones, drawn as --labels says: `balanced` (the number of each class is fixed),
`none` (independent draws), `3` (one class). Each metric is shown beside its truth, and KID and FID∞ also as they are
when balanced labels are taken for independent draws.

KID is measured against digits that were not drawn; its truth is that of the two sets of classes, from all digits. For
the other metrics one half of the digits is the population, drawn from with replacement, and the other half is the
reference; the truth of FID∞ is the Fréchet distance of the population itself.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from samplerbench.bench.labels import make_labels
from samplerbench.data import load_data
from samplerbench.metrics.extractors import load_extractor
from samplerbench.metrics.fid_infinity import FIDInfinity, extrapolate
from samplerbench.metrics.frechet import frechet_distance
from samplerbench.metrics.kernel import squared_mmd
from samplerbench.metrics.manifold import coverage
from samplerbench.metrics.moments import Moments

MODES = ("balanced", "none", "3")


def main() -> None:
    """Run the measurement and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[200, 500, 1536])
    parser.add_argument("--repeats", type=int, default=60)
    chosen = parser.parse_args()
    data = load_data("digits")
    assert data.labels is not None
    features = load_extractor("digits-cnn", torch.device("cpu"))(data.images).double()
    counts, labels = data.class_counts(), data.labels
    print(f"{'labels':<9} {'n':>4}  {'metric':<34} {'mean':>9}   {'error':>7}  {'sd':>7}   {'truth':>8}")
    for n in chosen.n:
        for mode in MODES:
            rng = np.random.default_rng(0)
            wanted = make_labels(mode, n, 10, counts)
            for name, found, truth in [
                *kid(features, labels, wanted, mode, n, chosen.repeats, rng),
                *others(features, labels, wanted, mode, n, chosen.repeats, rng),
            ]:
                mean, deviation = np.mean(found), np.std(found, ddof=1)
                error = deviation / math.sqrt(len(found))
                shown = "" if truth is None else f"{truth:8.3f}"
                print(f"{mode:<9} {n:4d}  {name:<34} {mean:9.3f} ± {error:7.3f}  {deviation:7.3f}   {shown}")


Found = Iterator[tuple[str, list[float], float | None]]


def kid(
    features: Tensor, labels: Tensor, wanted: Tensor | None, mode: str, n: int, repeats: int, rng: np.random.Generator
) -> Found:
    """KID of drawn digits against those that were not drawn, each of two classes' pairs known from all digits."""
    stratified, plain, errors = [], [], []
    truth = 0.0
    # Of one class there are fewer images than may be asked for.
    for _ in range(repeats if mode != "3" or n < int((labels == 3).sum()) - 1 else 0):
        drawn = draw(labels, wanted, n, rng, replace=False)
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[drawn] = False
        x, y = features[drawn], features[rest].clone()
        plain.append(squared_mmd(x, y)[0])
        if mode == "balanced":
            value, error = squared_mmd(x, y, labels=wanted, real_labels=labels[rest])
            stratified.append(value)
            errors.append(error)
        if mode != "none":
            truth = mmd_of_classes(features, labels, labels[drawn], labels[rest], mode == "balanced")
    if not plain:
        return
    if mode == "balanced":
        yield "kid", stratified, truth
        yield "  its standard_error", errors, None
        yield "  taken for independent draws", plain, truth
    else:
        yield "kid", plain, truth


def others(
    features: Tensor, labels: Tensor, wanted: Tensor | None, mode: str, n: int, repeats: int, rng: np.random.Generator
) -> Found:
    """FID, FID∞, precision and recall of draws from one half of the digits against the other."""
    first = torch.zeros(len(labels), dtype=torch.bool)
    for a in range(10):
        own = (labels == a).nonzero()[:, 0]
        first[own[: len(own) // 2]] = True
    population, classes, real = features[first], labels[first], features[~first]
    reference = Moments.of(real)
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        x = population[draw(classes, wanted, n, rng, replace=True)]
        values = {"fid": frechet_distance(Moments.of(x), reference)}
        if n >= FIDInfinity.min_images_per_feature * features.shape[1]:
            values["fid-inf"] = extrapolate(x, reference, 15, wanted if mode == "balanced" else None)[0]
            if mode == "balanced":
                values["  taken for independent draws"] = extrapolate(x, reference, 15)[0]
        values |= {"precision": coverage(x, real, 3), "recall": coverage(real, x, 3)}
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    truth = frechet_distance(of_population(population, classes, wanted), reference)
    for name, values in found.items():
        yield name, values, truth if name in ("fid-inf", "  taken for independent draws") else None


def draw(labels: Tensor, wanted: Tensor | None, n: int, rng: np.random.Generator, replace: bool) -> Tensor:
    """The numbers (n,) of drawn images, with the wanted labels (n,), or of any label."""
    if wanted is None:
        return torch.from_numpy(rng.choice(len(labels), n, replace))
    drawn = torch.empty(n, dtype=torch.int64)
    for a in wanted.unique():
        places = (wanted == a).nonzero()[:, 0]
        drawn[places] = torch.from_numpy(rng.choice((labels == a).nonzero()[:, 0].numpy(), len(places), replace))
    return drawn


def of_population(features: Tensor, labels: Tensor, wanted: Tensor | None) -> Moments:
    """The moments of the distribution that is drawn from: the population with the classes' shares that are wanted."""
    weights = torch.ones(len(labels), dtype=torch.float64)
    if wanted is not None:
        shares = torch.bincount(wanted, minlength=10) / torch.bincount(labels, minlength=10)
        weights = shares[labels].double()
    weights /= weights.sum()
    mean = weights @ features
    centred = features - mean
    return Moments.from_statistics(mean, centred.T @ (weights[:, None] * centred), None)


def mmd_of_classes(features: Tensor, labels: Tensor, ours: Tensor, real: Tensor, stratified: bool) -> float:
    """The squared MMD of two sets with these labels, of digits that are drawn without replacement from their classes.

    stratified: the classes' shares of the real ones are those shares; else the real ones are independent draws, whose
    expectation under the ordinary estimator is the truth.
    """
    one_hot = torch.nn.functional.one_hot(labels, 10).double()
    kernel = (features @ features.T / features.shape[1] + 1) ** 3
    kernel.fill_diagonal_(0)
    sizes = one_hot.sum(0)
    means = (one_hot.T @ kernel @ one_hot) / (sizes[:, None] * sizes - sizes.diag())
    w, v = (torch.bincount(x, minlength=10).double() / len(x) for x in (ours, real))
    within = v @ means @ v
    if not stratified:
        m = len(real)
        within = (m * within - v @ means.diagonal()) / (m - 1)
    return float(w @ means @ w + within - 2 * w @ means @ v)


if __name__ == "__main__":
    main()
