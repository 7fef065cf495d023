"""Measure by how much the best value of a search of `samplerbench tune` is too good.

python benchmarks/tune_bias.py --out runs/tune-bias                     # 20 tunes of digits at 5, 8 and 10 evaluations
python benchmarks/tune_bias.py --model exact:mixture,shape=1x2x2 --metric gap --n 8 --nfe 4 --tunes 5 \
    -s ddim -s ipndm --spacing logsnr --evaluations 3000 --out runs/tune-bias-small      # to try it: seconds

Tune k has the seeds 100k to 100k + 7 in its search, and 1,000,000 + 100k in its last measurement, so no two tunes
share noise. The winner's value in the search is compared with its value in the last measurement. Both are means over 8
sets of n images, so both have the same bias of the metric itself, and the mean difference is the bias of the search.
Printed for each budget:

    search − fresh   mean over the tunes of (value in the search - fresh value), ± its standard error
    below            share of the tunes in which the search's value is better than the fresh 95% interval
    gain in search   by how much the winner is better than the best default row, in the search
    gain, fresh      the same in the last measurement (paired), ± its standard error
    same choice      number of tunes with the most frequent winner

An interrupted run continues with the same command. With --table, only what is stored is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samplerbench.bench.request import Request, one_grid
from samplerbench.results.files import write_atomically
from samplerbench.results.store import Store
from samplerbench.tuning.arena import Arena
from samplerbench.tuning.search import FRESH_OFFSET, Limit, tune
from samplerbench.tuning.space import Space

SAMPLERS = ["ddim", "dpm++", "unipc", "deis", "ipndm"]
SPACINGS = ["karras", "logsnr", "trailing"]
SPREAD = 100
"""Distance of the first seeds of two tunes. The last one must stay below the seeds of the last measurements."""


def main() -> None:
    """Run the tunes that are not stored yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--metric", default="fid")
    parser.add_argument("--nfe", default="5,8,10")
    parser.add_argument("--tunes", type=int, default=20)
    parser.add_argument("--evaluations", type=float, default=100_000, help="evaluations of the search of one budget")
    parser.add_argument("--n", type=int, default=100, help="images per seed")
    parser.add_argument("--sampler", "-s", action="append")
    parser.add_argument("--spacing", action="append")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("tune-bias"))
    parser.add_argument("--table", action="store_true", help="print what is stored, and measure nothing")
    chosen = parser.parse_args()
    if not 1 <= chosen.tunes <= FRESH_OFFSET // SPREAD:
        parser.error(f"--tunes must be between 1 and {FRESH_OFFSET // SPREAD}")
    budgets = [int(part) for part in chosen.nfe.split(",")]
    names = ("model", "metric", "evaluations", "n")
    settings: dict[str, Any] = {name: getattr(chosen, name) for name in names}
    settings |= {"samplers": chosen.sampler or SAMPLERS, "spacings": chosen.spacing or SPACINGS}
    tunes = read(chosen.out / "tunes.json", settings)
    if not chosen.table:
        try:
            measure(chosen, settings, budgets, tunes)
        except KeyboardInterrupt:
            print("interrupted; the same command continues", file=sys.stderr)
    show(settings, budgets, tunes)


def read(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The results that are stored: "SEED NFE" → the JSON of a tune."""
    if not file.is_file():
        return {}
    stored = json.loads(file.read_text(encoding="utf-8"))
    if stored["settings"] != settings:
        raise SystemExit(f"{file} has other settings: {json.dumps(stored['settings'])}; choose another --out")
    return dict(stored["tunes"])


def measure(chosen: argparse.Namespace, settings: dict[str, Any], budgets: list[int], tunes: dict[str, Any]) -> None:
    """Run the tunes that are not in `tunes`, and write each one into the folder when it is finished."""
    planned = [(k * SPREAD, nfe) for k in range(chosen.tunes) for nfe in budgets]
    missing = [(seed, nfe) for seed, nfe in planned if f"{seed} {nfe}" not in tunes]
    if not missing:
        return
    samplers, spacings = settings["samplers"], settings["spacings"]
    request = Request(
        [one_grid([samplers[0]], nfe=budgets)], model=chosen.model, metrics=[chosen.metric], n=chosen.n, batch_size=256
    )
    arena = Arena(request, chosen.device, Store(chosen.out / "cells"))
    space = Space(tuple(samplers), tuple(spacings))
    for number, (seed, nfe) in enumerate(missing, 1):
        start = time.monotonic()
        result = tune(arena, space, nfe, seed, Limit(evaluations=chosen.evaluations)).as_dict()
        tunes[f"{seed} {nfe}"] = result
        text = json.dumps({"settings": settings, "tunes": tunes}, indent=1, ensure_ascii=False)
        write_atomically(chosen.out / "tunes.json", f"{text}\n".encode())
        line = f"{number} of {len(missing)}: seed {seed}, {nfe} evaluations: {_name(result)}, {result['tried']} tried"
        print(f"{line}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def show(settings: dict[str, Any], budgets: Sequence[int], tunes: dict[str, Any]) -> None:
    """Print a Markdown table with one row per budget."""
    print(json.dumps(settings))
    print("| NFE | tunes | tried | fresh value | search − fresh | below | gain in search | gain, fresh | same choice |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for nfe in budgets:
        made = [result for result in tunes.values() if result["nfe"] == nfe]
        if len(made) < 2:
            print(f"| {nfe} | {len(made)} | | | | | | | |")
            continue
        sign = 1 if made[0]["better"] == "lower" else -1
        bias = [result["search_best"] - result["fresh"]["value"] for result in made]
        below = [
            result["search_best"] < result["fresh"]["low"]
            if sign == 1
            else result["search_best"] > result["fresh"]["high"]
            for result in made
        ]
        searched = [sign * (result["best_default"]["search"] - result["search_best"]) for result in made]
        fresh = [-sign * result["difference"]["value"] for result in made]
        most = Counter(map(_name, made)).most_common(1)[0][1]
        tried = statistics.fmean(result["tried"] for result in made)
        value = statistics.fmean(result["fresh"]["value"] for result in made)
        print(
            f"| {nfe} | {len(made)} | {tried:.0f} | {value:.4g} | {_mean(bias)} | {sum(below)} of {len(made)} "
            f"| {_mean(searched)} | {_mean(fresh)} | {most} |"
        )


def _name(result: dict[str, Any]) -> str:
    return f"{result['winner']['sampler']}, {result['winner']['spacing']}"


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3g} ± {statistics.stdev(values) / math.sqrt(len(values)):.2g}"


if __name__ == "__main__":
    main()
