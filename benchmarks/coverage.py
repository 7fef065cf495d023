"""Measure the coverage of the intervals in results.

python benchmarks/coverage.py                      # 20 repeats of ddim, 10 steps, 5 blocks of 200 images
python benchmarks/coverage.py --metric fid-inf     # 60 repeats of features whose FID∞ is known, n = 1536
python benchmarks/coverage.py --metric kid         # the same for KID, n = 300

Without --metric, each repeat runs one real cell with a seed of its own, and forms Student's 95% interval from its
blocks. The truth is the mean over all other repeats, whose own error (small beside the interval's) is in the figure
too.

With --metric fid-inf or kid, each repeat draws n feature vectors and forms the interval value ± 1.96 standard_error.
They are Gaussian, and the truth is a closed form; for FID∞ they are also digits' features, with replacement from one
half of the digits against the other, without labels and with balanced ones; the truth is that of the half itself.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from label_modes import draw, of_population
from scipy.stats import binom, t
from torch import Tensor

from samplerbench.bench import engine, prepare, request
from samplerbench.bench.labels import balanced_labels
from samplerbench.data import load_data
from samplerbench.metrics.extractors import load_extractor
from samplerbench.metrics.fid_infinity import extrapolate
from samplerbench.metrics.frechet import frechet_distance
from samplerbench.metrics.kernel import squared_mmd
from samplerbench.metrics.moments import Moments
from samplerbench.results.store import Store


def main() -> None:
    """Run the measurement and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metric", choices=["fid", "fid-inf", "kid"], default="fid")
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--n", type=int)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--repeats", type=int)
    chosen = parser.parse_args()
    if chosen.metric == "fid":
        of_blocks(chosen.sampler, chosen.steps, chosen.n or 200, chosen.blocks, chosen.repeats or 20)
    elif chosen.metric == "fid-inf":
        of_standard_errors("fid-inf", chosen.n or 1536, chosen.repeats or 60)
    else:
        of_standard_errors("kid", chosen.n or 300, chosen.repeats or 60)


def of_standard_errors(metric: str, n: int, repeats: int) -> None:
    """Print the coverage of value ± 1.96 standard_error for each source of features."""
    print(f"{metric}, n = {n}, {repeats} repeats")
    for title, draw_one, measure, truth in (*gaussian(metric, n), *digits(metric, n)):
        pairs = [measure(draw_one(i)) for i in range(repeats)]
        values, errors = np.array(pairs).T
        covered = int((np.abs(values - truth) <= 1.96 * errors).sum())
        print(
            f"{title:<48} truth {truth:9.4f}, mean {values.mean():9.4f}, sd {values.std(ddof=1):8.4f}, standard error "
            f"{math.sqrt(np.mean(errors**2)):8.4f}; {covered} of {repeats} intervals of 95% cover the truth"
        )
    low, high = (int(binom.ppf(q, repeats, 0.95)) for q in (0.025, 0.975))
    print(f"A right interval covers {low} to {high} of {repeats} in 95 of 100 trials.")


Source = tuple[str, Callable[[int], Tensor], Callable[[Tensor], tuple[float, float]], float]


def gaussian(metric: str, n: int) -> list[Source]:
    """Gaussian vectors with d = 16 and 64, whose Fréchet distance to the reference is a closed form."""
    found: list[Source] = []
    for d, shift, scale in ((16, 0.3, 1.2), (64, 0.1, 1.1), (64, 0.0, 1.0)):
        variances = torch.linspace(0.2, 2, d, dtype=torch.float64)
        reference = Moments.from_statistics(torch.zeros(d), variances.diag(), None)
        truth = d * shift**2 + float(((scale - 1) ** 2 * variances).sum())

        def drawn(i: int, v: Tensor = variances, shift: float = shift, scale: float = scale) -> Tensor:
            return vectors(n, v, shift, scale, i)

        def of_line(x: Tensor, reference: Moments = reference) -> tuple[float, float]:
            return extrapolate(x, reference, 15)

        real_seeds = itertools.count(10**6)

        def of_kernel(x: Tensor, v: Tensor = variances, seeds: Iterator[int] = real_seeds) -> tuple[float, float]:
            # The real images are also redrawn: their share is in the standard error.
            return squared_mmd(x, vectors(4 * n, v, 0.0, 1.0, next(seeds)))

        title = f"Gaussian, d = {d}, shift {shift}, scale {scale}"
        if metric == "fid-inf":
            found.append((title, drawn, of_line, truth))
        else:
            found.append((title, drawn, of_kernel, kernel_distance(variances, shift, scale)))
    return found


