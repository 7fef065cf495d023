"""Compare two runs that share one folder with a single run: time, and whether a cell runs twice.

python benchmarks/sharing.py --repeats 3           # one thread a run, alternating

Prints wall time of two runs together over one alone; with a core for each it is about a half, and never above one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CELLS = ["-s", "ddim", "-s", "ddpm", "-s", "heun", "-s", "dpm++", "--steps", "10,20", "--n", "300"]


def run(count: int) -> tuple[float, int, int]:
    """(seconds, results, cells done) of `count` runs started together on one new folder."""
    with tempfile.TemporaryDirectory() as out:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "samplerbench", "run", *CELLS, "--device", "cpu", "--out", out]
        begun = time.monotonic()
        runs = [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
            for _ in range(count)
        ]
        if any(r.wait() for r in runs):
            raise SystemExit("a run failed")
        seconds = time.monotonic() - begun
        lines = (Path(out) / "run.log").read_text("utf-8").splitlines()
        done = sum("from an earlier run" not in line for line in lines)
        return seconds, len(list(Path(out).glob("*.json"))), done


def main() -> None:
    """Run the measurement and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    ratios = []
    for _ in range(chosen.repeats):
        alone, results, done = run(1)
        together, results2, done2 = run(2)
        ratios.append(together / alone)
        print(
            f"one run: {alone:.1f} s, {results} results, {done} cells done; two together: {together:.1f} s, "
            f"{results2} results, {done2} cells done; ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
