"""`samplerbench train unet | autoencoder | classifier | features`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from samplerbench.limits import MAX_BATCH, MAX_CHANNELS, MAX_SEED, MAX_TIMESTEPS, MAX_TRAINING_STEPS
from samplerbench.text import note, say

if TYPE_CHECKING:
    from samplerbench.data import ImageSet
    from samplerbench.training.loop import Task, TrainSettings

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Train a U-Net, an autoencoder, a noise-conditional classifier, or the feature network of an FID.",
)

Widths = Annotated[str, typer.Option("--channels", help="Widths of the resolutions, with commas.")]
Layers = Annotated[int, typer.Option("--layers", min=1, max=100, help="Residual blocks per resolution.")]
Groups = Annotated[int, typer.Option("--groups", min=1, max=MAX_CHANNELS, help="Groups of the group normalisation.")]


def _shared(
    out: Annotated[Path, typer.Option("--out", help="Folder to write; a run that was stopped there goes on.")],
    data: Annotated[
        str, typer.Option("--data", help="The name of a data set, or a folder of images (sub-folders are classes).")
    ] = "digits",
    steps: Annotated[int, typer.Option("--steps", min=1, max=MAX_TRAINING_STEPS, help="Optimiser steps.")] = 10_000,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=MAX_BATCH, help="Images per step, over all processes.")
    ] = 128,
    lr: Annotated[float, typer.Option("--lr", min=0.0, help="Learning rate of AdamW after the warm-up.")] = 1e-3,
    warmup: Annotated[
        int, typer.Option("--warmup", min=0, max=MAX_TRAINING_STEPS, help="Steps of linear warm-up.")
    ] = 200,
    schedule: Annotated[
        Literal["constant", "cosine"], typer.Option("--schedule", help="After the warm-up.")
    ] = "cosine",
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0.0, help="AdamW's weight decay.")] = 0.0,
    ema_decay: Annotated[float, typer.Option("--ema", min=0.0, max=1.0, help="Decay of the averaged weights.")] = 0.999,
    grad_clip: Annotated[float, typer.Option("--grad-clip", min=0.0, help="Largest norm of the gradient.")] = 1.0,
    mixed_precision: Annotated[
        Literal["no", "fp16", "bf16"], typer.Option("--mixed-precision", help="Precision of the network.")
    ] = "no",
    seed: Annotated[int, typer.Option("--seed", min=0, max=MAX_SEED, help="Of everything random in the training.")] = 0,
    checkpoint_every: Annotated[
        int, typer.Option("--checkpoint-every", min=1, max=MAX_TRAINING_STEPS, help="Steps between checkpoints.")
    ] = 1000,
    sample_every: Annotated[
        int,
        typer.Option(
            "--sample-every", min=0, max=MAX_TRAINING_STEPS, help="Steps between sample grids in OUT/samples; 0: none."
        ),
    ] = 0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Train on the CPU even where there is a GPU.")] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the network: slow to start, then faster.")
    ] = False,
    minutes: Annotated[
        float,
        typer.Option(
            "--minutes", min=0.0, help="Stop at a checkpoint after so long; the same command goes on. 0: never."
        ),
    ] = 0.0,
) -> None:
    """What every training command takes. Besides `out` and `data` the names are those of `TrainSettings`."""


class Run:
    """One training command's share of `_shared`: what a task is trained on, for how long, and where it is kept."""

    def __init__(self, out: Path, data: str, **settings: Any) -> None:
        self.out, self.source, self._settings = out, data, settings

    @property
    def settings(self) -> TrainSettings:
        """How long and how fast to learn."""
        from samplerbench.training.loop import TrainSettings

        return TrainSettings(**self._settings)

    def begin(self) -> ImageSet:
        """Load the data and seed the weights: call it before the task is made."""
        import torch

        from samplerbench.data import load_data

        images = load_data(self.source)
        torch.manual_seed(self.settings.seed)
        return images

    def fit(self, task: Task, images: ImageSet) -> None:
        """Train, write the folder, and print its name."""
        from samplerbench.training.loop import fit

        result = fit(task, images, self.settings, self.out, ["samplerbench", *sys.argv[1:]])
        if result.steps < self.settings.steps:
            note(
                f"{result.steps} of {self.settings.steps} steps are done and kept in {self.out}; run the same command "
                "to go on."
            )
            return
        say(self.out)


