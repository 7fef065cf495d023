"""The Fréchet distance: time and error of five ways to compute it, at 64, 768 and 2048 features.

    python benchmarks/frechet.py                       # about 4 minutes on two slow cores
    python benchmarks/frechet.py --dims 64,768 --repeats 3

Errors are relative to a value known to many digits: covariances that commute, Σ₁ = Q diag(a) Qᵀ and
Σ₂ = Q diag(b) Qᵀ, have tr (Σ₁Σ₂)^½ = Σ √(ab); at 64 features there are also two that do not commute, in 50-digit
arithmetic. `few` is the distance of d/4 images, whose covariance is singular. The ways: samplerbench, with the
reference's factor made anew or kept (as it is for every cell of a table but the first); torch-fidelity's own function,
which takes numpy's eigenvalues of Σ₁Σ₂; scipy's `sqrtm` of it, as pytorch-fid and others do; torch's eigenvalues of it.
The moments are given, so what is timed is the distance alone. Every method gets the same arrays and threads.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timing

PEERS = ("torch-fidelity", "scipy sqrtm", "eigvals")
OURS = ("samplerbench", "samplerbench, factor kept")


@dataclass
class Problem:
    """Two sides, (mean, covariance, n) as numpy arrays, and the distance between them."""

    name: str
    d: int
    sides: list[tuple[Any, Any, int]]
    exact: float


def commuting(d: int, n: int) -> Problem:
    """Spectra that fall like those of image features, 1/k and 1/k^1.5, in one random basis; n images on one side."""
    import numpy as np

    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.standard_normal((d, d)))[0]
    k = np.arange(1, d + 1)
    a, b = 1.0 / k, 1.5 / k**1.5
    a[max(0, n - 1) :] = 0
    shift = random.standard_normal(d) * 0.1 / np.sqrt(d)
    covariances = []
    for values in (a, b):
        product = (basis * values) @ basis.T
        covariances.append((product + product.T) / 2)
    exact = float(shift @ shift + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum())
    sides = [(shift, covariances[0], n), (np.zeros(d), covariances[1], 50_000)]
    return Problem("few" if n <= d else "full rank", d, sides, exact)


def random_pair(d: int) -> Problem:
    """Two covariances of random vectors, which do not commute; the distance in 50-digit arithmetic."""
    import mpmath
    import numpy as np

    random = np.random.default_rng(1)
    sides = []
    for n in (10 * d, 8 * d):
        vectors = random.standard_normal((n, d)) / np.arange(1, d + 1) @ random.standard_normal((d, d))
        covariance = np.cov(vectors, rowvar=False)
        sides.append((vectors.mean(axis=0), (covariance + covariance.T) / 2, n))
    with mpmath.workdps(50):
        (m1, c1, _), (m2, c2, _) = ((m.tolist(), mpmath.matrix(c.tolist()), n) for m, c, n in sides)
        factor = mpmath.cholesky(c2)
        values = mpmath.eigsy(factor.T * c1 * factor, eigvals_only=True)
        exact = sum((mpmath.mpf(p) - mpmath.mpf(q)) ** 2 for p, q in zip(m1, m2, strict=True))
        exact += sum(c1[i, i] + c2[i, i] for i in range(d)) - 2 * sum(mpmath.sqrt(v) for v in values)
        return Problem("not commuting", d, sides, float(exact))


def ways(problem: Problem) -> dict[str, Callable[[], float]]:
    """Each method as a call without arguments that returns the distance."""
    import numpy as np
    import torch
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    from samplerbench.metrics import Moments
    from samplerbench.metrics.frechet import frechet_distance

    (m1, c1, n1), (m2, c2, _) = problem.sides
    given = [Moments.from_statistics(torch.from_numpy(m), torch.from_numpy(c), n) for m, c, n in problem.sides]
    statistics_of = [{"mu": m, "sigma": c} for m, c, _ in problem.sides]
    rest = float((m1 - m2) @ (m1 - m2) + np.trace(c1) + np.trace(c2))

    def fresh() -> float:
        sides = [Moments.from_statistics(m.mean, m.covariance, m.n) for m in given]
        return frechet_distance(sides[0], sides[1])

    def kept() -> float:
        return frechet_distance(Moments.from_statistics(given[0].mean, given[0].covariance, n1), given[1])

    def root() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy warns of a singular product
            return rest - 2 * float(np.trace(sqrtm(c1.dot(c2))).real)

    def eigenvalues() -> float:
        values = torch.linalg.eigvals(torch.from_numpy(c1) @ torch.from_numpy(c2))
        return rest - 2 * float(values.sqrt().real.sum())

    return {
        "samplerbench": fresh,
        "samplerbench, factor kept": kept,
        "torch-fidelity": lambda: fid_statistics_to_metric(*statistics_of, False)[KEY_METRIC_FID],
        "scipy sqrtm": root,
        "eigvals": eigenvalues,
    }


def measure(problem: Problem, repeats: int, without: set[str]) -> list[timing.Row]:
    """One row per method."""
    jobs = {name: job for name, job in ways(problem).items() if name not in without}
    found = {name: job() for name, job in jobs.items()}  # their first runs, which are not timed
    seconds = timing.alternate(jobs, repeats)
    rows = []
    for name in jobs:
        of = [ours for ours in OURS if name in PEERS and ours in jobs]
        speedup = {ours: timing.ratios(seconds[name], seconds[ours])["median"] for ours in of}
        rows.append(
            {
                "problem": problem.name,
                "d": problem.d,
                "method": name,
                "seconds": statistics.median(seconds[name]),
                "all_seconds": seconds[name],
                "error": abs(found[name] - problem.exact) / problem.exact,
                "times_samplerbench": speedup,
            }
        )
    return rows


def main() -> None:
    """Run the measurement and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", default="64,768,2048")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="number of threads; default: one per core")
    parser.add_argument("--without", default="", help=f"comma-separated methods to omit: {', '.join(PEERS)}")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    threads = timing.set_threads(chosen.threads)
    import torch

    torch.set_num_threads(threads)
    without = {name.strip() for name in chosen.without.split(",")}
    rows: list[timing.Row] = []
    about = timing.environment(threads=threads, repeats=chosen.repeats)
    for d in map(int, chosen.dims.split(",")):
        problems = [commuting(d, 50_000), commuting(d, d // 4)] + ([random_pair(d)] if d <= 64 else [])
        for problem in problems:
            # sqrtm of a singular matrix of that size takes minutes, and what it gives is known to be no number.
            slow = {"scipy sqrtm"} if d > 768 and problem.name == "few" else set()
            rows += measure(problem, chosen.repeats, without | slow)
            print(f"# {d} features, {problem.name}: done", flush=True)
            timing.keep(chosen.json, "frechet", about, rows)
    print(f"\n{about['device']}; {threads} threads; medians of {chosen.repeats} alternating runs; {about['date']}\n")
    head = ["features", "problem", "method", "ms", "relative error", "× samplerbench", "× factor kept"]
    lines = []
    for r in rows:
        times = [f"{r['times_samplerbench'][o]:.2f}" if o in r["times_samplerbench"] else "" for o in OURS]
        lines.append([r["d"], r["problem"], r["method"], f"{1000 * r['seconds']:.2f}", f"{r['error']:.1e}", *times])
    print(timing.table(lines, head))


if __name__ == "__main__":
    main()
