"""`samplerbench run` and `samplerbench sample`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samplerbench.cli import common
from samplerbench.cli.numbers import parse_batch_size
from samplerbench.cli.spelling import with_options
from samplerbench.errors import LostProcess, Stopped, UserError
from samplerbench.launcher import PRECISIONS, mixed_precision
from samplerbench.limits import MAX_IMAGES, MAX_STEPS
from samplerbench.portable import leave
from samplerbench.text import console, literal, note, print_json, printable, say

if TYPE_CHECKING:
    from samplerbench.bench.engine import Outcome
    from samplerbench.bench.last_word import LastWord
    from samplerbench.bench.prepare import Prepared
    from samplerbench.bench.run import Observer, Run


def run(
    context: typer.Context,
    suite: Annotated[
        Path | None, typer.Argument(help="Suite file (TOML) that lists the cells, in place of the options.")
    ] = None,
    sampler: common.Samplers = [],  # noqa: B006
    steps: common.Steps = None,
    nfe: common.Budgets = None,
    guidance: common.Guidances = [],  # noqa: B006 - Typer copies it
    spacing: common.Spacing = None,
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
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            min=1,
            max=MAX_IMAGES,
            help="Images per block. Default: the number of real images, at most 50,000.",
        ),
    ] = None,
    blocks: Annotated[
        int,
        typer.Option(
            "--blocks",
            min=1,
            max=MAX_IMAGES,
            help="Number of disjoint blocks of --n images. With several blocks, the table shows the mean ± the "
            "standard "
            "deviation.",
        ),
    ] = 1,
    seed: common.Seed = 0,
    batch_size: common.BatchSize = "256",
    dtype: common.Dtype = "fp32",
    compile: common.Compile = False,
    graphs: common.Graphs = False,
    device: common.Device = "auto",
    metric: Annotated[
        list[str],
        typer.Option(
            "--metric",
            help="Metric, with optional parameters: `fid`, `kid:degree=2`. Can be repeated.",
            autocompletion=common.complete("metric"),
        ),
    ] = ["fid"],  # noqa: B006
    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            help="Inverse problem, with optional parameters: `inpaint:mask=box`. The samples are restorations of "
            "observed real images. Can be repeated.",
            autocompletion=common.complete("task"),
        ),
    ] = [],  # noqa: B006
    features: Annotated[
        str | None,
        typer.Option(
            "--features",
            help="Feature extractor of the metrics: `inception-v3-compat`, `dinov2-vit-b-14`, `clip-vit-b-32`, "
            "`digits-cnn`, …, or a folder written by `samplerbench train features`. Default: the model's.",
            autocompletion=common.choices(common.FEATURES),
        ),
    ] = None,
    features_weights: Annotated[
        str | None,
        typer.Option(
            "--features-weights", help="File with the extractor's weights, for a machine without network access."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Real images: a data set name (`mnist`), a folder, zip or npz file, or reference statistics "
            "(written by "
            "`samplerbench stats`, or an npz file of mu and sigma). Default: the training data of the model.",
            autocompletion=common.complete("data set"),
        ),
    ] = None,
    out: common.Out = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print only a JSON list with one object per cell.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List the cells with their NFE and an estimate of the time. Nothing is run."),
    ] = False,
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Run all cells, including those with a result in OUT.")
    ] = False,
) -> None:
    """Run every sampler at every number of steps, and print the steps-vs-FID table.

    An interrupted run resumes where it stopped: run the same command again. A cell with a result in OUT is not run
    again. Command-line options such as `--model` and `--n` override the suite. The exit code is 1 if a cell failed.

    Examples:

    `samplerbench run --sampler ddim --steps 50`

    `samplerbench run -s ddpm -s ddim -s ddim:eta=0.5 --steps 5,10,20,50`

    `samplerbench run -s ddim --guidance cfg:scale=2 --guidance none --steps 20`

    `samplerbench run -s ddim -s heun -s dpm++:order=3 -s unipc --nfe 5,6,8,10,20`

    `samplerbench run -s pf-ode:solver=heun --spacing karras --steps 9,18 --json`

    `samplerbench run -s ddim -s unipc --nfe 10,20 --blocks 5 --metric fid --metric kid --metric gap`

    `samplerbench run --task inpaint:mask=half -g dps -g diffpir -s ddim --nfe 20,50 --metric psnr`

    `samplerbench run benchmarks/suites/digits.toml --out results/digits`

    `accelerate launch --num_processes 8 -m samplerbench run benchmarks/suites/digits.toml`
    """
    from samplerbench.bench import last_word
    from samplerbench.bench.prepare import prepare
    from samplerbench.bench.request import Request
    from samplerbench.bench.run import Run
    from samplerbench.bench.suite import load_suite
    from samplerbench.bench.team import join_team
    from samplerbench.results.store import Store

    options: dict[str, Any] = {"model": model, "labels": labels, "n": n, "blocks": blocks, "seeds": (seed,)}
    options |= {"batch_size": parse_batch_size(batch_size), "dtype": dtype, "metrics": metric, "features": features}
    options |= {"tasks": task}
    options |= {"features_weights": features_weights, "data": data, "revision": revision, "variant": variant}
    options |= {"prompts": common.one_of_prompts(prompt, prompts)}
    options |= {"negative_prompt": negative_prompt, "compile": compile, "graphs": graphs}
    options |= common.text_options(image_size, embedded_guidance, memory)
    options |= {"lora": lora, "scheduler": scheduler, "config": config}
    with _stdout_kept(as_json):  # plugins are imported
        if suite is not None:
            named = {"sampler": sampler, "steps": steps, "nfe": nfe, "guidance": guidance, "spacing": spacing}
            if both := next((f"--{name}" for name, value in named.items() if value), None):
                if not suite.exists():
                    raise UserError(f'unexpected argument "{suite}"; write lists with commas: --steps 10,20,50.')
                raise UserError(
                    f"the suite {suite} and {both} cannot be combined; the suite names the samplers, steps, guidances "
                    "and spacings."
                )
            request = load_suite(suite)
            # What is said on the command line goes before what the suite says.
            request = request.replace(**_given(context, options), offline=offline)
        elif sampler:
            request = Request([common.grid(sampler, steps, nfe, guidance, spacing)], **options, offline=offline)
        else:
            raise UserError("name a sampler with --sampler, or a suite file; `samplerbench list samplers` shows them.")
    team, device = join_team(device)
    precision = mixed_precision()
    if team.main and precision != "no" and request.dtype == "fp32" and not _is_given(context, "dtype"):
        note(
            f"note: the mixed_precision of accelerate's configuration ({precision}) does not apply to `run`; use "
            f"--dtype {precision if precision in PRECISIONS else 'bf16'}."
        )
    with _stdout_kept(as_json):
        prepared = prepare(request, device, team=team)
    if dry_run:
        if team.main:
            _dry_run(prepared)
        return
    word = None
    if team.local_rank == 0 and team.size > 1:  # each node has its own launcher
        word = last_word.promise(
            "samplerbench: a process of this run has ended unexpectedly (see above). Nothing finished is lost: "
            f"finished cells and the last checkpoint are kept in {printable(out)}/. "
            "Run the same command again to continue."
        )
    with _stdout_kept(as_json):
        job = Run(prepared, Store(out), rerun, team)
    for warning in job.warnings() if team.main else ():
        note(f"note: {with_options(warning)}")
    interrupted = False
    try:
        job.run(_terminal(job, out / "run.log", as_json))
    except (KeyboardInterrupt, Stopped):
        interrupted = True
    except LostProcess:
        if word is not None:
            word.keep()
        if team.announces_loss():
            raise
        leave(1)  # another process of this node has printed the message
    if not team.main:
        if interrupted:
            if word is not None:
                word.cancel()
            leave(130)  # the connections are still open; the main process reports it
        return
    records = [_shown(record) for record in job.records]
    if as_json:
        keep = [{k: v for k, v in r.items() if k not in ("protocol_fields", "seal")} for r in records]
        print_json(keep)
    elif records:
        _show(records, prepared.metrics, job.floor())
        _show_published(job)
        say(f"results and sample grids: {out}/", error=True)
    cells = len(job.units)
    if interrupted:
        line = f"stopped; {job.finished} of {cells} cells are done and kept in {out}/. Run the same command to go on."
        _last_line(line, word)
        raise typer.Exit(130)
    if job.failed:
        if word is not None:
            _last_line(f"{len({id(o.error) for o in job.failed})} of {cells} cells failed (see above).", word)
        raise typer.Exit(_exit_code(job.failed))


def _terminal(job: Run, log: Path, as_json: bool) -> Observer:
    """What shows a run in the terminal, and stops it after Ctrl-C."""
    from samplerbench.bench.run import Observer
    from samplerbench.metrics.metric import names_of
    from samplerbench.report.table import steps_table

    metric, quiet = names_of(job.prepared.metrics)[0], not job.team.main
    bars = common.Progress(len(job.units), quiet, log, lambda: steps_table(job.pending, metric))
    watch = common.Interrupts(quiet)

    class Terminal(Observer):
        cell, solution, stop = bars.cell, bars.solution, watch.requested

        @contextmanager
        def running(self) -> Iterator[None]:
            with _stdout_kept(as_json), watch, bars.running():
                yield

        def done(self, outcome: Outcome, title: str) -> None:
            if outcome.trace:
                say(outcome.trace, error=True)
            bars.done(_line(outcome, title))

    return Terminal()


def _stdout_kept(as_json: bool) -> AbstractContextManager[Any]:
    """While JSON is to be the only output: what plugins print goes to stderr."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def _last_line(line: str, word: LastWord | None) -> None:
    """Print a line on stderr; after the lines of the launcher, where one started this process."""
    if word is None:
        note(line)
    else:
        word.keep(f"samplerbench: {printable(line)}")


