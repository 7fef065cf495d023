"""`samplerbench tune`: the best sampler, parameters, spacing and guidance scale for a model and a budget."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samplerbench.cli import common
from samplerbench.cli.numbers import parse_batch_size, parse_steps, parse_time
from samplerbench.errors import Stopped, UserError
from samplerbench.limits import MAX_EVALUATIONS, MAX_IMAGES, MAX_SEED
from samplerbench.text import console, literal, note, print_json, say

if TYPE_CHECKING:
    from samplerbench.tuning.search import Tuned

DEFAULT_SECONDS = 600.0
"""Time of a search without a limit, for all budgets together."""


def tune(
    nfe: Annotated[
        str, typer.Option("--nfe", help="Comma-separated budgets of network evaluations per image: `5,8,10`.")
    ] = "5,8,10",
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
            help="Spacing to try besides the default one. Can be repeated. Default: all except learned ones.",
            autocompletion=common.complete("spacing"),
        ),
    ] = [],  # noqa: B006 - Typer copies it
    time: Annotated[
        str | None,
        typer.Option("--time", help="Time of the search, for all budgets together: `90s`, `30m`, `2h`. Default: 10m."),
    ] = None,
    evaluations: Annotated[
        int | None,
        typer.Option(
            "--evaluations",
            min=1,
            max=MAX_EVALUATIONS,
            help="Network evaluations of the search, summed over images and budgets, in place of a time. The result "
            "then depends only on the options.",
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
        int,
        typer.Option("--n", min=1, max=MAX_IMAGES, help="Images per seed. A candidate is measured with 3 to 8 seeds."),
    ] = 200,
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
    batch_size: common.BatchSize = "256",
    dtype: common.Dtype = "fp32",
    compile: common.Compile = False,
    device: common.Device = "auto",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of results. A search with the same folder continues.")
    ] = Path("tuned"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print only a JSON object with one entry per budget.")
    ] = False,
) -> None:
    """Find the best sampler, parameters, spacing and guidance scale for a model at a number of evaluations.

    Candidates are proposed by Optuna and compared in races: few images first, with the same noise for all, and what is
    significantly worse than the best one is dropped. The winner is measured again on images that the search did not
    use, next to the best default row. OUT has the results of all cells, the result as tuned.json, a suite of the final
    rows as tuned.toml, and a plot as tuned.png.

    Requires Optuna: `pip install 'samplerbench[tune]'`.

    Examples:

    `samplerbench tune --model digits --nfe 5,8,10 --time 10m`

    `samplerbench tune --nfe 10 --guidance cfg --metric fid --evaluations 5000000`

    `samplerbench tune --nfe 6 --metric gap --sampler ipndm --sampler unipc --spacing karras --json`
    """
    from samplerbench.bench.request import Request
    from samplerbench.report.plots import render
    from samplerbench.results.files import write_atomically
    from samplerbench.results.store import TUNED_FILE, Store
    from samplerbench.tuning.arena import Arena
    from samplerbench.tuning.code import code_of, elsewhere, pipeline_of
    from samplerbench.tuning.output import search_figure, suite
    from samplerbench.tuning.search import FRESH_OFFSET, Limit
    from samplerbench.tuning.search import tune as search
    from samplerbench.tuning.space import Space, all_specs
    from samplerbench.tuning.words import named, verdict

    budgets = parse_steps(nfe, "--nfe", "5,8,10")
    if time is not None and evaluations is not None:
        raise UserError("--time and --evaluations cannot be combined; use one of them.")
    if seed + 2 * FRESH_OFFSET > MAX_SEED:
        raise UserError(f"--seed {seed}: it must be at most {MAX_SEED - 2 * FRESH_OFFSET}.")
    seconds = None if evaluations is not None else DEFAULT_SECONDS if time is None else parse_time(time)
    limit = Limit(
        None if evaluations is None else evaluations / len(budgets), None if seconds is None else seconds / len(budgets)
    )
    watch = common.Interrupts(as_json)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # plugins may print
        space = Space(
            tuple(dict.fromkeys(sampler)) or tuple(all_specs("sampler")),
            tuple(dict.fromkeys(spacing)) or tuple(all_specs("spacing")),
            tuple(None if g == "none" else g for g in dict.fromkeys(guidance)) or (None,),
        )
        request = Request(
            [common.grid(list(space.samplers[:1]), None, nfe, [g or "none" for g in space.guidances], None)],
            model=model,
            labels=labels,
            n=n,
            batch_size=parse_batch_size(batch_size),
            dtype=dtype,
            compile=compile,
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
        arena = Arena(request, device, Store(out), watch.requested)
        results: list[Tuned] = []
        try:
            with watch:
                results.extend(search(arena, space, budget, seed, limit, note) for budget in budgets)
        except (KeyboardInterrupt, Stopped):
            note(f"stopped; what was measured is kept in {out}/. Run the same command to go on.")
            raise typer.Exit(130) from None
    pipeline = pipeline_of(request, arena.model)
    codes = [code_of(tuned.winner, pipeline) for tuned in results]
    names = [elsewhere(tuned.winner, arena.model) for tuned in results]
    made: dict[str, Any] = {
        str(tuned.nfe): tuned.as_dict() | {"diffusers": code.as_dict(), "comfyui": name.as_dict()}
        for tuned, code, name in zip(results, codes, names, strict=True)
    }
    write_atomically(out / TUNED_FILE, f"{json.dumps(made, indent=2, ensure_ascii=False)}\n".encode())
    write_atomically(out / "tuned.toml", suite(arena.request, results, arena.n, seed + FRESH_OFFSET).encode())
    write_atomically(out / "tuned.png", render(search_figure(results, model), "png"))
    if as_json:
        print_json(made)
        return
    _show(results)
    for tuned in results:
        say(verdict(tuned))
        say("")
    for tuned, code, name in zip(results, codes, names, strict=True):
        say(f"{tuned.nfe} evaluations: {named(tuned.winner)}, in diffusers and in ComfyUI:")
        say(f"    {code.imports}")
        say(f"    {code.line}  # num_inference_steps={tuned.winner.steps}")
        say(f"    ComfyUI: {name.text}")
    say(f"{out / 'tuned.toml'}: `samplerbench run {out / 'tuned.toml'} --out {out}` shows the final rows.", error=True)


def _show(results: list[Tuned]) -> None:
    from rich.table import Table

    metric = results[0].metric
    table = Table(title=literal(f"{metric} on images that the search did not use", "bold"), title_justify="left")
    for head in ("NFE", "row", "sampler", "spacing", "steps"):
        table.add_column(head, overflow="fold", justify="right" if head in ("NFE", "steps") else "left")
    for head in (metric, "in the search", "tried"):
        table.add_column(head, justify="right")
    for tuned in results:
        rows = [("winner", tuned.winner)]
        if tuned.best_default.candidate != tuned.winner.candidate:
            rows.append(("best default", tuned.best_default))
        for place, (name, row) in enumerate(rows):
            guided = f" + {row.candidate.guidance}" if row.candidate.guidance else ""
            cells: list[Any] = [literal(row.candidate.sampler + guided), literal(row.spacing or "own"), str(row.steps)]
            value = f"{row.fresh.value:.4g} ± {row.fresh.high - row.fresh.value:.2g}"
            first = [str(tuned.nfe), str(tuned.tried)] if not place else ["", ""]
            table.add_row(first[0], name, *cells, value, f"{row.search:.4g}", first[1])
    console().print(table)
