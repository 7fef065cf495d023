"""Gap and FID of hand-made and learned schedules on the embedded networks, as in docs/schedules.md.

python benchmarks/schedules.py --models digits,digits-flow --out results/schedules

The table of a model has one row for each sampler and spacing, and one column for each number of evaluations. The images
and the noise of the measurement are those of seed 0; learned schedules are learned on other noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from samplerbench.bench.prepare import prepare
from samplerbench.bench.request import Grid, Request
from samplerbench.bench.run import Run
from samplerbench.results.store import Store

HAND_MADE = ("karras", "logsnr", "trailing", "linspace")
"""`exponential` has the same levels as `logsnr`."""
LEARNED = ("dmn", "gits", "gits:cost=l2", "gap-optimal")


def measure(args: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """The records of all cells of a model. One run measures them, so that the converged solution is computed once."""
    spacings = [*HAND_MADE, *args.learned]
    grid = Grid(args.samplers.split(","), [], [int(n) for n in args.nfe.split(",")], spacings=spacings)
    metrics = [args.gap, *(["fid"] if args.fid else [])]
    request = Request([grid], model=model, metrics=metrics, n=args.n, blocks=args.blocks)
    run = Run(prepare(request, "auto"), Store(Path(args.out)))
    run.run()
    return run.records


def value(record: dict[str, Any], metric: str) -> tuple[float, float]:
    """The mean and the standard deviation over the blocks of a metric whose name starts with `metric`."""
    entry = next(v for k, v in record["metrics"].items() if k.partition(":")[0] == metric)
    return entry["value"], entry.get("sd") or 0.0


def table(records: list[dict[str, Any]], metric: str) -> list[str]:
    """A Markdown table of a metric: mean ± standard deviation over the blocks."""
    budgets = sorted({r["budget"] for r in records})
    lines = [
        "| sampler | spacing | " + " | ".join(f"{b} NFE" for b in budgets) + " |",
        "| --- | --- | " + " | ".join("---:" for _ in budgets) + " |",
    ]
    for sampler in dict.fromkeys(r["sampler"] for r in records):
        for spacing in dict.fromkeys(r["spacing"] for r in records):
            cells = []
            for budget in budgets:
                one = [r for r in records if (r["sampler"], r["spacing"], r["budget"]) == (sampler, spacing, budget)]
                mean, deviation = value(one[0], metric)
                cells.append(f"{mean:.3g} ± {deviation:.1g}")
            lines.append(f"| `{sampler}` | `{spacing}` | " + " | ".join(cells) + " |")
    return lines


def ratios(model: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each sampler and number of evaluations: the gap of the best hand-made spacing, of gits and of gap-optimal."""
    found = []
    for sampler in dict.fromkeys(r["sampler"] for r in records):
        for budget in sorted({r["budget"] for r in records}):
            gaps = {
                r["spacing"]: value(r, "gap")[0] for r in records if (r["sampler"], r["budget"]) == (sampler, budget)
            }
            best = min(HAND_MADE, key=lambda s, gaps=gaps: gaps[s])
            found.append({"model": model, "sampler": sampler, "nfe": budget, "best": best, "hand_made": gaps[best]})
            found[-1] |= {"gits": min(value for spec, value in gaps.items() if spec.startswith("gits"))}
            found[-1] |= {"gap_optimal": next(value for spec, value in gaps.items() if spec.startswith("gap-optimal"))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="digits,digits-flow")
    parser.add_argument("--samplers", default="ddim,ipndm")
    parser.add_argument("--nfe", default="5,6,8,10")
    parser.add_argument("--n", type=int, default=300, help="images per block")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--gap", default="gap", help="the metric gap, with parameters")
    parser.add_argument("--fid", action="store_true", help="also the FID")
    parser.add_argument("--learned", nargs="+", default=LEARNED, help="learned spacings, the last one gap-optimal")
    parser.add_argument("--out", default="results/schedules")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in args.models.split(","):
        records = measure(args, model)
        rows += ratios(model, records)
        for metric in ("gap", "fid") if args.fid else ("gap",):
            print(f"\n{metric}, {model}, {args.blocks} blocks of {args.n} images\n")
            print("\n".join(table(records, metric)))
    half = sum(r["gap_optimal"] <= r["hand_made"] / 2 for r in rows)
    above = sum(r["gap_optimal"] > r["gits"] for r in rows)
    print("\n| model | sampler | NFE | best hand-made | its gap | gits | gap-optimal | ratio |")
    print("| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for r in rows:
        ratio = r["gap_optimal"] / r["hand_made"]
        numbers = f"{r['hand_made']:.3g} | {r['gits']:.3g} | {r['gap_optimal']:.3g} | {ratio:.2f}"
        print(f"| {r['model']} | `{r['sampler']}` | {r['nfe']} | `{r['best']}` | {numbers} |")
    print(f"\nat most half the gap: {half} of {len(rows)} cells; above gits: {above}")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    (Path(args.out) / "ratios.json").write_text(json.dumps(rows, indent=1), "utf-8")


if __name__ == "__main__":
    main()