def _shown(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the options of this command in its error."""
    return record | {"error": with_options(record["error"])} if "error" in record else record


def _show_published(job: Run) -> None:
    """What a paper reports for these cells, beside what was measured."""
    from samplerbench.report.published import published_table

    rows = [(record, p.metric, p.value, p.source) for record, p in job.published()]
    if rows:
        screen = console(180)
        screen.print()
        screen.print(published_table(rows))


def _given(context: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that were given on the command line."""
    own = {"seeds": "seed", "metrics": "metric", "tasks": "task"}
    if isinstance(options["prompts"], tuple):
        own["prompts"] = "prompt"
    return {k: v for k, v in options.items() if _is_given(context, own.get(k, k))}


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _exit_code(failed: Sequence[Outcome]) -> int:
    """1 if a cell failed while it ran; 2 if all were asked for what cannot be."""
    return 1 if any(o.error is not None and o.error.exit_code == 1 for o in failed) else 2


def _dry_run(prepared: Prepared) -> None:
    """List the cells with their evaluations, and the time they will take by a short calibration."""
    from rich.table import Table

    from samplerbench.bench.estimate import estimate
    from samplerbench.results.names import steps_label

    expected, request = estimate(prepared), prepared.request
    table = Table(header_style="bold")
    for column in ("sampler", "spacing"):
        table.add_column(column, no_wrap=True)
    for column in ("steps", "NFE", "estimate"):
        table.add_column(column, justify="right")
    names = prepared.names
    for row in expected.rows:
        cell, known = row.cell, row.cell.pending
        guidance = names.plugin(known, "guidance")
        solution = f"converged solution of {', '.join(row.metrics)}" + (f" + {guidance}" if guidance else "")
        name = f"{row.metrics[0]} of {names.row(known)}" if row.of_data else solution
        passes = f"≈ {row.nfe:.0f}" if row.measured else f"{row.nfe:g}"
        table.add_row(
            literal(name if row.metrics else names.row(known)),
            literal(names.spacing(known)),
            steps_label(known),
            passes + (f" + {row.backward:.0f} backward" if row.backward else ""),
            f"{row.seconds:.0f} s",
        )
    screen = console()
    screen.print(table)
    seeds = len(request.seeds) * max(1, len(prepared.tasks))
    work = "sampling and metrics" if any(row.of_data for row in expected.rows) else "sampling"
    cells, blocks = len(prepared.runs) * seeds, f"{request.blocks} x " if request.blocks > 1 else ""
    screen.print(
        f"{cells:,} cell{'s' if cells != 1 else ''} of {blocks}{expected.n:,} images; about "
        f"{expected.seconds * seeds / 60:.1f} minutes of {work} on {prepared.model.device}, measured at "
        f"{1 / expected.evaluation:.0f} evaluations/s."
    )
    if any(row.of_data for row in expected.rows):
        screen.print("The evaluations of a metric of the data are for each of its images.")
    if any(row.metrics and not row.of_data for row in expected.rows):
        screen.print("A converged solution is computed once for all cells with the same guidance.")
    if any(row.measured for row in expected.rows):
        screen.print("≈: measured on two images.")
    for cell in prepared.cells:
        if cell.error is not None:
            screen.print(literal(f"{cell.title}: will fail: {with_options(cell.error)}"))
    for gap in prepared.unmet:
        screen.print(literal(f"{gap.sampler.spec}: {gap.record['unmet']}"))


def _line(outcome: Outcome, title: str) -> str:
    from samplerbench.report.table import format_nfe, format_value

    record = outcome.record
    if outcome.error is not None:
        return f"{title}: failed: {with_options(outcome.error)}"
    counts = {name: f" ({format_nfe(m['nfe'])} NFE)" for name, m in record["metrics"].items() if "nfe" in m}
    values = "".join(
        f"{name} {format_value(m['value'])}{counts.get(name, '')}, " for name, m in record["metrics"].items()
    )
    timed = "" if record["seconds"] is None else f"{record['seconds']:.1f} s"
    how = "from an earlier run" if outcome.reused else timed
    learned = record.get("bound_evaluations") or 0
    once = f", {learned:,} evaluations before (once)" if learned else ""
    return f"{title}: {values}NFE {format_nfe(record['nfe'])}{once}" + (f", {how}" if how else "")


def _show(records: list[dict[str, Any]], metrics: list[Any], floor: tuple[float, float, int] | None = None) -> None:
    from samplerbench.bench.run import has_floor
    from samplerbench.metrics.metric import names_of
    from samplerbench.report.table import long_table, steps_table

    screen = console()
    tasks = list(dict.fromkeys(r["task"] for r in records if "task" in r))
    for task in tasks if len(tasks) > 1 else [None]:
        # A budget that is too small for a sampler belongs to the tables of all tasks.
        part = [r for r in records if task is None or r.get("task", task) == task]
        if task is not None:
            screen.print(literal(f"task {task}", "bold"))
        for name, metric in zip(names_of(metrics), metrics, strict=True):
            screen.print(steps_table(part, name, floor if has_floor(metric) else None))
            screen.print()
    screen.print(long_table(records))


def sample(
    out: Annotated[Path, typer.Argument(help="PNG file to write: a grid of the images.")],
    sampler: Annotated[
        str,
        typer.Option(
            "--sampler",
            "-s",
            help="Sampler, with optional parameters: `ddim:eta=0.5`.",
            autocompletion=common.complete("sampler", "generator"),
        ),
    ],
    steps: Annotated[int, typer.Option("--steps", max=MAX_STEPS, help="Number of steps.")] = 50,
    guidance: Annotated[
        str,
        typer.Option(
            "--guidance",
            "-g",
            help="Guidance, with optional parameters: `cfg:scale=2`. `none` disables guidance.",
            autocompletion=common.complete("guidance"),
        ),
    ] = "none",
    spacing: common.Spacing = None,
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
    n: Annotated[int, typer.Option("--n", min=1, max=MAX_IMAGES, help="Number of images.")] = 100,
    seed: common.Seed = 0,
    batch_size: common.BatchSize = "256",
    dtype: common.Dtype = "fp32",
    compile: common.Compile = False,
    graphs: common.Graphs = False,
    device: common.Device = "auto",
    png_dir: Annotated[
        Path | None, typer.Option("--png-dir", help="Folder: also write each image as a numbered PNG.")
    ] = None,
    npz: Annotated[
        Path | None,
        typer.Option("--npz", help="File: also write the uint8 images (n, H, W, C), labels and prompts as npz."),
    ] = None,
) -> None:
    """Sample images and write them as a PNG grid, and optionally as numbered PNGs or an npz file.

    Examples:

    `samplerbench sample grid.png --sampler ddim --steps 50`

    `samplerbench sample sevens.png -s ddim -g cfg:scale=3 --labels 7 --n 25 --png-dir sevens/`
    """
    import io

    import numpy as np
    import torch

    from samplerbench.bench import engine
    from samplerbench.bench.prepare import prepare
    from samplerbench.bench.request import Request
    from samplerbench.data.grid import save_grid
    from samplerbench.data.pixels import quantise
    from samplerbench.models.text import prompts_of
    from samplerbench.results.files import write_atomically

    if out.suffix.lower() != ".png":
        raise UserError(f"{out}: the file must have the suffix .png, as in grid.png.")
    if npz is not None and npz.suffix.lower() != ".npz":
        raise UserError(f"--npz {npz}: the file must have the suffix .npz.")
    if png_dir is not None and png_dir.exists() and not png_dir.is_dir():
        raise UserError(f"--png-dir {png_dir}: it is a file, not a folder; choose another folder.")
    request = Request(
        [common.grid([sampler], str(steps), None, [guidance], spacing)],
        model=model,
        labels=labels,
        n=n,
        seeds=(seed,),
        batch_size=parse_batch_size(batch_size),
        dtype=dtype,
        revision=revision,
        variant=variant,
        prompts=common.one_of_prompts(prompt, prompts),
        negative_prompt=negative_prompt,
        **common.text_options(image_size, embedded_guidance, memory),
        lora=lora,
        scheduler=scheduler,
        config=config,
        offline=offline,
        compile=compile,
        graphs=graphs,
    )
    prepared = prepare(request, device)
    common.note_prompts(prepared.model)
    inputs = prepared.inputs(n)
    cell = prepared.cells[0]
    with (
        common.Progress(1, quiet=True).running() as progress,
        progress.cell(cell.title, cell.steps, n, prepared.batch_size) as on_step,
    ):
        batches = engine.generate(prepared.model, cell, torch.arange(n), inputs, seed, prepared.batch_size, on_step)
        parts = [quantise(batch.images).cpu() for batch in batches]
    pixels = torch.cat(parts)
    buffer = io.BytesIO()
    save_grid(pixels, buffer)
    write_atomically(out, buffer.getvalue())
    if png_dir is not None:
        for i, image in enumerate(pixels):
            buffer = io.BytesIO()
            save_grid(image[None], buffer, least_side=1, gap=0)
            write_atomically(png_dir / f"{i:06d}.png", buffer.getvalue())
    if npz is not None:
        buffer = io.BytesIO()
        channels_last = pixels.permute(0, 2, 3, 1).numpy()
        arrays: dict[str, Any] = {"images": channels_last}
        if inputs.chosen is not None:
            arrays["labels"] = inputs.chosen.numpy()
        for name, texts in prompts_of(prepared.model, inputs).items():
            arrays[name] = np.array(texts)
        np.savez_compressed(buffer, **arrays)
        write_atomically(npz, buffer.getvalue())
    say(out)