def _trains(without: tuple[str, ...] = (), **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function (run, its own options): with the options of `_shared`, and other defaults for some.

    Typer reads a command's options from its signature, so the signature is put together here.
    """

    def command(function: Callable[..., None]) -> Callable[..., None]:
        shared = [
            parameter.replace(default=defaults.get(name, parameter.default))
            for name, parameter in inspect.signature(_shared, eval_str=True).parameters.items()
            if name not in without
        ]
        _, *own = inspect.signature(function, eval_str=True).parameters.values()

        def run(**given: Any) -> None:
            function(Run(**{p.name: given.pop(p.name) for p in shared}), **given)

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*shared, *own)}
        app.command()(run)
        return function

    return command


def _widths(text: str, flag: str = "--channels") -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"{flag} {text}: give whole numbers with commas, like 64,128") from None
    if not all(0 <= number <= MAX_CHANNELS for number in found):
        raise typer.BadParameter(f"{flag} {text}: give numbers from 0 to {MAX_CHANNELS:,}")
    return found


@_trains(steps=20_000, warmup=500)
def unet(
    run: Run,
    latents: Annotated[
        str | None,
        typer.Option(
            "--latents", help="Folder of an autoencoder (`samplerbench train autoencoder`): train on its latents."
        ),
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(
            "--channels", help="Widths of the resolutions, with commas. Default: 64,64; with --latents one, 64."
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option("--layers", min=1, max=100, help="Residual blocks per resolution. Default: 1; with --latents 2."),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="Resolutions with attention, counted from 0. Default: 1; with --latents none but the middle."
        ),
    ] = None,
    head_dim: Annotated[int, typer.Option(min=1, max=MAX_CHANNELS, help="Channels per attention head.")] = 16,
    groups: Groups = 8,
    dropout: Annotated[float, typer.Option(min=0.0, max=1.0, help="In the residual blocks.")] = 0.0,
    timesteps: Annotated[int, typer.Option(min=2, max=MAX_TIMESTEPS, help="T, the number of noise levels.")] = 1000,
    beta_schedule: Annotated[
        Literal["linear", "scaled_linear", "squaredcos_cap_v2"],
        typer.Option(help="β_t of the forward process."),
    ] = "linear",
    unconditional: Annotated[bool, typer.Option("--unconditional", help="Ignore the labels.")] = False,
    label_dropout: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help='How often a label becomes "none": for classifier-free guidance.'),
    ] = 0.1,
    learn_variance: Annotated[
        bool, typer.Option("--learn-variance", help="Train the variance too, by L_simple + 0.001 L_vlb.")
    ] = False,
    clip_sample: Annotated[
        bool,
        typer.Option("--clip-sample", help="Have samplers clip x₀ to [-1, 1] (in the scheduler's config)."),
    ] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the images.")] = False,
) -> None:
    """Train a diffusers `UNet2DModel`; the folder loads with `DDPMPipeline.from_pretrained`.

    With --latents it learns the latents of an autoencoder, and the folder loads with `LDMPipeline.from_pretrained`.

    Examples:

    `samplerbench train unet --data digits --out runs/digits --steps 20000 --sample-every 2000`

    `samplerbench train unet --data digits --latents runs/autoencoder --out runs/latent`
    """
    from samplerbench.training.unet import UNetSettings, UNetTask

    settings = UNetSettings(
        channels=_widths(channels or ("64" if latents else "64,64")),
        layers=layers or (2 if latents else 1),
        attention=_widths(("" if latents else "1") if attention is None else attention, "--attention"),
        head_dim=head_dim,
        groups=groups,
        dropout=dropout,
        timesteps=timesteps,
        beta_schedule=beta_schedule,
        class_conditional=not unconditional,
        label_dropout=label_dropout,
        learn_variance=learn_variance,
        clip_sample=clip_sample,
        flip=flip,
    )
    images = run.begin()
    if latents is None:
        run.fit(UNetTask(images, settings), images)
        return
    from samplerbench.bench.setup import pick_device
    from samplerbench.training.latent import LatentUNetTask

    device = pick_device("cpu" if run.settings.cpu else "auto")
    run.fit(LatentUNetTask(images, settings, latents, device), images)


@_trains(steps=5000)
def autoencoder(
    run: Run,
    channels: Widths = "8,16,32",
    layers: Layers = 1,
    latent_channels: Annotated[int, typer.Option(min=1, max=MAX_CHANNELS, help="Channels of the latents.")] = 4,
    groups: Groups = 8,
    attention: Annotated[
        bool, typer.Option("--attention", help="Attention in the middle, as large ones have.")
    ] = False,
    error: Annotated[
        Literal["l2", "l1"], typer.Option(help="Reconstruction error: mean squares, or mean absolute values.")
    ] = "l2",
    kl: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Weight of the Kullback-Leibler divergence per pixel: 2s² of a decoder with noise s. More: a prior "
            "that fits better, and blurrier images.",
        ),
    ] = 1e-3,
) -> None:
    """Train a diffusers `AutoencoderKL` for latent diffusion. Each resolution after the first halves the images.

    Example: `samplerbench train autoencoder --data digits --out runs/autoencoder --channels 16,32 --sample-every 1000`
    """
    from samplerbench.training.autoencoder import AutoencoderSettings, AutoencoderTask

    settings = AutoencoderSettings(_widths(channels), layers, latent_channels, groups, attention, error, kl)
    images = run.begin()
    run.fit(AutoencoderTask(images, settings), images)


@_trains(without=("sample_every",), steps=5000, batch_size=256, weight_decay=0.05)
def classifier(
    run: Run,
    channels: Widths = "32,64,64",
    sigma_min: Annotated[float, typer.Option(min=1e-6, help="Smallest noise level.")] = 0.01,
    sigma_max: Annotated[float, typer.Option(min=1e-6, help="Largest noise level.")] = 157.0,
) -> None:
    """Train p(y | x, σ) for classifier guidance.

    Example: `samplerbench train classifier --data digits --out runs/classifier`
    """
    from samplerbench.training.classifier import ClassifierTask

    images = run.begin()
    run.fit(ClassifierTask(images, _widths(channels), sigma_min, sigma_max), images)


@_trains(without=("sample_every",), steps=3000, weight_decay=0.05)
def features(
    run: Run,
    channels: Widths = "32,64",
    dimension: Annotated[int, typer.Option(min=2, max=MAX_CHANNELS, help="d of the feature layer.")] = 64,
) -> None:
    """Train the network whose features an FID for these images is taken in.

    Example: `samplerbench train features --data digits --out runs/features`
    """
    from samplerbench.training.features import FeaturesTask

    task = FeaturesTask(run.begin(), _widths(channels), dimension)
    run.fit(task, task.train)