def vectors(n: int, variances: Tensor, shift: float, scale: float, seed: int) -> Tensor:
    """Independent draws (n, d) from N(shift, scale²·variances)."""
    z = torch.randn(n, len(variances), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z * scale * variances.sqrt() + shift


def kernel_distance(variances: Tensor, shift: float, scale: float) -> float:
    """The squared MMD under (x·y/d + 1)³ between N(shift, scale²·v) and N(0, v), in closed form.

    With s = x·y/d of independent x, y: E (s + 1)³ = 1 + 3 E s + 3 E s² + E s³. For x ~ N(a, A), y ~ N(b, B) with
    diagonal A and B, s = Σ_i x_i y_i/d is a sum of independent terms, whose cumulants add.
    """
    d, zero = len(variances), torch.zeros_like(variances)
    one, two = (zero + shift, scale**2 * variances), (zero, variances)

    def expected(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> float:
        (a, A), (b, B) = x, y
        # The moments of a normal variable: m, m² + v, m³ + 3 m v.
        first = a * b
        second = (a**2 + A) * (b**2 + B)
        third = (a**3 + 3 * a * A) * (b**3 + 3 * b * B)
        k1, k2 = float(first.sum()) / d, float((second - first**2).sum()) / d**2
        k3 = float((third - 3 * first * second + 2 * first**3).sum()) / d**3
        return 1 + 3 * k1 + 3 * (k2 + k1**2) + k3 + 3 * k1 * k2 + k1**3

    return expected(one, one) + expected(two, two) - 2 * expected(one, two)


def digits(metric: str, n: int) -> list[Source]:
    """Draws with replacement from one half of the digits, against the other; without labels and with balanced ones."""
    data = load_data("digits")
    assert data.labels is not None
    features = load_extractor("digits-cnn", torch.device("cpu"))(data.images).double()
    one, two = torch.arange(0, len(features), 2), torch.arange(1, len(features), 2)
    population, classes, real = features[one], data.labels[one], features[two]
    reference = Moments.of(real)
    found: list[Source] = []
    for title, wanted in (("without labels", None), ("balanced labels", balanced_labels(n, data.class_counts()))):

        def drawn(i: int, wanted: Tensor | None = wanted) -> Tensor:
            return population[draw(classes, wanted, n, np.random.default_rng(i), replace=True)]

        def of_line(x: Tensor, wanted: Tensor | None = wanted) -> tuple[float, float]:
            return extrapolate(x, reference, 15, wanted)

        if metric == "fid-inf":
            truth = frechet_distance(of_population(population, classes, wanted), reference)
            found.append((f"digits {title}, d = {features.shape[1]}", drawn, of_line, truth))
    return found


def of_blocks(sampler: str, steps: int, n: int, blocks: int, count: int) -> None:
    """Print the coverage of Student's interval from the blocks of real cells."""
    asked = request.Request([request.Grid([sampler], [steps])], n=n, blocks=blocks, metrics=("fid",))
    prepared = prepare.prepare(asked, "cpu")
    measured = prepare.measure_reference(prepared)
    repeats: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1000, 1000 + count):
            session = prepare.make_session(prepared, measured, seed, Store(Path(folder)))
            outcome = engine.run_cell(session, prepared.cells[0])
            if outcome.error is not None:
                raise SystemExit(str(outcome.error))
            repeats.append(outcome.record["metrics"]["fid"]["blocks"])
    covered = 0
    factor = float(t.ppf(0.975, blocks - 1)) / math.sqrt(blocks)
    for i, own in enumerate(repeats):
        truth = statistics.fmean(v for j, other in enumerate(repeats) if j != i for v in other)
        mean, half = statistics.fmean(own), factor * statistics.stdev(own)
        inside = abs(mean - truth) <= half
        covered += inside
        print(f"repeat {i + 1:2d}: {mean:.3f} ± {half:.3f}, long-run mean {truth:.3f}{'' if inside else '  outside'}")
    low, high = (int(binom.ppf(q, count, 0.95)) for q in (0.025, 0.975))
    print(
        f"{covered} of {count} intervals of 95% cover the long-run mean; a right one covers {low} to {high} of them in "
        "95 of 100 trials."
    )


if __name__ == "__main__":
    main()
