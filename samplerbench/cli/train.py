"""`samplerbench train unet | classifier | features`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Train a U-Net, a noise-conditional classifier, or the feature network of an FID.",
)

Out = Annotated[Path, typer.Option("--out", help="Folder to write; a run that was stopped there goes on.")]
Data = Annotated[str, typer.Option("--data", help="`digits`, or a folder of images (sub-folders are classes).")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Images per step, over all processes.")]
Rate = Annotated[float, typer.Option("--lr", min=0.0, help="Learning rate of AdamW after the warm-up.")]
Warmup = Annotated[int, typer.Option("--warmup", min=0, help="Steps of linear warm-up.")]
Schedule = Annotated[Literal["constant", "cosine"], typer.Option("--schedule", help="After the warm-up.")]
Decay = Annotated[float, typer.Option("--weight-decay", min=0.0, help="AdamW's weight decay.")]
Ema = Annotated[float, typer.Option("--ema", min=0.0, max=1.0, help="Decay of the averaged weights.")]
Clip = Annotated[float, typer.Option("--grad-clip", min=0.0, help="Largest norm of the gradient.")]
Mixed = Annotated[Literal["no", "fp16", "bf16"], typer.Option("--mixed-precision", help="Precision of the network.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of everything random in the training.")]
Keep = Annotated[int, typer.Option("--checkpoint-every", min=1, help="Steps between checkpoints.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Train on the CPU even where there is a GPU.")]
Widths = Annotated[str, typer.Option("--channels", help="Widths of the resolutions, with commas.")]


def _widths(text: str, flag: str = "--channels") -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"{flag} {text}: give whole numbers with commas, like 64,128") from None


def _command() -> list[str]:
    return ["samplerbench", *sys.argv[1:]]


@app.command()
def unet(
    out: Out,
    data: Data = "digits",
    steps: Steps = 20_000,
    batch_size: Batch = 128,
    lr: Rate = 1e-3,
    warmup: Warmup = 500,
    schedule: Schedule = "cosine",
    weight_decay: Decay = 0.0,
    ema: Ema = 0.999,
    grad_clip: Clip = 1.0,
    mixed_precision: Mixed = "no",
    seed: Seed = 0,
    checkpoint_every: Keep = 1000,
    sample_every: Annotated[int, typer.Option(min=0, help="Steps between sample grids in OUT/samples; 0: none.")] = 0,
    cpu: Cpu = False,
    channels: Widths = "64,64",
    layers: Annotated[int, typer.Option(min=1, help="Residual blocks per resolution.")] = 1,
    attention: Annotated[str, typer.Option(help="Resolutions with attention, counted from 0.")] = "1",
    head_dim: Annotated[int, typer.Option(min=1, help="Channels per attention head.")] = 16,
    groups: Annotated[int, typer.Option(min=1, help="Groups of the group normalisation.")] = 8,
    dropout: Annotated[float, typer.Option(min=0.0, max=1.0, help="In the residual blocks.")] = 0.0,
    timesteps: Annotated[int, typer.Option(min=2, help="T, the number of noise levels.")] = 1000,
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

    Example: `samplerbench train unet --data digits --out runs/digits --steps 20000 --sample-every 2000`
    """
    from samplerbench.data import load_data
    from samplerbench.training.loop import TrainSettings, fit
    from samplerbench.training.unet import UNetSettings, UNetTask

    settings = TrainSettings(
        steps,
        batch_size,
        lr,
        warmup,
        schedule,
        weight_decay,
        ema,
        grad_clip,
        mixed_precision,
        seed,
        checkpoint_every,
        sample_every,
        cpu,
    )
    model = UNetSettings(
        channels=_widths(channels),
        layers=layers,
        attention=_widths(attention, "--attention"),
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
    images = load_data(data)
    _seed_weights(seed)
    fit(UNetTask(images, model), images, settings, out, _command())
    print(out)


@app.command()
def classifier(
    out: Out,
    data: Data = "digits",
    steps: Steps = 5000,
    batch_size: Batch = 256,
    lr: Rate = 1e-3,
    warmup: Warmup = 200,
    schedule: Schedule = "cosine",
    weight_decay: Decay = 0.05,
    ema: Ema = 0.999,
    grad_clip: Clip = 1.0,
    mixed_precision: Mixed = "no",
    seed: Seed = 0,
    checkpoint_every: Keep = 1000,
    cpu: Cpu = False,
    channels: Widths = "32,64,64",
    sigma_min: Annotated[float, typer.Option(min=1e-6, help="Smallest noise level.")] = 0.01,
    sigma_max: Annotated[float, typer.Option(min=1e-6, help="Largest noise level.")] = 157.0,
) -> None:
    """Train p(y | x, σ) for classifier guidance.

    Example: `samplerbench train classifier --data digits --out runs/classifier`
    """
    from samplerbench.data import load_data
    from samplerbench.training.classifier import ClassifierTask
    from samplerbench.training.loop import TrainSettings, fit

    settings = TrainSettings(
        steps,
        batch_size,
        lr,
        warmup,
        schedule,
        weight_decay,
        ema,
        grad_clip,
        mixed_precision,
        seed,
        checkpoint_every,
        0,
        cpu,
    )
    images = load_data(data)
    _seed_weights(seed)
    fit(ClassifierTask(images, _widths(channels), sigma_min, sigma_max), images, settings, out, _command())
    print(out)


@app.command()
def features(
    out: Out,
    data: Data = "digits",
    steps: Steps = 3000,
    batch_size: Batch = 128,
    lr: Rate = 1e-3,
    warmup: Warmup = 200,
    schedule: Schedule = "cosine",
    weight_decay: Decay = 0.05,
    ema: Ema = 0.999,
    grad_clip: Clip = 1.0,
    mixed_precision: Mixed = "no",
    seed: Seed = 0,
    checkpoint_every: Keep = 1000,
    cpu: Cpu = False,
    channels: Widths = "32,64",
    dimension: Annotated[int, typer.Option(min=2, help="d of the feature layer.")] = 64,
) -> None:
    """Train the network whose features an FID for these images is taken in.

    Example: `samplerbench train features --data digits --out runs/features`
    """
    from samplerbench.data import load_data
    from samplerbench.training.features import FeaturesTask
    from samplerbench.training.loop import TrainSettings, fit

    settings = TrainSettings(
        steps,
        batch_size,
        lr,
        warmup,
        schedule,
        weight_decay,
        ema,
        grad_clip,
        mixed_precision,
        seed,
        checkpoint_every,
        0,
        cpu,
    )
    _seed_weights(seed)
    task = FeaturesTask(load_data(data), _widths(channels), dimension)
    fit(task, task.train, settings, out, _command())
    print(out)


def _seed_weights(seed: int) -> None:
    import torch

    torch.manual_seed(seed)
