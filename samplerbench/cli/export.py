"""`samplerbench export`: images in the folder layout of a text-to-image benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from samplerbench.cli import common
from samplerbench.cli.numbers import parse_batch_size
from samplerbench.errors import UserError
from samplerbench.limits import MAX_IMAGES, MAX_STEPS
from samplerbench.text import say

Layout = Literal["geneval", "hps"]

IMAGES = {"geneval": 4, "hps": 1}
"""Images of each prompt, as the benchmarks define them."""
MOST = {"geneval": 10_000, "hps": 1}
"""The number of images of a prompt that a layout has names for."""


def export(
    out: Annotated[Path, typer.Argument(help="Folder to write. It must be empty, or not exist.")],
    layout: Annotated[Layout, typer.Option("--layout", help="Layout of the folder.")],
    prompts: Annotated[
        list[str],
        typer.Option(
            "--prompts",
            help="File of prompts. GenEval: its evaluation_metadata.jsonl. HPS v2: a JSON list of prompts, named after "
            "its style (anime.json). Can be repeated for several styles.",
        ),
    ],
    sampler: Annotated[
        str,
        typer.Option(
            "--sampler",
            "-s",
            help="Sampler, with optional parameters: `ddim:eta=0.5`.",
            autocompletion=common.complete("sampler", "generator"),
        ),
    ],
    model: common.ModelName,
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
    images: Annotated[
        int | None,
        typer.Option("--images", min=1, max=MAX_IMAGES, help="Images of each prompt. Default: GenEval 4, HPS v2 1."),
    ] = None,
    revision: common.Revision = None,
    variant: common.Variant = None,
    negative_prompt: common.NegativePrompt = None,
    image_size: common.ImageSize = None,
    embedded_guidance: common.EmbeddedGuidance = None,
    memory: common.Memory = None,
    lora: common.Lora = [],  # noqa: B006
    scheduler: common.Scheduler = None,
    config: common.Config = None,
    offline: common.Offline = False,
    seed: common.Seed = 0,
    batch_size: common.BatchSize = "256",
    dtype: common.Dtype = "fp32",
    compile: common.Compile = False,
    graphs: common.Graphs = False,
    device: common.Device = "auto",
) -> None:
    """Sample the images of a benchmark's prompts and write them in the folder layout that its own code scores.

    With K prompts, sample i has prompt i mod K: these are the images of a `run` with the same options and seed.

    Examples:

    `samplerbench export geneval-out --layout geneval --prompts evaluation_metadata.jsonl -m PATH -s dpm++ --steps 20`

    `samplerbench export hps-out --layout hps --prompts anime.json --prompts photo.json -m PATH -s unipc --steps 10`
    """
    import torch

    from samplerbench.bench import engine
    from samplerbench.bench.export import (
        check_folder,
        prompts_of,
        read_entries,
        sample_order,
        write_images,
        write_metadata,
    )
    from samplerbench.bench.prepare import prepare
    from samplerbench.bench.request import Request

    check_folder(out)
    count = images or IMAGES[layout]
    if count > MOST[layout]:
        most = "1 image" if MOST[layout] == 1 else f"{MOST[layout]:,} images"
        raise UserError(f"--images {count}: the layout {layout} has at most {most} of each prompt.")
    entries = read_entries(layout, prompts)
    request = Request(
        [common.grid([sampler], str(steps), None, [guidance], spacing)],
        model=model,
        n=len(entries) * count,
        seeds=(seed,),
        batch_size=parse_batch_size(batch_size),
        dtype=dtype,
        revision=revision,
        variant=variant,
        # A prompt is one line, as in a file of `run`.
        prompts=tuple(" ".join(line.strip() for line in entry.prompt.strip().splitlines()) for entry in entries),
        negative_prompt=negative_prompt,
        lora=tuple(lora),
        scheduler=scheduler,
        config=config,
        **common.text_options(image_size, embedded_guidance, memory),
        offline=offline,
        compile=compile,
        graphs=graphs,
    )
    prepared = prepare(request, device)
    chosen = prompts_of(entries, count)
    inputs, cell, size = prepared.inputs_of(len(chosen), chosen), prepared.cells[0], prepared.batch_size
    places = [entry.path(image) for entry, image in sample_order(entries, count)]
    write_metadata(out, entries)
    with (
        common.Progress(1, quiet=True).running() as progress,
        progress.cell(cell.title, cell.steps, len(chosen), size) as on_step,
    ):
        index = torch.arange(len(chosen))
        for batch in engine.generate(prepared.model, cell, index, inputs, seed, size, on_step):
            write_images(out, [places[i] for i in batch.index.tolist()], batch.images)
    say(out)
