"""`samplerbench run`: every combination, measured, as a steps-vs-FID table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from samplerbench.cli import common
from samplerbench.errors import UserError


def run(
    sampler: common.Samplers,
    steps: common.Steps = None,
    nfe: Annotated[
        str | None,
        typer.Option(
            "--nfe", help="Budgets of network evaluations, with commas: each sampler takes the most steps that fit."
        ),
    ] = None,
    guidance: common.Guidances = [],  # noqa: B006 - Typer copies it
    spacing: common.Spacing = None,
    model: common.ModelName = "digits",
    labels: common.Labels = None,
    n: Annotated[
        int | None,
        typer.Option("--n", min=1, help="Images per cell. Default: as many as there are real ones, at most 50,000."),
    ] = None,
    seed: common.Seed = 0,
    batch_size: common.BatchSize = 256,
    dtype: common.Dtype = "fp32",
    device: common.Device = "auto",
    metric: Annotated[
        list[str],
        typer.Option("--metric", help="What to measure. Repeatable.", autocompletion=common.complete("metric")),
    ] = ["fid"],  # noqa: B006
    features: Annotated[
        str | None,
        typer.Option(
            "--features",
            help="Feature space of the metrics: `inception-v3-compat`, `dinov2-vit-b-14`, `clip-vit-b-32`, "
            "`digits-cnn`, … Default: the model's.",
        ),
    ] = None,
    features_weights: Annotated[
        str | None,
        typer.Option("--features-weights", help="The extractor's weights, on a machine without network."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="The real images: a name, a folder, or a file of `samplerbench stats`. Default: what the model was "
            "trained on.",
        ),
    ] = None,
    out: common.Out = Path("results"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list, one object per cell, and nothing else.")
    ] = False,
    rerun: Annotated[bool, typer.Option("--rerun", help="Run cells again whose results are in OUT already.")] = False,
) -> None:
    """Sample with every sampler at every number of steps, and print the steps-vs-FID table.

    A cell whose result is in OUT already is not run again. Exit code 1 if a cell failed.

    Examples:

    `samplerbench run --sampler ddim --steps 50`

    `samplerbench run -s ddpm -s ddim -s ddim:eta=0.5 --steps 5,10,20,50`

    `samplerbench run -s ddim --guidance cfg:scale=2 --guidance none --steps 20`

    `samplerbench run -s ddim -s heun -s dpm++:order=3 -s unipc --nfe 5,6,8,10,20`

    `samplerbench run -s pf-ode:solver=heun --spacing karras --steps 9,18 --json`
    """
    from samplerbench import registry
    from samplerbench.bench import engine, setup
    from samplerbench.bench.store import Store

    metrics = [registry.parse("metric", spec) for spec in metric]
    store = Store(out)
    prepared = common.prepare(sampler, steps, guidance, spacing, model, labels, dtype, device, nfe)
    store.prepare()
    loaded = prepared.model
    # What cannot be sampled or measured is said before any weights are fetched.
    common.labelled(prepared, 1)
    setup.reference_source(loaded, data)
    extractor = setup.pick_extractor(loaded, features, features_weights, loaded.device)
    reference = setup.pick_reference(loaded, data, extractor)
    number = n if n is not None else setup.default_n(reference)
    session = engine.Session(
        loaded,
        reference,
        extractor,
        metrics,
        common.labelled(prepared, number),
        prepared.mode,
        number,
        seed,
        batch_size,
        store,
        rerun,
    )
    _warn_few(number, len(reference.moments.mean))
    outcomes: list[engine.Outcome] = []
    interrupted = False
    try:
        with common.Progress(len(prepared.cells)).running() as progress:
            for cell in prepared.cells:
                with progress.cell(cell.title, cell.steps, number, batch_size) as on_step:
                    outcome = engine.run_cell(session, cell, on_step)
                outcomes.append(outcome)
                progress.done(_line(outcome))
    except KeyboardInterrupt:
        interrupted = True
    records = [o.record for o in outcomes] + [gap.record for gap in prepared.unmet]
    if as_json:
        keep = [{k: v for k, v in r.items() if k not in ("protocol_fields", "seal")} for r in records]
        print(json.dumps(keep, indent=2, ensure_ascii=False))
    elif records:
        _show(records, metrics)
        print(f"results and sample grids: {out}/", file=sys.stderr)
    if interrupted:
        print(
            f"samplerbench: stopped; {len(records)} of {len(prepared.cells)} cells are done and kept in {out}/.",
            file=sys.stderr,
        )
        raise typer.Exit(130)
    codes = {o.error.exit_code for o in outcomes if o.error is not None}
    if codes:
        raise typer.Exit(1 if 1 in codes else 2)


def _warn_few(n: int, dim: int) -> None:
    if n <= dim:
        print(
            f"samplerbench: note: {n} images for {dim} features: the covariance is singular and the FID strongly "
            f"biased; use --n {10 * dim} or more.",
            file=sys.stderr,
        )


def _line(outcome: Any) -> str:
    from samplerbench.report.table import format_nfe, format_value, row_name

    record = outcome.record
    title = f"{row_name(record)}, " + (f"{record['steps']} steps" if record["steps"] else "its own steps")
    if outcome.error is not None:
        return f"{title}: failed: {outcome.error}"
    values = "  ".join(f"{name} {format_value(m['value'])}" for name, m in record["metrics"].items())
    how = "from an earlier run" if outcome.reused else f"{record['seconds']:.1f} s"
    return f"{title}: {values}  NFE {format_nfe(record['nfe'])}  {how}"


def _show(records: list[dict[str, Any]], metrics: list[Any]) -> None:
    from rich.console import Console

    from samplerbench.report.table import long_table, steps_table

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 140))
    for metric in metrics:
        console.print(steps_table(records, metric.label()))
        console.print()
    console.print(long_table(records))


def sample(
    out: Annotated[Path, typer.Argument(help="The PNG grid to write.")],
    sampler: Annotated[
        str,
        typer.Option("--sampler", "-s", help="A sampler, with parameters.", autocompletion=common.complete("sampler")),
    ],
    steps: Annotated[int, typer.Option("--steps", help="Number of steps.")] = 50,
    guidance: Annotated[
        str,
        typer.Option(
            "--guidance",
            "-g",
            help="A guidance, with parameters.",
            autocompletion=common.complete("guidance"),
        ),
    ] = "none",
    spacing: common.Spacing = None,
    model: common.ModelName = "digits",
    labels: common.Labels = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many images.")] = 100,
    seed: common.Seed = 0,
    batch_size: common.BatchSize = 256,
    dtype: common.Dtype = "fp32",
    device: common.Device = "auto",
    png_dir: Annotated[
        Path | None, typer.Option("--png-dir", help="Also write every image as a numbered PNG here.")
    ] = None,
    npz: Annotated[
        Path | None,
        typer.Option("--npz", help="Also write the uint8 images (n, H, W, C), and the labels, to this file."),
    ] = None,
) -> None:
    """Sample images and write them as a PNG grid; if asked, as numbered PNGs or an npz.

    Examples:

    `samplerbench sample grid.png --sampler ddim --steps 50`

    `samplerbench sample sevens.png -s ddim -g cfg:scale=3 --labels 7 --n 25 --png-dir sevens/`
    """
    import io

    import numpy as np
    import torch

    from samplerbench.bench import engine
    from samplerbench.bench.store import write_atomically
    from samplerbench.data.pixels import quantise
    from samplerbench.report.grid import save_grid

    if out.suffix.lower() != ".png":
        raise UserError(f"{out}: the grid is a PNG file; name one, like grid.png.")
    prepared = common.prepare([sampler], str(steps), [guidance], spacing, model, labels, dtype, device)
    found = common.labelled(prepared, n)
    cell = prepared.cells[0]
    with (
        common.Progress(1, quiet=True).running() as progress,
        progress.cell(cell.title, cell.steps, n, batch_size) as on_step,
    ):
        batches = engine.generate(prepared.model, cell, torch.arange(n), found, seed, batch_size, on_step)
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
        if found is None:
            np.savez_compressed(buffer, images=channels_last)
        else:
            np.savez_compressed(buffer, images=channels_last, labels=found.numpy())
        write_atomically(npz, buffer.getvalue())
    print(out)
