"""`samplerbench figure`: figures for teaching, and the Pareto front of quality and latency."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from samplerbench.cli import common
from samplerbench.cli.numbers import parse_steps
from samplerbench.errors import UserError
from samplerbench.limits import MAX_BATCH, MAX_STEPS
from samplerbench.text import console, json_text, note, say

if TYPE_CHECKING:
    from samplerbench.figures.panel import Drawing
    from samplerbench.figures.scene import Scene

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Draw figures for teaching: steps, trajectory, interpolation, guidance, forward process; and the Pareto front "
    "of quality and latency. The suffix of the file sets the format: .png and .svg for still figures, .gif and .apng "
    "for animations.",
)

OneSampler = Annotated[
    str,
    typer.Option(
        "--sampler", "-s", help="Sampler, with optional parameters.", autocompletion=common.complete("sampler")
    ),
]
OneGuidance = Annotated[
    str,
    typer.Option(
        "--guidance", "-g", help="Guidance, with optional parameters.", autocompletion=common.complete("guidance")
    ),
]
Spacing = Annotated[
    str | None,
    typer.Option(
        "--spacing",
        help="Spacing of the noise levels: `karras:rho=7`. Default: the sampler's own spacing.",
        autocompletion=common.complete("spacing"),
    ),
]
RealData = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Real images: a data set name, a folder, zip or npz file. Default: the training data of the model.",
        autocompletion=common.complete("data set"),
    ),
]
Sigmas = Annotated[
    str | None, typer.Option("--sigmas", help="Comma-separated noise levels σ to show, in place of --columns.")
]
Animate = Annotated[
    bool,
    typer.Option(
        "--animate", help="Write an animation to a .png file too (APNG). A .gif or .apng file is always an animation."
    ),
]


def _shared(
    out: Annotated[Path, typer.Argument(help="File to write: .png, .svg, .gif or .apng.")],
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
    n: Annotated[int, typer.Option("--n", min=1, max=10_000, help="Number of samples, one per row.")] = 4,
    seed: common.Seed = 0,
    batch_size: Annotated[
        int,
        typer.Option("--batch-size", "-b", min=1, max=MAX_BATCH, help="Images per batch; does not change the images."),
    ] = 256,
    dtype: common.Dtype = "fp32",
    device: common.Device = "auto",
) -> None:
    """The options of every figure."""


@dataclass(frozen=True)
class Canvas:
    """The values of the options in `_shared`, for one command.

    Attributes:
        out: the file to write.
        request: arguments of the `Request`: model, labels, dtype, and how the model is loaded.
        n: number of samples.
        seed: the random seed.
        batch_size: images per batch.
        device: name of the device.
    """

    out: Path
    request: dict[str, Any]
    n: int
    seed: int
    batch_size: int
    device: str

    def scene(
        self,
        samplers: Sequence[str] = (),
        steps: Sequence[int] = (),
        guidances: Sequence[str] = ("none",),
        spacing: str | None = None,
        data: str | None = None,
    ) -> Scene:
        """Load the model and check the runs."""
        from samplerbench.bench.prepare import prepare
        from samplerbench.bench.request import Grid, Request
        from samplerbench.figures.scene import Scene

        grids = [Grid(samplers, steps, guidances=guidances, spacings=[spacing])] if samplers else []
        scene = Scene(prepare(Request(grids, **self.request), self.device), self.n, self.seed, self.batch_size, data)
        common.note_prompts(scene.prepared.model)
        _ = scene.labels
        return scene

    def moves(self, animate: bool) -> bool:
        """Whether the file is an animation. Raises UserError for an unsupported suffix."""
        from samplerbench.figures.output import pick_format

        return pick_format(self.out, animate) in ("gif", "apng")

    def still(self, drawing: Drawing) -> None:
        """Write a PNG or SVG, and print its name."""
        from samplerbench.figures.output import render_still
        from samplerbench.results.files import write_atomically

        write_atomically(self.out, render_still(drawing, "svg" if self.out.suffix.lower() == ".svg" else "png"))
        say(self.out)

    def animation(self, frames: Sequence[Drawing], seconds: float) -> None:
        """Write a GIF or animated PNG, and print its name."""
        from samplerbench.figures.output import render_animation
        from samplerbench.results.files import write_atomically

        form: Literal["gif", "apng"] = "gif" if self.out.suffix.lower() == ".gif" else "apng"
        write_atomically(self.out, render_animation(frames, form, seconds))
        say(self.out)


def _figure(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function (canvas, its own options) as a command with the options of `_shared`.

    Typer reads the options of a command from its signature, so the signature is assembled here.

    Args:
        defaults: defaults that replace those of `_shared`, by name.
    """

    def command(function: Callable[..., None]) -> Callable[..., None]:
        shared = [
            parameter.replace(default=defaults.get(name, parameter.default))
            for name, parameter in inspect.signature(_shared, eval_str=True).parameters.items()
        ]
        _, *own = inspect.signature(function, eval_str=True).parameters.values()

        def run(**given: Any) -> None:
            given["prompts"] = common.one_of_prompts(given.pop("prompt"), given["prompts"])
            text = common.text_options(*(given.pop(k) for k in ("image_size", "embedded_guidance", "memory")))
            loading = ("revision", "variant", "prompts", "negative_prompt", "lora", "scheduler", "config", "offline")
            request = text | {k: given.pop(k) for k in ("model", "labels", "dtype", *loading)}
            rest = {k: given.pop(k) for k in ("out", "n", "seed", "batch_size", "device")}
            function(Canvas(request=request, **rest), **given)

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*shared, *own)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command()(run)
        return function

    return command


