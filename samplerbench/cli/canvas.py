"""The options and the output of every command of `samplerbench figure`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from samplerbench.cli import common
from samplerbench.errors import UserError
from samplerbench.limits import MAX_BATCH
from samplerbench.text import say

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


def shared_options(
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
    """The values of the options in `shared_options`, for one command.

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

    def restoring(
        self,
        samplers: Sequence[str],
        steps: int,
        guidances: Sequence[str],
        spacing: str | None,
        task: str,
        samples: int,
        data: str | None,
    ) -> Scene:
        """Load the model with observations of n real images, and check the runs. Each image has several samples."""
        from dataclasses import replace

        from samplerbench.bench.prepare import prepare
        from samplerbench.bench.request import Grid, Request
        from samplerbench.bench.truth import load_truth
        from samplerbench.figures.scene import Scene

        grid = Grid(samplers, [steps], guidances=guidances or ["none"], spacings=[spacing])
        prepared = prepare(Request([grid], tasks=(task,), **self.request), self.device)
        truth = load_truth(prepared.model, data, self.n, prepared.tasks)
        observed = replace(truth, images=truth.images[: self.n]).observed(prepared.model, prepared.tasks[0], self.seed)
        prepared = replace(prepared, model=observed)
        scene = Scene(prepared, self.n * samples, self.seed, self.batch_size, data)
        _ = scene.labels
        return scene

    def check_still(self) -> None:
        """Raise UserError if the file is an animation, or has an unsupported suffix."""
        if self.moves(False):
            raise UserError(f"{self.out}: this figure cannot be animated; write a .png or .svg file.")

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


def figure_command(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function (canvas, its own options) as a command with the options of `shared_options`.

    Typer reads the options of a command from its signature, so the signature is assembled here.

    Args:
        defaults: defaults that replace those of `shared_options`, by name.
    """

    def command(function: Callable[..., None]) -> Callable[..., None]:
        shared = [
            parameter.replace(default=defaults.get(name, parameter.default))
            for name, parameter in inspect.signature(shared_options, eval_str=True).parameters.items()
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


def chosen_sigmas(sigmas: str | None, columns: int | None) -> list[float] | None:
    if sigmas is None:
        return None
    if columns is not None:
        raise UserError("--sigmas and --columns cannot be combined; use one of them.")
    return numbers(sigmas, "--sigmas")


def numbers(text: str, flag: str, whole: bool = False) -> list[float]:
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
