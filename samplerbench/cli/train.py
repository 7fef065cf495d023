"""`samplerbench train unet | autoencoder | classifier | features`: train the networks of a benchmark."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from samplerbench.cli import common
from samplerbench.cli.numbers import parse_steps
from samplerbench.errors import UserError
from samplerbench.limits import MAX_BATCH, MAX_CHANNELS, MAX_SEED, MAX_TIMESTEPS, MAX_TRAINING_STEPS
from samplerbench.text import note, say

if TYPE_CHECKING:
    from samplerbench.data import ImageSet
    from samplerbench.training.loop import Task, TrainSettings
    from samplerbench.training.unet import UNetTask

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Train a U-Net, an autoencoder, a noise-conditional classifier, or a feature network for FID.",
)

Widths = Annotated[str, typer.Option("--channels", help="Comma-separated channel widths, one per resolution.")]
Layers = Annotated[int, typer.Option("--layers", min=1, max=100, help="Residual blocks per resolution.")]
Groups = Annotated[
    int, typer.Option("--groups", min=1, max=MAX_CHANNELS, help="Number of groups of the group normalisation.")
]


def _shared(
    out: Annotated[Path, typer.Option("--out", help="Folder to write. Training resumes from a checkpoint in it.")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="Data set name, or a folder of images (sub-folders are classes).",
            autocompletion=common.complete("data set"),
        ),
    ] = "digits",
    steps: Annotated[
        int,
        typer.Option(
            "--steps",
            min=1,
            max=MAX_TRAINING_STEPS,
            help="Number of optimiser steps. With `--schedule constant` it can be changed when training resumes.",
        ),
    ] = 10_000,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=MAX_BATCH, help="Images per step, over all processes.")
    ] = 128,
    lr: Annotated[float, typer.Option("--lr", min=0.0, help="Learning rate of AdamW, after warm-up.")] = 1e-3,
    warmup: Annotated[
        int, typer.Option("--warmup", min=0, max=MAX_TRAINING_STEPS, help="Number of linear warm-up steps.")
    ] = 200,
    schedule: Annotated[
        Literal["constant", "cosine"], typer.Option("--schedule", help="Learning rate schedule after warm-up.")
    ] = "cosine",
    cooldown: Annotated[
        int,
        typer.Option(
            "--cooldown",
            min=0,
            max=MAX_TRAINING_STEPS,
            help="Number of last steps in which the learning rate of `--schedule constant` falls linearly to 0. With "
            "`--steps`, it can be set when training resumes.",
        ),
    ] = 0,
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0.0, help="Weight decay of AdamW.")] = 0.0,
    ema_decay: Annotated[
        float,
        typer.Option("--ema", min=0.0, max=1.0, help="Decay of the exponential moving average (EMA) of the weights."),
    ] = 0.999,
    grad_clip: Annotated[float, typer.Option("--grad-clip", min=0.0, help="Maximum norm of the gradient.")] = 1.0,
    mixed_precision: Annotated[
        Literal["no", "fp16", "bf16"] | None,
        typer.Option(
            "--mixed-precision", help="Precision of the network. Default: that of `accelerate launch`, otherwise no."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=MAX_SEED, help="Random seed of the training.")] = 0,
    checkpoint_every: Annotated[
        int, typer.Option("--checkpoint-every", min=1, max=MAX_TRAINING_STEPS, help="Steps between checkpoints.")
    ] = 1000,
    sample_every: Annotated[
        int,
        typer.Option(
            "--sample-every",
            min=0,
            max=MAX_TRAINING_STEPS,
            help="Steps between sample grids in OUT/samples; 0 disables them.",
        ),
    ] = 0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Train on the CPU, even if a GPU is available.")] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the network with torch.compile: slower start, faster training.")
    ] = False,
    minutes: Annotated[
        float,
        typer.Option(
            "--minutes",
            min=0.0,
            help="Stop at a checkpoint after this time in minutes. The same command resumes. 0 disables the limit.",
        ),
    ] = 0.0,
) -> None:
    """The options of every training command. Except for `out` and `data`, the names are those of `TrainSettings`."""


class Run:
    """The values of the options in `_shared`, for one training command.

    Args:
        out: the folder to write.
        data: the data set name or folder.
        settings: arguments of `TrainSettings`.
    """

    def __init__(self, out: Path, data: str, **settings: Any) -> None:
        self.out, self.source, self._settings = out, data, settings

    @property
    def settings(self) -> TrainSettings:
        """The training settings."""
        from samplerbench.training.loop import TrainSettings

        return TrainSettings(**self._settings)

    def begin(self) -> ImageSet:
        """Load the data and set the random seed. Call it before the task is created.

        If `accelerate launch` should have started several CPU processes, they are started first.
        """
        import torch

        from samplerbench.bench.launch import start_the_others
        from samplerbench.data import load_data
        from samplerbench.training.loop import check_launch

        check_launch(self.settings)
        self._check_out()
        start_the_others()
        images = load_data(self.source)
        torch.manual_seed(self.settings.seed)
        return images

    def _check_out(self) -> None:
        """Check that the output is a folder, and that no finished model is overwritten."""
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out}: it is a file, not a folder; choose another folder.")
        names = ("model_index.json", "config.json", "samplerbench.json")
        models = [name for name in names if (self.out / name).exists()]
        if models and not (self.out / "checkpoint" / "state.safetensors").exists():
            raise UserError(
                f"--out {self.out}: the folder has a model ({models[0]}) and no checkpoint to resume from; choose "
                "another folder."
            )

    def hold_out(self, images: ImageSet, source: str | None, evaluate_every: int, patience: int) -> ImageSet | None:
        """Load the held-out images, and set how they are used."""
        from samplerbench.data import load_data

        if source is None:
            if patience:
                raise UserError("--patience requires --held-out.")
            return None
        found = load_data(source)
        if found.shape != images.shape:
            raise UserError(f"--held-out {source}: its images have another shape than those of {images.name}.")
        if found.sha256 == images.sha256:
            raise UserError(f"--held-out {source}: these are the training images.")
        self._settings |= {"evaluate_every": evaluate_every, "patience": patience}
        return found

    def fit(self, task: Task, images: ImageSet, held_out: ImageSet | None = None) -> None:
        """Train, write the output folder, and print its name."""
        from samplerbench.training.loop import fit

        result = fit(task, images, self.settings, self.out, ["samplerbench", *sys.argv[1:]], held_out)
        if not result.complete:
            note(
                f"stopped after {result.steps} of {self.settings.steps} steps; the checkpoint is in {self.out}. "
                f"Run the same "
                "command to resume."
            )
            return
        say(self.out)


def _trains(without: tuple[str, ...] = (), **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function (run, its own options) as a command with the options of `_shared`.

    Typer reads the options of a command from its signature, so the signature is assembled here.

    Args:
        without: options of `_shared` to omit.
        defaults: defaults that replace those of `_shared`, by name.
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
    least, example = (0, "0,1") if flag == "--attention" else (1, "64,128")
    numbers = tuple(parse_steps(text, flag, example, repeated=True)) if text else ()
    if not all(least <= number <= MAX_CHANNELS for number in numbers):
        raise UserError(f"{flag} {text}: give numbers from {least} to {MAX_CHANNELS:,}.")
    return numbers


@_trains(steps=20_000, warmup=500)
def unet(
    run: Run,
    latents: Annotated[
        str | None,
        typer.Option(
            "--latents",
            help="Folder of an autoencoder written by `samplerbench train autoencoder`: train on its latents.",
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="Model whose weights the training starts from: a name, a folder or a hub id. The options of the "
            "network must be those of the model. With --learn-variance, the model can be one without a learned "
            "variance.",
            autocompletion=common.complete("model"),
        ),
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(
            "--channels",
            help="Comma-separated channel widths, one per resolution. Default: 64,64; with --latents 64.",
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option("--layers", min=1, max=100, help="Residual blocks per resolution. Default: 1; with --latents 2."),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated indices of the resolutions with attention, from 0. Default: 1; with "
            "--latents, attention "
            "only in the middle block."
        ),
    ] = None,
    head_dim: Annotated[int, typer.Option(min=1, max=MAX_CHANNELS, help="Channels per attention head.")] = 16,
    groups: Groups = 8,
    dropout: Annotated[float, typer.Option(min=0.0, max=1.0, help="Dropout probability in the residual blocks.")] = 0.0,
    timesteps: Annotated[int, typer.Option(min=2, max=MAX_TIMESTEPS, help="Number of timesteps T.")] = 1000,
    beta_schedule: Annotated[
        Literal["linear", "scaled_linear", "squaredcos_cap_v2"],
        typer.Option(help="Schedule of β_t in the forward process."),
    ] = "linear",
    objective: Annotated[
        Literal["epsilon", "flow"],
        typer.Option(
            help="What the network predicts: the noise of a DDPM (epsilon), or the velocity of a rectified flow (flow)."
        ),
    ] = "epsilon",
    times: Annotated[
        Literal["uniform", "logit-normal"],
        typer.Option(help="Distribution of the time t in the training of a flow."),
    ] = "uniform",
    unconditional: Annotated[bool, typer.Option("--unconditional", help="Train without class labels.")] = False,
    label_dropout: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Probability of replacing a label by the null label, for classifier-free guidance."
        ),
    ] = 0.1,
    learn_variance: Annotated[
        bool, typer.Option("--learn-variance", help="Also learn the variance, with the loss L_simple + 0.001 L_vlb.")
    ] = False,
    clip_sample: Annotated[
        bool,
        typer.Option(
            "--clip-sample", help="Set clip_sample in the scheduler's configuration: samplers clip x₀ to [-1, 1]."
        ),
    ] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Flip images horizontally with probability 0.5.")] = False,
    shift: Annotated[
        int, typer.Option(min=0, max=64, help="Maximum random shift of the images, in pixels. 0 disables shifts.")
    ] = 0,
    shift_probability: Annotated[float, typer.Option(min=0.0, max=1.0, help="Probability of shifting an image.")] = 0.5,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Held-out images, for early stopping: the weights with the lowest variational bound (bits/dim) on "
            "them, or the lowest velocity error of a flow, are saved."
        ),
    ] = None,
    evaluate_every: Annotated[
        int, typer.Option(min=1, max=MAX_TRAINING_STEPS, help="Steps between evaluations on the held-out images.")
    ] = 500,
    patience: Annotated[
        int,
        typer.Option(
            min=0,
            max=MAX_TRAINING_STEPS,
            help="Stop after this number of evaluations without a lower bound. 0 trains for all steps.",
        ),
    ] = 0,
) -> None:
    """Train a diffusers `UNet2DModel`. Load the folder with `DDPMPipeline.from_pretrained`.

    With --objective flow, the network predicts the velocity of a rectified flow, and is saved with a
    `FlowMatchEulerDiscreteScheduler`. With --latents, the network is trained on the latents of an autoencoder. Load
    that folder with `LDMPipeline.from_pretrained`.

    Examples:

    `samplerbench train unet --data digits --out runs/digits --steps 20000 --sample-every 2000`

    `samplerbench train unet --data digits --latents runs/autoencoder --out runs/latent`
    """
    from samplerbench.training.unet import UNetSettings, UNetTask

    widths = _widths(channels or ("64" if latents else "64,64"))
    attended = _widths(("" if latents else "1") if attention is None else attention, "--attention")
    if attention is not None and any(index >= len(widths) for index in attended):
        last = len(widths) - 1
        raise UserError(f"--attention {max(attended)}: --channels gives the resolutions 0 to {last}.")
    settings = UNetSettings(
        channels=widths,
        layers=layers or (2 if latents else 1),
        attention=attended,
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
        shift=shift,
        shift_probability=shift_probability,
        objective=objective,
        times=times,
    )
    if times != "uniform" and objective != "flow":
        raise UserError(f"--times {times} requires --objective flow.")
    if latents is not None and objective == "flow":
        raise UserError("--objective flow trains on images; leave out --latents.")
    images = run.begin()
    reference = run.hold_out(images, held_out, evaluate_every, patience)
    if latents is None:
        from samplerbench.training.flow import FlowTask

        task = (FlowTask if objective == "flow" else UNetTask)(images, settings)
        _start_from(task, init)
        run.fit(task, images, reference)
        return
    from samplerbench.bench.setup import pick_device
    from samplerbench.training.latent import LatentUNetTask

    device = pick_device("cpu" if run.settings.cpu else "auto")
    latent = LatentUNetTask(images, settings, latents, device)
    _start_from(latent, init)
    run.fit(latent, images, reference)


def _start_from(task: UNetTask, source: str | None) -> None:
    """Load the model of --init, and copy its weights into the network of a task."""
    import torch

    from samplerbench.bench.setup import load_model

    if source is not None:
        task.start_from(load_model(source, torch.device("cpu"), "fp32"))


@_trains(steps=5000)
def autoencoder(
    run: Run,
    channels: Widths = "8,16,32",
    layers: Layers = 1,
    latent_channels: Annotated[
        int, typer.Option(min=1, max=MAX_CHANNELS, help="Number of channels of the latents.")
    ] = 4,
    groups: Groups = 8,
    attention: Annotated[bool, typer.Option("--attention", help="Use attention in the middle block.")] = False,
    error: Annotated[
        Literal["l2", "l1"], typer.Option(help="Reconstruction loss: mean squared (l2) or mean absolute (l1) error.")
    ] = "l2",
    kl: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Weight of the KL divergence per pixel, 2s² for a decoder with noise s. A larger weight gives latents "
            "closer to the prior, and blurrier images.",
        ),
    ] = 1e-3,
) -> None:
    """Train a diffusers `AutoencoderKL` for latent diffusion. Each resolution after the first halves the image size.

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
    sigma_min: Annotated[float, typer.Option(min=1e-6, help="Smallest noise level σ.")] = 0.01,
    sigma_max: Annotated[float, typer.Option(min=1e-6, help="Largest noise level σ.")] = 157.0,
) -> None:
    """Train a noise-conditional classifier p(y | x, σ) for classifier guidance.

    Example: `samplerbench train classifier --data digits --out runs/classifier`
    """
    from samplerbench.training.classifier import ClassifierTask

    images = run.begin()
    run.fit(ClassifierTask(images, _widths(channels), sigma_min, sigma_max), images)


@_trains(without=("sample_every",), steps=3000, weight_decay=0.05)
def features(
    run: Run,
    channels: Widths = "32,64",
    dimension: Annotated[int, typer.Option(min=2, max=MAX_CHANNELS, help="Dimension d of the features.")] = 64,
) -> None:
    """Train a classifier whose features are used for FID on these images.

    Example: `samplerbench train features --data digits --out runs/features`
    """
    from samplerbench.training.features import FeaturesTask

    task = FeaturesTask(run.begin(), _widths(channels), dimension)
    run.fit(task, task.train)
