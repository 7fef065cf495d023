"""`samplerbench latency`: measure the time, throughput, memory and cost of single batches."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samplerbench.cli import common
from samplerbench.cli.numbers import parse_price, parse_steps
from samplerbench.cli.spelling import with_options
from samplerbench.errors import UserError
from samplerbench.limits import MAX_REPEATS
from samplerbench.text import console, literal, note, print_json, say

if TYPE_CHECKING:
    from samplerbench.bench.latency import Outcome
    from samplerbench.bench.prepare import Prepared


def latency(
    sampler: common.Samplers = [],  # noqa: B006 - Typer copies it
    steps: common.Steps = None,
    nfe: common.Budgets = None,
    guidance: common.Guidances = [],  # noqa: B006
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
    batch_size: Annotated[
        str, typer.Option("--batch-size", "-b", help="Comma-separated batch sizes, in images: `1,4,16`.")
    ] = "1",
    repeats: Annotated[
        int,
        typer.Option(
            "--repeats", min=1, max=MAX_REPEATS, help="Number of measured batches of each sampler and batch size."
        ),
    ] = 20,
    warmup: Annotated[
        int,
        typer.Option("--warmup", min=1, max=MAX_REPEATS, help="Number of batches before the measurement."),
    ] = 2,
    price: Annotated[
        str | None,
        typer.Option("--price", help="Price of the machine per hour, `2.5/h`: also shows the cost of 1,000 images."),
    ] = None,
    seed: common.Seed = 0,
    dtype: common.Dtype = "fp32",
    compile: common.Compile = False,
    graphs: common.Graphs = False,
    device: common.Device = "auto",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of results: the latencies are added to its file latency.json.")
    ] = Path("results"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print only a JSON list with one object per sampler and batch size.")
    ] = False,
) -> None:
    """Measure the time of a batch (p50, p95), images per second, peak memory, and the cost of 1,000 images.

    A batch goes from the prompts or labels to the uint8 images in host memory, as in `run`. The time of the text
    encoder, the network and the decoder is measured in separate batches. With the metrics of `run` in the same folder,
    `report` and `figure pareto` show quality against latency. The exit code is 1 if a measurement failed.

    Examples:

    `samplerbench latency -s ddim -s dpm++ --nfe 10 --batch-size 1,16`

    `samplerbench latency -s ddim --steps 10 --batch-size 16 --repeats 50 --price 2.5/h --json`
    """
    from samplerbench.bench.latency import check_settings, measure_latency, prepare_latency
    from samplerbench.bench.request import Request
    from samplerbench.results.latency import add_latencies
    from samplerbench.results.store import Store

    if not sampler:
        raise UserError("name a sampler with --sampler; `samplerbench list samplers` shows them.")
    sizes = parse_steps(batch_size, "--batch-size", "1,4,16")
    cost = None if price is None else parse_price(price)
    check_settings(sizes, repeats, warmup, cost, graphs)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # plugins may print
        request = Request(
            [common.grid(sampler, steps, nfe, guidance, spacing)],
            model=model,
            labels=labels,
            seeds=(seed,),
            batch_size=max(sizes),
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
        prepared = prepare_latency(request, device)
        common.note_prompts(prepared.model)
        Store(out).prepare()
        screen = console(stderr=True)
        with screen.status("") if screen.is_terminal else nullcontext() as status:

            def progress(done: int, planned: int) -> None:
                if status is not None:
                    status.update(f"{done} of {planned} batches")

            outcomes = measure_latency(prepared, sizes, repeats, warmup, cost, progress)
    latencies = [outcome.latency for outcome in outcomes if outcome.latency is not None]
    file = add_latencies(out, latencies) if latencies else None
    if as_json:
        print_json([_as_dict(outcome) for outcome in outcomes] + [_as_unmet(gap.record) for gap in prepared.unmet])
    else:
        _show(prepared, outcomes, repeats)
        if file is not None:
            say(f"latencies: {file}", error=True)
    for outcome in outcomes:
        if outcome.error is not None:
            note(f"{outcome.title}: failed: {with_options(outcome.error)}")
    if codes := {outcome.error.exit_code for outcome in outcomes if outcome.error is not None}:
        raise typer.Exit(1 if 1 in codes else 2)


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    """A latency as plain data; for one that failed, its configuration and the error."""
    if outcome.latency is not None:
        return outcome.latency.model_dump(mode="json")
    cell = outcome.cell
    return {
        "sampler": cell.method.spec,
        "guidance": None if cell.guidance is None else cell.guidance.spec,
        "spacing": None if cell.spacing is None else cell.spacing.spec,
        "steps": cell.steps,
        "batch_size": outcome.batch_size,
        "error": with_options(outcome.error),
    }


def _as_unmet(record: dict[str, Any]) -> dict[str, Any]:
    """A budget that is too small, as plain data."""
    return {name: record[name] for name in ("sampler", "guidance", "spacing", "steps", "budget", "unmet")}


def _show(prepared: Prepared, outcomes: list[Outcome], repeats: int) -> None:
    from samplerbench.bench.latency import STAGE_BATCHES
    from samplerbench.report.latency import describe_latencies, latency_table, stage_table

    screen = console()
    latencies = [outcome.latency for outcome in outcomes if outcome.latency is not None]
    if latencies:
        screen.print(literal(describe_latencies(latencies), "bold"))
        screen.print(latency_table(latencies))
        rank = "the slowest" if repeats < 20 else f"{-(-repeats * 95 // 100)} of {repeats} took no longer"
        screen.print(literal(f"time of a batch, {repeats} batches each; p95: {rank}", "dim"))
        screen.print()
        screen.print(stage_table(latencies))
        screen.print(literal(f"mean of {STAGE_BATCHES} further batches, with synchronisation at each call", "dim"))
    for gap in prepared.unmet:
        screen.print(literal(f"{gap.sampler.spec}: {gap.record['unmet']}"))
