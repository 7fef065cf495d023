"""`samplerbench figure`: figures for teaching, and the Pareto front of quality and latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from samplerbench.cli import common
from samplerbench.cli.canvas import (
    Animate,
    Canvas,
    OneGuidance,
    OneSampler,
    RealData,
    Sigmas,
    Spacing,
    app,
    chosen_sigmas,
    figure_command,
    numbers,
)
from samplerbench.cli.numbers import parse_steps
from samplerbench.errors import UserError
from samplerbench.limits import MAX_BATCH, MAX_STEPS
from samplerbench.text import console, json_text, note, say

if TYPE_CHECKING:
    from samplerbench.figures.scene import Scene

__all__ = ["Canvas", "app"]


@figure_command()
def steps(
    canvas: Canvas,
    sampler: common.Samplers,
    steps: Annotated[str, typer.Option("--steps", help="Comma-separated numbers of steps.")] = "1,2,5,10,20,50",
    guidance: OneGuidance = "none",
    spacing: Spacing = None,
    animate: Animate = False,
) -> None:
    """Images from the same x_T with increasing numbers of steps: one column per number, one panel per sampler.

    Examples:

    `samplerbench figure steps steps.png -s ddim -s ddpm`

    `samplerbench figure steps steps.gif -s ddim --n 8`
    """
    from samplerbench.figures.steps import columns, frames, still

    moves = canvas.moves(animate)
    scene = canvas.scene(sampler, parse_steps(steps), [guidance], spacing)
    images = columns(scene)
    canvas.animation(frames(scene, images), 0.8) if moves else canvas.still(still(scene, images))


@figure_command(n=3)
def trajectory(
    canvas: Canvas,
    sampler: OneSampler,
    steps: Annotated[int, typer.Option("--steps", max=MAX_STEPS, help="Number of steps.")] = 50,
    columns: Annotated[
        int | None,
        typer.Option(
            "--columns",
            min=2,
            max=10_000,
            help="Number of noise levels to show, evenly spaced in steps. Default: 9; all in an animation.",
        ),
    ] = None,
    sigmas: Sigmas = None,
    guidance: OneGuidance = "none",
    spacing: Spacing = None,
    animate: Animate = False,
) -> None:
    """The trajectory from x_T to the image: the state x_t, and below it the denoised image D(x_t).

    Examples:

    `samplerbench figure trajectory trajectory.png -s ddim`

    `samplerbench figure trajectory trajectory.gif -s ddpm --steps 100 --n 6`
    """
    from samplerbench.figures.trajectory import follow, frames, still

    moves = canvas.moves(animate)
    chosen = chosen_sigmas(sigmas, columns)
    scene = canvas.scene([sampler], [steps], [guidance], spacing)
    (cell,) = scene.cells
    points = follow(scene, cell, columns or (steps + 1 if moves else 9), chosen)
    canvas.animation(frames(scene, cell, points), 0.12) if moves else canvas.still(still(scene, cell, points))


@figure_command(n=3)
def interpolate(
    canvas: Canvas,
    sampler: OneSampler,
    steps: Annotated[int, typer.Option("--steps", max=MAX_STEPS, help="Number of steps for the interpolation.")] = 50,
    points: Annotated[
        int | None,
        typer.Option(
            "--points",
            min=2,
            max=10_000,
            help="Number of columns: images between two x_T. Default: 9; 24 in an animation.",
        ),
    ] = None,
    round_trip: Annotated[
        str,
        typer.Option(
            "--round-trip",
            help="Comma-separated numbers of steps for the round trip image → x_T → image; `none` omits it.",
        ),
    ] = "10,50,200",
    inversion: Annotated[
        Literal["euler", "heun"],
        typer.Option("--inversion", help="Solver from the image to x_T; euler is DDIM inversion."),
    ] = "euler",
    start: Annotated[
        Literal["clean", "noised"],
        typer.Option(
            "--start", help="Start of the inversion: the image, or the image with noise at the model's smallest σ."
        ),
    ] = "clean",
    data: RealData = None,
    guidance: OneGuidance = "none",
    spacing: Spacing = None,
    animate: Animate = False,
) -> None:
    """Images between two x_T, and the round trip of real images to x_T and back, with its error.

    The error is the mean squared error per dimension of images in [0, 1]. It is also printed, and written to a JSON
    file next to OUT. An animation shows only the interpolation.

    Examples:

    `samplerbench figure interpolate interpolate.png -s ddim`

    `samplerbench figure interpolate interpolate.gif -s ddim --labels 3 --n 6`
    """
    from samplerbench.figures import interpolate as arc
    from samplerbench.figures import round_trip as trip
    from samplerbench.figures.panel import Drawing

    moves = canvas.moves(animate)
    trips = [] if moves or round_trip == "none" else parse_steps(round_trip, "--round-trip")
    if trips and min(trips) < 1:
        raise UserError(f"--round-trip {min(trips)}: at least 1 step is needed.")
    points = points or (24 if moves else 9)
    scene = canvas.scene([sampler], [steps, *trips], [guidance], spacing, data)
    cells = {cell.steps: cell for cell in scene.cells}
    cell = scene.cells[0]
    if moves:
        canvas.animation(arc.frames(scene, cell, arc.between(scene, cell, points)), 0.1)
        return
    panels, found = [], []
    if trips:
        x0, labels = scene.real(points)
        found = [
            trip.round_trip(scene, cells.get(count, cell), x0, labels, inversion, start == "noised") for count in trips
        ]
        panels = [trip.panel(scene, x0, labels, found)]
    panels.insert(0, arc.panel(scene, cell, arc.between(scene, cell, points)))
    title = "x_T as a code of the image" if trips else "Interpolation"
    canvas.still(Drawing(title, panels, scene.describe(cell, steps=False)))
    if found:
        _write_errors(canvas, scene, found, {"inversion": inversion, "start": start})


def _write_errors(canvas: Canvas, scene: Scene, found: Sequence[Any], how: dict[str, str]) -> None:
    from rich.table import Table

    from samplerbench.figures.round_trip import SCALE
    from samplerbench.results.files import write_atomically

    cell = scene.cells[0]
    record = {
        "model": scene.prepared.request.model,
        "sampler": cell.sampler.spec,
        "guidance": None if cell.guidance is None else cell.guidance.spec,
        "spacing": None if cell.spacing is None else cell.spacing.spec,
        **how,
        "seed": scene.seed,
        "images": len(found[0].errors),
        "error": f"mean squared error {SCALE}",
        "round_trips": [trip.record for trip in found],
    }
    file = canvas.out.with_suffix(".json")
    write_atomically(file, (json_text(record) + "\n").encode())
    table = Table(header_style="bold", title=f"image → x_T → image, {record['images']} images", title_justify="left")
    for name in ("steps", "NFE", "MSE in [0, 1]", "variance of x_T"):
        table.add_column(name, justify="right")
    for trip in found:
        table.add_row(str(trip.steps), f"{trip.nfe:g}", f"{trip.mse:.2e}", f"{trip.variance:.3f}")
    console().print(table)
    say(file)


@figure_command()
def guidance(
    canvas: Canvas,
    sampler: OneSampler,
    guidance: Annotated[
        str,
        typer.Option(
            "--guidance", "-g", help="Guidance with a scale parameter.", autocompletion=common.complete("guidance")
        ),
    ],
    scales: Annotated[str, typer.Option("--scales", help="Comma-separated guidance scales.")] = "0,1,2,4,8",
    steps: Annotated[int, typer.Option("--steps", max=MAX_STEPS, help="Number of steps.")] = 50,
    spacing: Spacing = None,
) -> None:
    """Images with increasing guidance scale: each row has one x_T and label, each column one scale.

    Example: `samplerbench figure guidance guidance.png -s ddim -g cfg --scales 0,1,2,4,8`
    """
    from samplerbench.figures.guidance import guidance_specs, still

    canvas.check_still()
    if guidance == "none":
        raise UserError("--guidance none has no scale; write --guidance NAME --scales 0,1,2,4,8.")
    if "scale=" in guidance:
        raise UserError(f"--guidance {guidance}: the scales are given by --scales; remove scale=.")
    specs = guidance_specs(guidance, [f"{scale:g}" for scale in numbers(scales, "--scales")])
    canvas.still(still(canvas.scene([sampler], [steps], specs, spacing)))


@figure_command()
def restore(
    canvas: Canvas,
    sampler: common.Samplers,
    task: Annotated[
        str,
        typer.Option(
            "--task",
            help="Inverse problem, with optional parameters: `inpaint:mask=half`.",
            autocompletion=common.complete("task"),
        ),
    ],
    guidance: common.Guidances = [],  # noqa: B006 - Typer copies it
    steps: Annotated[int, typer.Option("--steps", max=MAX_STEPS, help="Number of steps.")] = 50,
    samples: Annotated[
        int,
        typer.Option("--samples", min=1, max=10_000, help="Number of samples of each observation, for their spread."),
    ] = 8,
    spacing: Spacing = None,
    data: RealData = None,
) -> None:
    """Restorations of an inverse problem: truth, observation, one column per method, and the spread of several samples.

    Each row is one real image. The spread is the standard deviation of each pixel over the samples of its observation.

    Example: `samplerbench figure restore restore.png --task inpaint:mask=half -s ddim -g mmps -g diffpir`
    """
    from samplerbench.figures.restore import restorations, still

    canvas.check_still()
    scene = canvas.restoring(sampler, steps, guidance, spacing, task, samples, data)
    canvas.still(still(scene, restorations(scene, samples)))


@app.command()
def pareto(
    out: Annotated[Path, typer.Argument(help="File to write: .png or .svg.")],
    folder: Annotated[
        Path, typer.Argument(help="Folder of results of `samplerbench run` and `samplerbench latency`.")
    ] = Path("results"),
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="The metric to show. Default: the first metric of the results.",
            autocompletion=common.complete("metric"),
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "-b",
            min=1,
            max=MAX_BATCH,
            help="Batch size to show. Default: the smallest.",
        ),
    ] = None,
) -> None:
    """A metric over milliseconds per image, with the Pareto front: no other sampler is both faster and better.

    The metric is from the results of `run`, the time from `latency`. Both commands need the same samplers, steps or
    budgets, guidance, model and `--dtype`.

    Example: `samplerbench figure pareto pareto.png results --metric fid --batch-size 1`
    """
    from samplerbench.figures.output import pick_format
    from samplerbench.registry import current_name
    from samplerbench.report.latency import front_table, tradeoff_figure, tradeoffs
    from samplerbench.report.load import load
    from samplerbench.report.plots import render
    from samplerbench.results.files import write_atomically
    from samplerbench.results.groups import group
    from samplerbench.results.latency import LATENCY_FILE, read_latencies

    form = pick_format(out, False)
    if form not in ("png", "svg"):
        raise UserError(f"{out}: this figure cannot be animated; write a .png or .svg file.")
    groups, latencies = group(load(folder).records), read_latencies(folder)
    if not latencies:
        raise UserError(f"{folder} has no {LATENCY_FILE}; `samplerbench latency … --out {folder}` writes it.")
    if metric is not None:
        metric = current_name("metric", metric)
        known = list(dict.fromkeys(name for found in groups for name in found.metrics()))
        if metric not in known:
            raise UserError(f"--metric {metric}: the results have {', '.join(known)}.")
    sizes = sorted({latency.batch_size for latency in latencies})
    if batch_size is not None and batch_size not in sizes:
        raise UserError(f"--batch-size {batch_size}: {LATENCY_FILE} has {', '.join(map(str, sizes))}.")
    found = [t for one in groups for t in tradeoffs(one, latencies, [] if metric is None else [metric])]
    found = [t for t in found if batch_size is None or t.batch_size == batch_size]
    if not found:
        raise UserError(
            f"{folder}: no result has the sampler, steps, guidance, weights and dtype of a latency; use the same "
            "options for `samplerbench run` and `samplerbench latency`."
        )
    first = found[0]
    write_atomically(out, render(tradeoff_figure(first), form))
    console().print(front_table(first))
    for other in (t for t in found[1:] if (t.metric, t.batch_size) == (first.metric, first.batch_size)):
        note(f"not shown: {other.group.title + '; ' if other.group.title else ''}{other.conditions}")
    say(out)


@figure_command(n=8)
def nearest(
    canvas: Canvas,
    sampler: OneSampler,
    steps: Annotated[int, typer.Option("--steps", max=MAX_STEPS, help="Number of steps.")] = 50,
    neighbours: Annotated[int, typer.Option("--neighbours", min=2, max=3, help="Number of nearest images.")] = 3,
    guidance: OneGuidance = "none",
    spacing: Spacing = None,
    data: RealData = None,
) -> None:
    """Samples beside the training images that are nearest to them: does the model copy its training data?

    Distances are measured in pixels. Each row shows the distance to the nearest image, and its ratio to the distance to
    the second nearest. With `--data`, other images are searched, such as held-out ones.

    Examples:

    `samplerbench figure nearest nearest.png -s ddim`

    `samplerbench figure nearest held-out.png -s ddim --data digits:split=held-out`
    """
    from samplerbench.figures.nearest import beside, still

    scene = canvas.scene([sampler], [steps], [guidance], spacing, data=data)
    canvas.still(still(scene, beside(scene, neighbours)))


@figure_command(n=4)
def forward(
    canvas: Canvas,
    columns: Annotated[
        int | None,
        typer.Option(
            "--columns",
            min=2,
            max=10_000,
            help="Number of noise levels, evenly spaced in the model's time. Default: 9; 50 in an animation.",
        ),
    ] = None,
    timesteps: Annotated[
        str | None,
        typer.Option("--timesteps", help="Comma-separated timesteps to show. Requires a discrete-time model."),
    ] = None,
    sigmas: Sigmas = None,
    data: RealData = None,
    animate: Animate = False,
) -> None:
    """Real images with increasing noise: samples of q(x_t | x₀), in the model's own scale.

    Examples:

    `samplerbench figure forward forward.png`

    `samplerbench figure forward forward.gif --n 8 --timesteps 0,100,200,400,600,999`
    """
    from samplerbench.figures.forward import frames, noising, pick_levels, still

    moves = canvas.moves(animate)
    chosen = chosen_sigmas(sigmas, columns)
    if timesteps is not None and (sigmas is not None or columns is not None):
        raise UserError("--timesteps, --sigmas and --columns cannot be combined; use one of them.")
    marks = None if timesteps is None else [int(t) for t in numbers(timesteps, "--timesteps", whole=True)]
    scene = canvas.scene(data=data)
    levels = pick_levels(scene, columns or (50 if moves else 9), marks, chosen)
    seen, labels = noising(scene, levels)
    if moves:
        canvas.animation(frames(scene, levels, seen, labels), 0.1)
    else:
        canvas.still(still(scene, levels, seen, labels))


@app.command()
def bound(
    out: Annotated[Path, typer.Argument(help="File to write: .png or .svg.")],
    sampler: common.Samplers = [],  # noqa: B006 - Typer copies it
    steps: Annotated[str, typer.Option("--steps", help="Comma-separated numbers of steps.")] = "50",
    spacing: Spacing = None,
    model: common.ModelName = "digits",
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Images: a data set name, a folder, zip or npz file. Default: the held-out images of the model.",
            autocompletion=common.complete("data set"),
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, max=10_000, help="Number of images.")] = 32,
    seed: common.Seed = 0,
    dtype: common.Dtype = "fp32",
    device: common.Device = "auto",
) -> None:
    """The terms of the variational bound over the timestep, with a linear and a logarithmic axis.

    Example: `samplerbench figure bound bound.png -s ddpm -s ddpm:variance=large --steps 25`
    """
    from samplerbench.bench.prepare import prepare
    from samplerbench.bench.request import Request
    from samplerbench.figures.output import pick_format
    from samplerbench.likelihoods.figure import bound_figure
    from samplerbench.likelihoods.run import likelihoods, make_settings
    from samplerbench.report.plots import render
    from samplerbench.results.files import write_atomically

    form = pick_format(out, False)
    if form not in ("png", "svg"):
        raise UserError(f"{out}: this figure cannot be animated; write a .png or .svg file.")
    if not sampler:
        raise UserError("name a sampler with --sampler; `samplerbench list samplers` shows them.")
    grid = common.grid(sampler, steps, None, [], spacing)
    request = Request([grid], model=model, n=n, seeds=(seed,), dtype=dtype)
    found = list(likelihoods(prepare(request, device), make_settings("vlb", data, n, training=False)))
    write_atomically(out, render(bound_figure(found), form))
    say(out)
