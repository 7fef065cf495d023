"""Measure the cost of a run against n, steps, batch size and processes, and its memory against n.

    python benchmarks/scaling.py                       # everything: about 6 minutes on two slow cores
    python benchmarks/scaling.py --part memory processes

Each figure is a whole `samplerbench run` of DDIM, as a process of its own. `sampling` is what the run itself reports,
without its start; `wall` and `peak` are of the process (with several processes, the peak is the largest one's). The two
ways to use the cores, one process with k threads and k processes with one thread each (through torchrun), take turns,
and the ratio is the median of the ratios of neighbours. Memory is measured on an exact problem, whose evaluations cost
little, and on the digits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timing

EXACT = ["--model", "exact:gaussian", "--features", "digits-cnn"]


def sample(
    options: Sequence[Any], threads: int, processes: int = 1, device: str = "cpu"
) -> tuple[timing.Cost, dict[str, Any]]:
    """One run: its cost, and its record."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        launcher = [sys.executable, "-m"]
        if processes > 1:
            several = ["--standalone", "--nproc-per-node", str(processes), "-m", "--"]
            launcher += ["torch.distributed.run", *several]
        command = [*launcher, "samplerbench", "run", "-s", "ddim", "--device", device, "--json", "--out", folder]
        limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        cost = timing.run_child([*command, *map(str, options)], out, limits)
        # What a launcher says of itself may stand before the list.
        return cost, json.loads(cost.output[cost.output.index("[\n") :])[0]


class Scaling:
    """The parts, each a list of rows."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        small = chosen.small
        self.n, self.steps = (40, 2) if small else (512, 10)
        self.lists = {
            "n": [20, 40] if small else [256, 512, 1024, 2048],
            "steps": [2, 4] if small else [5, 10, 20, 40],
            "batch size": [8, 40] if small else [16, 64, 256, 512],
            "memory": [50, 200] if small else [500, 2_000, 20_000],
        }
        self.shared = [40, 2] if small else [1024, 10]

    def row(self, part: str, value: Any, options: Sequence[Any], threads: int, processes: int = 1) -> timing.Row:
        """One run as a row."""
        cost, record = sample(options, threads, processes, self.chosen.device)
        row = {"part": part, "value": value, "threads": threads, "processes": processes, **cost.row()}
        row |= {
            key: record[key] for key in ("seconds", "metric_seconds", "nfe", "n", "batch_size", "images_per_second")
        }
        print(f"# {part} {value}: {row['seconds']:.2f} s of sampling, {row['wall']:.1f} s in all", flush=True)
        return row

    def axis(self, name: str) -> list[timing.Row]:
        """Cost against n, steps or batch size, the others fixed."""
        rows = []
        for value in self.lists[name]:
            of = {"n": self.n, "steps": self.steps, "batch size": 256} | {name: value}
            options = ["--n", of["n"], "--steps", of["steps"], "--batch-size", of["batch size"]]
            rows.append(self.row(name, value, options, self.chosen.threads))
        return rows

    def memory(self) -> list[timing.Row]:
        """Peak memory against n."""
        rows = []
        for value in self.lists["memory"]:
            options = ["--n", value, "--batch-size", 256]
            rows.append(self.row("memory, exact", value, [*EXACT, *options, "--steps", 2], self.chosen.threads))
        for value in self.lists["memory"][:2]:
            options = ["--n", value, "--batch-size", 256]
            rows.append(self.row("memory, digits", value, [*options, "--steps", 2], self.chosen.threads))
        return rows

    def processes(self) -> list[timing.Row]:
        """One process with all threads, and as many processes with one thread each, in turn."""
        k = max(2, self.chosen.threads)
        options = ["--n", self.shared[0], "--steps", self.shared[1], "--batch-size", 256]
        rows = []
        for repeat in range(self.chosen.repeats):
            for processes in (1, k) if repeat % 2 == 0 else (k, 1):
                threads = k // processes
                name = f"{processes} x {threads}"
                rows.append(self.row("processes", name, options, threads, processes) | {"repeat": repeat})
        return rows


def main() -> None:
    """Run the measurement and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["n", "steps", "batch", "processes", "memory"]
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument(
        "--repeats", type=int, default=5, help="repeats of the measurement with processes; the others run once"
    )
    parser.add_argument("--threads", type=int, help="number of threads; default: one per core")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="quick test with few images and steps")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    chosen.threads = timing.set_threads(chosen.threads)
    if chosen.small:
        chosen.repeats = min(chosen.repeats, 2)
    about = timing.environment(chosen.device, threads=chosen.threads)
    scaling = Scaling(chosen)
    made: dict[str, Callable[[], list[timing.Row]]] = {
        "n": lambda: scaling.axis("n"),
        "steps": lambda: scaling.axis("steps"),
        "batch": lambda: scaling.axis("batch size"),
        "processes": scaling.processes,
        "memory": scaling.memory,
    }
    rows: list[timing.Row] = []
    for part in chosen.part:
        rows += made[part]()
        timing.keep(chosen.json, "scaling", about, rows)
    show(rows, about)


def show(rows: list[timing.Row], about: timing.Row) -> None:
    """Print the table, and the ratio of the two ways to use the cores."""
    print(f"\n{about['device']}; {about['threads']} threads; {about['date']}\n")
    lines = []
    for part in dict.fromkeys(r["part"] for r in rows):
        of = [r for r in rows if r["part"] == part]
        for value in dict.fromkeys(r["value"] for r in of):
            same = [r for r in of if r["value"] == value]
            middle = {k: statistics.median(r[k] for r in same) for k in ("seconds", "wall", "cpu", "peak")}
            rate = statistics.median(r["n"] * r["nfe"] / r["seconds"] for r in same)
            lines.append(
                [
                    *(part, value, f"{middle['seconds']:.2f}", f"{middle['wall']:.1f}", f"{middle['cpu']:.1f}"),
                    *(timing.mebibytes(middle["peak"]), f"{rate:,.0f}"),
                ]
            )
    head = ["against", "value", "sampling, s", "wall, s", "processor, s", "peak, MiB", "evaluations/s"]
    print(timing.table(lines, head))
    shared = [r for r in rows if r["part"] == "processes"]
    if shared:
        alone = sorted((r for r in shared if r["processes"] == 1), key=lambda r: r["repeat"])
        several = sorted((r for r in shared if r["processes"] > 1), key=lambda r: r["repeat"])
        ratio = timing.ratios([r["seconds"] for r in alone], [r["seconds"] for r in several])
        print(
            f"work per second of {several[0]['value']} (processes x threads) over {alone[0]['value']}: "
            f"{ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['greatest']:.3f})"
        )


if __name__ == "__main__":
    main()
