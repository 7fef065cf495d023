"""Does the interval that a table's blocks give cover the long-run mean as often as it says?

python benchmarks/coverage.py                      # 20 repeats of ddim, 10 steps, 5 blocks of 200 images

Each repeat runs one real cell with a seed of its own, and forms Student's 95% interval from its blocks. The truth is
the mean over all other repeats, whose own error (small beside the interval's) is in the figure too.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path

from scipy.stats import binom, t

from samplerbench.bench import engine, request
from samplerbench.results.store import Store


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=20)
    chosen = parser.parse_args()
    asked = request.Request(
        [request.Grid([chosen.sampler], [chosen.steps])], n=chosen.n, blocks=chosen.blocks, metrics=("fid",)
    )
    prepared = request.prepare(asked, "cpu")
    measured = request.measure_reference(prepared)
    repeats: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1000, 1000 + chosen.repeats):
            session = request.make_session(prepared, measured, seed, Store(Path(folder)))
            outcome = engine.run_cell(session, prepared.cells[0])
            if outcome.error is not None:
                raise SystemExit(str(outcome.error))
            repeats.append(outcome.record["metrics"]["fid"]["blocks"])
    covered = 0
    factor = float(t.ppf(0.975, chosen.blocks - 1)) / math.sqrt(chosen.blocks)
    for i, blocks in enumerate(repeats):
        truth = statistics.fmean(v for j, other in enumerate(repeats) if j != i for v in other)
        mean, half = statistics.fmean(blocks), factor * statistics.stdev(blocks)
        inside = abs(mean - truth) <= half
        covered += inside
        print(f"repeat {i + 1:2d}: {mean:.3f} ± {half:.3f}, long-run mean {truth:.3f}{'' if inside else '  outside'}")
    low, high = (int(binom.ppf(q, chosen.repeats, 0.95)) for q in (0.025, 0.975))
    print(
        f"{covered} of {chosen.repeats} intervals of 95% cover the long-run mean; a right one covers {low} to {high} "
        "of them in 95 of 100 trials."
    )


if __name__ == "__main__":
    main()
