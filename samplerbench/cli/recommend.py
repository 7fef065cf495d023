"""`samplerbench recommend`: the settings to use for a model within a number of evaluations or a time per image."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samplerbench.cli import common
from samplerbench.cli.numbers import parse_batch_size, parse_budget, parse_time
from samplerbench.errors import Stopped, UserError
from samplerbench.limits import MAX_BATCH, MAX_EVALUATIONS, MAX_IMAGES, MAX_REPEATS, MAX_SEED, MAX_STEPS
from samplerbench.text import console, literal, note, print_json, say

if TYPE_CHECKING:
    from samplerbench.tuning.recommend import Recommendation, Source

DEFAULT_SECONDS = 600.0
"""Time of a search without a limit."""


def recommend(
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="Time per image: `300ms` or `1.5s`, at the batch size of --batch-size."),
    ] = None,
    nfe: Annotated[
        int | None,
        typer.Option(
            "--nfe", min=1, max=MAX_STEPS, help="Network evaluations per image, in place of a time per image."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, max=MAX_BATCH, help="Images per batch in production.")
    ] = 1,
    metric: Annotated[
        str,
        typer.Option(
            "--metric", help="Metric to improve, with optional parameters.", autocompletion=common.complete("metric")
        ),
    ] = "fid",
    sampler: common.Samplers = [],  # noqa: B006 - Typer copies it
    guidance: common.Guidances = [],  # noqa: B006 - Typer copies it
    spacing: Annotated[
        list[str],
        typer.Option(
            "--spacing",
            help="Spacing that a search tries besides the default one. Can be repeated. Default: all except learned "
            "ones.",
            autocompletion=common.complete("spacing"),
        ),
    ] = [],  # noqa: B006 - Typer copies it
    search: Annotated[
        bool | None,
        typer.Option(
            "--search/--no-search",
            help="Always search, or use only results in OUT. Default: search if the results do not suffice.",
        ),
    ] = None,
    time: Annotated[
        str | None, typer.Option("--time", help="Time of the search: `90s`, `30m`, `2h`. Default: 10m.")
    ] = None,
    evaluations: Annotated[
        int | None,
        typer.Option(
            "--evaluations",
            min=1,
            max=MAX_EVALUATIONS,
            help="Network evaluations of the search, summed over images, in place of a time.",
        ),
    ] = None,
    model: common.ModelName = "digits",
    revision: common.Revision = None,
    variant: common.Variant = None,
    prompts: common.Prompts = None,
    prompt: common.Prompt = [],  # noqa: B006
    negative_prompt: common.NegativePrompt = None,
    offline: common.Offline = False,
    labels: common.Labels = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n", min=1, max=MAX_IMAGES, help="Images per seed or block. Default: that of the results, else 200."
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option("--features", help="Feature extractor of the metric. Default: the model's."),
    ] = None,
    features_weights: Annotated[
        str | None, typer.Option("--features-weights", help="File with the extractor's weights.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Real images or reference statistics. Default: the training data of the model."),
    ] = None,
    seed: common.Seed = 0,
    repeats: Annotated[
        int,
        typer.Option("--repeats", min=1, max=MAX_REPEATS, help="Measured batches of each latency, as in `latency`."),
    ] = 20,
    sampling_batch_size: Annotated[
        str,
        typer.Option("--sampling-batch-size", help="Images per batch while the metric is measured, or `auto`."),
    ] = "256",
    dtype: common.Dtype = "fp32",
    device: common.Device = "auto",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder with results of `run`, `tune` and `latency`; also for new ones.")
    ] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print only a JSON object.")] = False,
) -> None:
    """Recommend a sampler, its parameters, a spacing and a guidance scale within a time or a number of evaluations.

    Results and latencies in OUT are used if enough of them have the same protocol; otherwise candidates are searched as
    by `tune`. The winner is measured again on images that were not used to choose it, next to the best default row. If
    they cannot be told apart, the default row is recommended. OUT also has the result as recommended.json, a suite
    (recommended.toml), a program (recommended.py) and a plot (recommended.png).

    A search requires Optuna: `pip install 'samplerbench[tune]'`.

    Examples:

    `samplerbench recommend --model digits --nfe 8`

    `samplerbench recommend --model digits --budget 300ms --batch-size 16 --time 5m`

    `samplerbench recommend --model digits --nfe 8 --guidance cfg --out results --json`
    """
    from samplerbench.bench.request import Request
    from samplerbench.report.plots import render
    from samplerbench.results.files import write_atomically
    from samplerbench.results.store import RECOMMENDED_FILE, Store
    from samplerbench.tuning.output import recommendation_figure, suite
    from samplerbench.tuning.recommend import Budget
    from samplerbench.tuning.recommend import recommend as choose
    from samplerbench.tuning.search import FRESH_OFFSET, Limit
    from samplerbench.tuning.space import Space, all_specs

    if (budget is None) == (nfe is None):
        raise UserError("give a budget: a time per image, --budget 300ms, or a number of evaluations, --nfe 8.")
    if time is not None and evaluations is not None:
        raise UserError("--time and --evaluations cannot be combined; use one of them.")
    if search is False and (time is not None or evaluations is not None):
        raise UserError("--no-search cannot be combined with --time or --evaluations.")
    if seed + 2 * FRESH_OFFSET > MAX_SEED:
        raise UserError(f"--seed {seed}: it must be at most {MAX_SEED - 2 * FRESH_OFFSET}.")
    allowed = Budget(nfe, None if budget is None else parse_budget(budget), batch_size, repeats)
    seconds = None if evaluations is not None else DEFAULT_SECONDS if time is None else parse_time(time)
    source: Source = "auto" if search is None else "search" if search else "results"
    watch = common.Interrupts(as_json)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # plugins may print
        space = Space(
            tuple(dict.fromkeys(sampler)) or tuple(all_specs("sampler")),
            tuple(dict.fromkeys(spacing)) or tuple(all_specs("spacing")),
            tuple(None if g == "none" else g for g in dict.fromkeys(guidance)) or (None,),
        )
        guidances = [g or "none" for g in space.guidances]
        request = Request(
            [common.grid(list(space.samplers[:1]), None, str(nfe or 8), guidances, None)],
            model=model,
            labels=labels,
            n=n,
            batch_size=parse_batch_size(sampling_batch_size),
            dtype=dtype,
            metrics=[metric],
            features=features,
            features_weights=features_weights,
            data=data,
            revision=revision,
            variant=variant,
            prompts=common.one_of_prompts(prompt, prompts),
            negative_prompt=negative_prompt,
            offline=offline,
        )
        try:
            with watch:
                found = choose(
                    request,
                    device,
                    Store(out),
                    space,
                    allowed,
                    source=source,
                    named=bool(sampler),
                    seed=seed,
                    limit=Limit(evaluations, seconds),
                    stop=watch.requested,
                    say=note,
                )
        except (KeyboardInterrupt, Stopped):
            note(f"stopped; what was measured is kept in {out}/. Run the same command to go on.")
            raise typer.Exit(130) from None
    result: dict[str, Any] = found.as_dict()
    text = suite(found.request, [found], found.n, seed + FRESH_OFFSET, "recommended")
    write_atomically(out / RECOMMENDED_FILE, f"{json.dumps(result, indent=2, ensure_ascii=False)}\n".encode())
    write_atomically(out / "recommended.toml", text.encode())
    write_atomically(out / "recommended.py", found.code.lines.encode())
    write_atomically(out / "recommended.png", render(recommendation_figure(found), "png"))
    if as_json:
        print_json(result)
        return
    _show(found)
    say(result["verdict"])
    say("")
    say(f"{found.code.line}  # {found.code.imports}; num_inference_steps={found.choice.steps}")
    say(f"ComfyUI: {found.elsewhere.text}")
    say(f"{out / 'recommended.py'} is a program, {out / 'recommended.png'} a plot.", error=True)


def _show(found: Recommendation) -> None:
    from rich.table import Table

    title = f"{found.metric} on images that were not used to choose; {found.protocol}"
    table = Table(title=literal(title, "bold"), title_justify="left")
    timed = found.milliseconds is not None
    for head in ("row", "sampler", "spacing", "steps", "NFE", *(["ms per image"] if timed else []), found.metric):
        table.add_column(head, overflow="fold", justify="left" if head in ("row", "sampler", "spacing") else "right")
    rows = [("winner", found.winner, 0)]
    if found.best_default.candidate != found.winner.candidate:
        rows.append(("best default", found.best_default, 1))
    for name, row, place in rows:
        guided = f" + {row.candidate.guidance}" if row.candidate.guidance else ""
        cells: list[Any] = [name, literal(row.candidate.sampler + guided), literal(row.spacing or "own")]
        cells += [str(row.steps), f"{row.evaluations:g}"]
        cells += [f"{found.milliseconds[place]:.3g}"] if found.milliseconds is not None else []
        table.add_row(*cells, f"{row.fresh.value:.4g} ± {row.fresh.high - row.fresh.value:.2g}")
    console().print(table)
