"""`samplerbench schedule`: the noise levels of a spacing, learned or not, as a file for other programs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from samplerbench.cli import common
from samplerbench.errors import UserError
from samplerbench.text import console, literal, say


def schedule(
    spacing: Annotated[
        str,
        typer.Argument(help="Spacing: `gits`, `gap-optimal:images=128`.", autocompletion=common.complete("spacing")),
    ],
    sampler: Annotated[
        str,
        typer.Option(
            "--sampler",
            "-s",
            help="Sampler, with optional parameters: `ddim`.",
            autocompletion=common.complete("sampler"),
        ),
    ],
    nfe: Annotated[
        str | None,
        typer.Option("--nfe", help="Comma-separated budgets of network evaluations. Default: 5,6,8,10."),
    ] = None,
    steps: Annotated[
        str | None, typer.Option("--steps", help="Comma-separated numbers of steps, in place of --nfe.")
    ] = None,
    guidance: Annotated[
        str,
        typer.Option(
            "--guidance",
            "-g",
            help="Guidance that the levels are learned under. `none` disables guidance.",
            autocompletion=common.complete("guidance"),
        ),
    ] = "none",
    model: common.ModelName = "digits",
    revision: common.Revision = None,
    variant: common.Variant = None,
    prompts: common.Prompts = None,
    prompt: common.Prompt = [],  # noqa: B006
    negative_prompt: common.NegativePrompt = None,
    image_size: common.ImageSize = None,
    embedded_guidance: common.EmbeddedGuidance = None,
    memory: common.Memory = None,
    lora: common.Lora = [],  # noqa: B006
    scheduler: common.Scheduler = None,
    config: common.Config = None,
    offline: common.Offline = False,
    labels: common.Labels = None,
    dtype: common.Dtype = "fp32",
    device: common.Device = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write: .json or .toml. Default: only print.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option("--figure", help="File to draw the levels in, beside others: .png or .svg.")
    ] = None,
    compare: Annotated[
        list[str],
        typer.Option(
            "--compare",
            help="Spacing that the figure shows for comparison. Can be repeated. Default: that of the sampler.",
            autocompletion=common.complete("spacing"),
        ),
    ] = [],  # noqa: B006 - Typer copies it
) -> None:
    """Compute the noise levels of a spacing for a model and a sampler, and write them for other programs.

    A learned spacing (`gits`, `dmn`, `gap-optimal`) learns its levels, once; they are kept in the cache. The file has
    the levels as a spec of the spacing `list`, and as the arguments `sigmas` and `timesteps` of diffusers' schedulers.

    Examples:

    `samplerbench schedule gits -s ddim --model digits --nfe 5,10 --out gits.json`

    `samplerbench schedule gap-optimal -s ipndm --nfe 5 --out levels.toml --figure levels.png`
    """
    from samplerbench.bench.prepare import prepare
    from samplerbench.bench.request import Grid, Request
    from samplerbench.cli.numbers import parse_steps
    from samplerbench.figures.output import pick_format
    from samplerbench.figures.schedules import as_json, as_toml, compared, make_schedules, schedule_figure
    from samplerbench.report.plots import render
    from samplerbench.results.files import write_atomically

    if out is not None and out.suffix.lower() not in (".json", ".toml"):
        raise UserError(f"--out {out}: the file must have the suffix .json or .toml.")
    form = None if figure is None else pick_format(figure, False)
    if form in ("gif", "apng"):
        raise UserError(f"--figure {figure}: this figure cannot be animated; write a .png or .svg file.")
    if nfe is not None and steps is not None:
        raise UserError("--steps and --nfe cannot be combined; use one of them.")
    numbers = [] if steps is None else parse_steps(steps)
    budgets = [] if steps is not None else parse_steps(nfe or "5,6,8,10", "--nfe")
    others = [] if figure is None else compared(sampler, compare)
    request = Request(
        [Grid([sampler], numbers, budgets, [guidance], [one]) for one in (spacing, *others)],
        model=model,
        labels=labels,
        dtype=dtype,
        revision=revision,
        variant=variant,
        prompts=common.one_of_prompts(prompt, prompts),
        negative_prompt=negative_prompt,
        **common.text_options(image_size, embedded_guidance, memory),
        lora=tuple(lora),
        scheduler=scheduler,
        config=config,
        offline=offline,
    )
    progress = console(stderr=True)
    with progress.status(f"computing the levels of {spacing}") if progress.is_terminal else nullcontext():
        prepared = prepare(request, device)
        made = make_schedules(prepared)
    own = [one for one in made if one.spacing == request.grids[0].spacings[0].spec]  # type: ignore[union-attr]
    screen = console()
    for gap in prepared.unmet:
        screen.print(literal(f"{gap.sampler.spec}: {gap.record['unmet']}"))
    if not own:
        raise UserError("no budget is large enough for one step; give a larger --nfe.")
    for one in own:
        length = f"{one.steps} steps" if one.nfe is None else f"{one.nfe} NFE, {one.steps} steps"
        cost = f" ({one.evaluations:,} network evaluations to learn)" if one.evaluations else ""
        screen.print(literal(f"{length}{cost}", "bold"))
        screen.print(literal(one.short))
    if out is not None:
        text = as_json(own) if out.suffix.lower() == ".json" else as_toml(own)
        write_atomically(out, text.encode())
        say(out)
    if figure is not None and form is not None:
        write_atomically(figure, render(schedule_figure(made), form))
        say(figure)