@_figure()
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


@_figure(n=3)
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
    chosen = _chosen_sigmas(sigmas, columns)
    scene = canvas.scene([sampler], [steps], [guidance], spacing)
    (cell,) = scene.cells
    points = follow(scene, cell, columns or (steps + 1 if moves else 9), chosen)
    canvas.animation(frames(scene, cell, points), 0.12) if moves else canvas.still(still(scene, cell, points))


@_figure(n=3)
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


@_figure()
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

    if canvas.moves(False):
        raise UserError(f"{canvas.out}: this figure cannot be animated; write a .png or .svg file.")
    if guidance == "none":
        raise UserError("--guidance none has no scale; write --guidance NAME --scales 0,1,2,4,8.")
    if "scale=" in guidance:
        raise UserError(f"--guidance {guidance}: the scales are given by --scales; remove scale=.")
    specs = guidance_specs(guidance, [f"{scale:g}" for scale in _numbers(scales, "--scales")])
    canvas.still(still(canvas.scene([sampler], [steps], specs, spacing)))


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


@_figure(n=8)
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


@_figure(n=4)
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
    chosen = _chosen_sigmas(sigmas, columns)
    if timesteps is not None and (sigmas is not None or columns is not None):
        raise UserError("--timesteps, --sigmas and --columns cannot be combined; use one of them.")
    marks = None if timesteps is None else [int(t) for t in _numbers(timesteps, "--timesteps", whole=True)]
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


def _chosen_sigmas(sigmas: str | None, columns: int | None) -> list[float] | None:
    if sigmas is None:
        return None
    if columns is not None:
        raise UserError("--sigmas and --columns cannot be combined; use one of them.")
    return _numbers(sigmas, "--sigmas")


def _numbers(text: str, flag: str, whole: bool = False) -> list[float]:
    """The distinct numbers in a text like `0,1.5,20`. Raises UserError for other text and negative numbers."""
    found: list[float] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        try:
            number = int(part) if whole else float(part)
        except ValueError:
            kind = "a whole number" if whole else "a number"
            raise UserError(f'{flag} {text}: "{part}" is not {kind}; write {flag} 0,1,20.') from None
        if not 0 <= number <= 1e12:
            raise UserError(f"{flag} {part}: give numbers from 0 to 1e12.")
        if number not in found:
            found.append(number)
    if not found:
        raise UserError(f"{flag} is empty; write {flag} 0,1,20.")
    return found
