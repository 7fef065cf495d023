"""The training loop: AdamW with warm-up, EMA weights, gradient clipping, and exact resuming.

All random choices of a step (images, noise levels, noise, dropout) depend only on the seed and the step. A resumed run
therefore continues the same experiment, for any number of processes.
"""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from samplerbench.data import ImageSet
from samplerbench.data.pixels import dequantise
from samplerbench.errors import LaunchError, RunError, UserError, argument
from samplerbench.launcher import PRECISIONS, check_gpu, check_sharding, is_set, mixed_precision
from samplerbench.results.tensors import load_tensors, save_tensors
from samplerbench.tensor_seal import DamagedError
from samplerbench.text import console, printable, say
from samplerbench.training.card import write_card
from samplerbench.training.settings import Precision, TrainResult, TrainSettings
from samplerbench.untrusted import parse_json, reason


class StepRandom:
    """The random numbers of one training step.

    Args:
        seed: seed of the training.
        step: number of the step.
        share: the rows of the batch on this process.
        total: size of the whole batch.
        device: device of the random numbers.
    """

    def __init__(self, seed: int, step: int, share: slice, total: int, device: torch.device) -> None:
        self.share, self.total, self.device = share, total, device
        self.generator = torch.Generator(device).manual_seed(step_seed(seed, step))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers for the rows of this process, (B, *shape)."""
        return torch.randn((self.total, *shape), generator=self.generator, device=self.device)[self.share]

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), (B, *shape)."""
        return torch.rand((self.total, *shape), generator=self.generator, device=self.device)[self.share]

    def integers(self, high: int) -> Tensor:
        """Integers 0 … high-1, (B,) int64."""
        draw = torch.randint(high, (self.total,), generator=self.generator, device=self.device)
        return draw[self.share]


def step_seed(seed: int, step: int) -> int:
    """A 63-bit seed for one step (SplitMix64's finaliser over both numbers)."""
    z = (seed * 0x9E3779B97F4A7C15 + step + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) >> 1


class Task(ABC):
    """Base class of training tasks: the network, its loss, and how it is saved.

    Attributes:
        what: kind of the network in the card.
        network: the network to train.
        value: name and unit of the value on held-out images.
    """

    what: str
    value: ClassVar[tuple[str, str]] = ("bound", "bits/dim")
    network: nn.Module

    @abstractmethod
    def loss(self, network: nn.Module, images: Tensor, labels: Tensor | None, random: StepRandom) -> Tensor:
        """The loss of a batch.

        Args:
            network: the network, wrapped for distributed training.
            images: (B, C, H, W) in [-1, 1], or the value of `inputs`.
            labels: (B,) int64, or None.
            random: random numbers of this step.

        Returns:
            A scalar tensor.
        """

    @abstractmethod
    def save(self, network: nn.Module, out: Path) -> dict[str, Any]:
        """Save the trained network to a folder. Returns entries for the card."""

    def inputs(self, data: ImageSet, index: Tensor, device: torch.device) -> Tensor:
        """The input of `loss` for the images at `index` (B,) int64: images in [-1, 1], (B, C, H, W)."""
        return dequantise(data.images[index].to(device))

    def evaluator(self, data: ImageSet) -> Callable[[nn.Module], float]:
        """A function that evaluates the network on held-out images, for early stopping. Lower values are better.

        The function is called with the network with its EMA weights, in evaluation mode.

        Args:
            data: the held-out images.

        Raises:
            UserError: the task cannot be evaluated, or not on these images.
        """
        raise UserError(f"{argument('held_out')} cannot be used for the kind of network {self.what}.")

    def parts(self) -> dict[str, Tensor]:
        """The terms of the last loss for the log: name → scalar tensor. Empty for a loss with a single term."""
        return {}

    def identity(self) -> dict[str, Any]:
        """Settings that must not change when training resumes, in addition to those of the loop and the data."""
        return {}

    def preview(self, network: nn.Module, file: Path) -> None:
        """Write a PNG of samples of the current network, if it can generate images."""
        return


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The indices of the images in batch `step`: consecutive parts of one seeded permutation per epoch."""
    start = step * batch_size
    epochs = range(start // n, (start + batch_size - 1) // n + 1)
    orders = [torch.randperm(n, generator=torch.Generator().manual_seed(step_seed(seed, -2 - e))) for e in epochs]
    offset = start - epochs[0] * n
    return torch.cat(orders)[offset : offset + batch_size]


def learning_rate(settings: TrainSettings, step: int) -> float:
    """The learning rate of a step: linear warm-up, then a half cosine to zero, or constant with a linear cooldown.

    A constant rate with a cooldown reaches the loss of a cosine schedule of the same length, and the length need not
    be known before the cooldown begins (Hägele et al. 2024).
    """
    rate = settings.lr * min(1.0, (step + 1) / max(1, settings.warmup))
    if settings.schedule == "cosine" and step >= settings.warmup:
        span = max(1, settings.steps - settings.warmup)
        rate *= 0.5 * (1 + math.cos(math.pi * (step - settings.warmup) / span))
    if (left := settings.steps - step) < settings.cooldown:
        rate *= left / settings.cooldown
    return rate


class HeldOut:
    """Early stopping: the EMA weights with the lowest value on held-out images.

    Args:
        task: the task.
        data: the held-out images.
        settings: the training settings.

    Attributes:
        curve: (step, value) of every evaluation.
        best: the EMA weights with the lowest value, one tensor per parameter.
    """

    def __init__(self, task: Task, data: ImageSet, settings: TrainSettings) -> None:
        self.data, self.settings, self.name = data, settings, task.value[0]
        self.value = task.evaluator(data)
        self.curve: list[tuple[int, float]] = []
        self.best: list[Tensor] = []

    def evaluate(self, step: int, network: nn.Module, ema: Any, accelerator: Any) -> float:
        """Evaluate the EMA weights after a step. All processes use the value of the main process."""
        from accelerate.utils import broadcast

        with _ema_weights(ema, network):
            value = self.value(network)
        if accelerator.num_processes > 1:
            value = float(broadcast(torch.tensor(value, dtype=torch.float64, device=accelerator.device)))
        if not self.curve or value < self.lowest[1]:
            self.best = [p.detach().clone() for p in ema.shadow_params]
        self.curve.append((step, value))
        return value

    @property
    def lowest(self) -> tuple[int, float]:
        """The first (step, value) with the lowest value."""
        return min(self.curve, key=lambda point: point[1])

    @property
    def over(self) -> bool:
        """Whether the last `patience` evaluations did not improve the value."""
        patience = self.settings.patience
        since = [step for step, _ in self.curve if step > self.lowest[0]] if self.curve else []
        return 0 < patience <= len(since)

    def card(self) -> dict[str, Any]:
        """Entries for the card."""
        step, value = self.lowest
        data = {"name": self.data.name, "split": self.data.split, "images": len(self.data), "sha256": self.data.sha256}
        return {"held_out": {"data": data, self.name.replace(" ", "_"): value, "step": step, "curve": self.curve}}


def fit(
    task: Task,
    data: ImageSet,
    settings: TrainSettings,
    out: Path,
    command: Sequence[str] = (),
    held_out: ImageSet | None = None,
) -> TrainResult:
    """Train a network, and write the output folder. Training resumes from `out/checkpoint` if it exists.

    If the time limit is reached first, only the checkpoint is written. With held-out images, the EMA weights with the
    lowest value on them (`Task.evaluator`) are saved instead of the last ones.

    Args:
        task: the network and its loss.
        data: the training data.
        settings: the training settings.
        out: folder to write.
        command: the command line, recorded in the card.
        held_out: held-out images for early stopping.

    Raises:
        LaunchError: accelerate is configured for a mode or a precision that is not supported.
        UserError: a checkpoint with other settings, or a batch size that is not divisible by the number of processes.
        RunError: a loss that is not finite.
    """
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    check_launch(settings)
    settings = replace(settings, mixed_precision=pick_precision(settings.mixed_precision))
    accelerator = Accelerator(mixed_precision=settings.mixed_precision, cpu=settings.cpu)
    world, rank = accelerator.num_processes, accelerator.process_index
    if settings.batch_size % world:
        raise UserError(f"{argument('batch_size', settings.batch_size)} cannot be shared by {world} processes.")
    share_size = settings.batch_size // world
    share = slice(rank * share_size, (rank + 1) * share_size)
    device = accelerator.device

    network = task.network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    ema = EMAModel(network.parameters(), decay=settings.ema_decay, foreach=True)
    fixed = {k: v for k, v in asdict(settings).items() if k in _FIXED}
    fixed |= {**task.identity(), "data": f"{data.name} {data.sha256[:12]}"}
    stopping = None if held_out is None else HeldOut(task, held_out, settings)
    fixed |= {"held_out": "none" if held_out is None else f"{held_out.name} {held_out.sha256[:12]}"}
    if held_out is not None:
        fixed |= {"evaluate_every": settings.evaluate_every, "patience": settings.patience}
    checkpoint = out / "checkpoint" / "state.safetensors"
    first, before = 0, TrainResult(0, 0, 0.0, math.nan, False)
    if checkpoint.exists():
        before = _load_checkpoint(checkpoint, network, ema, optimizer, fixed, task.what, accelerator.scaler, stopping)
        first = before.steps
    if accelerator.gather(torch.tensor([first], device=device)).unique().numel() > 1:
        raise UserError(
            f"{argument('out', str(out))}: not all processes find the same checkpoint. With several machines, use a "
            "folder on a shared file system."
        )
    last = settings.steps if stopping is None or not stopping.over else first
    ema.to(device)
    model, optimizer = accelerator.prepare(network, optimizer)
    forward: Any = torch.compile(model) if settings.compile else model

    labels = data.labels
    started, loss_mean = time.monotonic(), before.loss
    with _Progress(task.what, settings.steps, first, accelerator.is_main_process, task.value) as progress:
        for step in range(first, last):
            index = batch_indices(len(data), settings.batch_size, settings.seed, step)[share]
            x = task.inputs(data, index, device)
            y = None if labels is None else labels[index].to(device)
            torch.manual_seed(step_seed(settings.seed + rank + 1, step))  # dropout
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)
            model.train()
            with accelerator.autocast():
                random = StepRandom(settings.seed, step, share, settings.batch_size, device)
                loss = task.loss(forward, x, y, random)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), settings.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.step(network.parameters())

            done = step + 1
            if done % 20 == 0 or done == settings.steps:
                value = accelerator.reduce(loss.detach(), reduction="mean").item()
                if not math.isfinite(value):
                    raise RunError(
                        f"the loss is {value} at step {step}; lower {argument('lr')} or use "
                        f"{argument('mixed_precision', 'no')}."
                    )
                loss_mean = value if math.isnan(loss_mean) else 0.95 * loss_mean + 0.05 * value
                progress.update(done, loss_mean, (done - first) * settings.batch_size, task.parts())
            result = TrainResult(
                done,
                before.images_seen + (done - first) * settings.batch_size,
                before.seconds + time.monotonic() - started,
                loss_mean,
                first > 0,
            )
            evaluated = stopping is not None and (done % settings.evaluate_every == 0 or done == settings.steps)
            if stopping is not None and evaluated:
                progress.say(done, stopping.evaluate(done, network, ema, accelerator))
            over = stopping is not None and stopping.over
            late = done % 20 == 0 and settings.minutes and done < settings.steps and not over
            if late:
                elapsed = torch.tensor(time.monotonic() - started, device=device)
                late = accelerator.reduce(elapsed, reduction="mean").item() > 60 * settings.minutes
            if accelerator.is_main_process:
                if settings.sample_every and done % settings.sample_every == 0:
                    (out / "samples").mkdir(parents=True, exist_ok=True)
                    with _ema_weights(ema, network):
                        task.preview(network, out / "samples" / f"step-{done:06d}.png")
                if done % settings.checkpoint_every == 0 or done == settings.steps or late or over:
                    scaler = accelerator.scaler
                    _save_checkpoint(checkpoint, network, ema, optimizer, fixed, task.what, result, scaler, stopping)
            if late:
                accelerator.wait_for_everyone()
                return replace(result, complete=False)
            if over:
                break
    if first >= last:
        result = before
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if stopping is not None:
            ema.shadow_params = [best.to(device) for best in stopping.best]
        with _ema_weights(ema, network):
            network.eval()
            figures = task.save(network, out) | ({} if stopping is None else stopping.card())
        write_card(out, task.what, data, settings, result, figures, command)
    accelerator.wait_for_everyone()
    return result


def check_launch(settings: TrainSettings) -> None:
    """Check that the launcher is configured for something that training supports.

    Args:
        settings: the training settings.

    Raises:
        LaunchError: DeepSpeed, FSDP or a similar mode, a precision that is not supported, or processes for GPUs without
            a GPU.
    """
    check_sharding()
    if not settings.cpu:
        check_gpu(torch.accelerator.is_available())
    if settings.mixed_precision is None and mixed_precision() not in PRECISIONS:
        raise LaunchError(
            f"mixed_precision is {mixed_precision()} in accelerate's configuration; training supports "
            f"{', '.join(PRECISIONS)}. Pass one of them as {argument('mixed_precision')}."
        )
    on_cpu = settings.cpu or is_set(os.environ, "ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if on_cpu and pick_precision(settings.mixed_precision) == "fp16":
        raise LaunchError(  # accelerate would train with fp32
            f"{argument('mixed_precision', 'fp16')}: it requires a GPU; use {argument('mixed_precision', 'bf16')} or "
            f"{argument('mixed_precision', 'no')}."
        )


def pick_precision(given: Precision | None) -> Precision:
    """The precision of a training: the given one, otherwise that of `accelerate launch`, otherwise "no"."""
    return given or cast(Precision, mixed_precision())


class _ema_weights:  # noqa: N801 - used as a with-statement's verb
    """Inside, the network has the EMA weights; after, its own."""

    def __init__(self, ema: Any, network: nn.Module) -> None:
        self.ema, self.network = ema, network

    def __enter__(self) -> None:
        self.training = self.network.training
        self.network.eval()
        self.ema.store(self.network.parameters())
        self.ema.copy_to(self.network.parameters())

    def __exit__(self, *_: object) -> None:
        self.ema.restore(self.network.parameters())
        self.network.train(self.training)


class _Progress:
    """A bar with loss and images/s on a terminal; a plain line every 500 steps elsewhere."""

    def __init__(self, what: str, total: int, first: int, show: bool, value: tuple[str, str]) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = console(stderr=True)
        self.show, self.total, self.what, self.started, self.value = show, total, what, time.monotonic(), value
        self.bar = Progress(
            TextColumn("training {task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} images/s"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (show and self.console.is_terminal),
        )
        self.id = self.bar.add_task(printable(what), total=total, completed=first, loss=math.nan, rate=0.0)

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, done: int, loss: float, images: int, parts: dict[str, Tensor]) -> None:
        rate = images / max(1e-9, time.monotonic() - self.started)
        self.bar.update(self.id, completed=done, loss=loss, rate=rate)
        if self.show and not self.console.is_terminal and (done % 500 == 0 or done == self.total):
            of = "".join(f"  {name} {float(value):.4g}" for name, value in parts.items())
            say(f"training {self.what}: step {done}/{self.total}  loss {loss:.4f}{of}  {rate:.0f} images/s")

    def say(self, step: int, value: float) -> None:
        """Print a value on held-out images."""
        if self.show:
            name, unit = self.value
            done = f"training {self.what}: step {step}/{self.total}"
            self.console.print(f"{done}  held-out {name} {value:.4f} {unit}".rstrip())


# What must not change between the parts of one run. The rest (how often to save or draw) may.
_FIXED = {
    *("steps", "batch_size", "lr", "warmup", "schedule", "cooldown"),
    *("weight_decay", "ema_decay", "grad_clip", "mixed_precision", "seed"),
}


def _save_checkpoint(
    file: Path,
    network: nn.Module,
    ema: Any,
    optimizer: Any,
    fixed: dict[str, Any],
    what: str,
    result: TrainResult,
    scaler: Any,
    stopping: HeldOut | None = None,
) -> None:
    tensors = {f"model.{i}": p.detach() for i, p in enumerate(network.parameters())}
    tensors |= {f"buffer.{i}": b for i, b in enumerate(network.buffers())}
    tensors |= {f"ema.{i}": p for i, p in enumerate(ema.shadow_params)}
    tensors |= {f"best.{i}": p for i, p in enumerate(stopping.best if stopping is not None else [])}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adamw.{i}.{key}": torch.as_tensor(value) for key, value in state.items()}
    metadata = {
        "what": what,
        "settings": json.dumps(fixed),
        "result": json.dumps(result.record),
        "ema_steps": str(ema.optimization_step),
        "scaler": json.dumps(scaler.state_dict() if scaler is not None else {}),
        "curve": json.dumps(stopping.curve if stopping is not None else []),
    }
    save_tensors(file, {name: t.detach().cpu().clone() for name, t in tensors.items()}, metadata)


def _load_checkpoint(
    file: Path,
    network: nn.Module,
    ema: Any,
    optimizer: torch.optim.Optimizer,
    fixed: dict[str, Any],
    what: str,
    scaler: Any,
    stopping: HeldOut | None = None,
) -> TrainResult:
    try:
        found = load_tensors(file)
        metadata, tensors = found.metadata, found.tensors
        made_with, result = parse_json(metadata["settings"]), _result(parse_json(metadata["result"]))
        ema_steps, made_for = int(metadata["ema_steps"]), metadata["what"]
        scaled = parse_json(metadata["scaler"])
        curve = _curve(parse_json(metadata.get("curve", "[]")))
        if not isinstance(made_with, dict) or ema_steps < 0:
            raise ValueError("its settings are no object, or its number of steps is below 0")
    except (DamagedError, OSError, KeyError, ValueError) as error:
        raise UserError(f"the checkpoint {file} is damaged ({reason(error)}); remove it to start anew.") from None
    current = json.loads(json.dumps(fixed))
    made_with.setdefault("held_out", "none")  # before version 0.1.0 had early stopping
    made_with.setdefault("cooldown", 0)
    # Before the cooldown, a constant learning rate does not depend on the number of steps.
    constant = current.get("schedule") == "constant"
    begun = any(result.steps > s.get("steps", 0) - s["cooldown"] for s in (current, made_with) if s.get("cooldown"))
    free = {"steps", "cooldown"} if constant and not begun else set()
    differing = [k for k in current if k in made_with and made_with[k] != current[k] and k not in free]
    if made_for != what or differing:
        other = f"what {made_for}" if made_for != what else ", ".join(f"{k} {made_with[k]}" for k in differing)
        raise UserError(
            f"the checkpoint {file} was made with {other}; use the same settings, or another {argument('out')} to "
            "start anew."
        )
    if result.steps > current.get("steps", result.steps):
        raise UserError(
            f"the checkpoint {file} has {result.steps} steps; use {argument('steps', result.steps)} or more, or "
            f"another {argument('out')} to start anew."
        )
    for i, parameter in enumerate(network.parameters()):
        stored = tensors.get(f"model.{i}")
        if stored is None or stored.shape != parameter.shape:
            raise UserError(
                f"the checkpoint {file} is of another network; use another {argument('out')} to start anew."
            )
    try:
        with torch.no_grad():
            for i, parameter in enumerate(network.parameters()):
                parameter.copy_(tensors[f"model.{i}"])
                ema.shadow_params[i].copy_(tensors[f"ema.{i}"])
            for i, buffer in enumerate(network.buffers()):
                buffer.copy_(tensors[f"buffer.{i}"])
        ema.optimization_step = ema_steps
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("adamw."):
                _, index, field = key.split(".")
                state.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        if scaler is not None and scaled:
            scaler.load_state_dict(scaled)
        if stopping is not None and curve:
            stopping.curve = curve
            stopping.best = [tensors[f"best.{i}"].reshape(p.shape) for i, p in enumerate(network.parameters())]
    except Exception as error:  # tensors that are missing, or of another shape or type
        raise UserError(f"the checkpoint {file} is damaged ({reason(error)}); remove it to start anew.") from None
    return result


def _result(written: Any) -> TrainResult:
    """What a checkpoint says of the training so far. Raises ValueError where it is not that."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "steps": int,
        "images_seen": int,
        "seconds": (int, float),
        "loss": (int, float),
        "resumed": bool,
    }
    if not isinstance(written, dict) or written.keys() != kinds.keys():
        raise ValueError("its result is not one of a training")
    for key, kind in kinds.items():
        if not isinstance(written[key], kind) or (kind is not bool and isinstance(written[key], bool)):
            raise ValueError(f"{key} in its result is {written[key]!r}")
    if min(written["steps"], written["images_seen"], written["seconds"]) < 0:
        raise ValueError("a number in its result is below 0")
    return TrainResult(**written)


def _curve(written: Any) -> list[tuple[int, float]]:
    """The values on held-out images of a checkpoint. Raises ValueError where it has none."""
    if not isinstance(written, list):
        raise ValueError("its curve is not a list")
    points = []
    for point in written:
        if not isinstance(point, list) or len(point) != 2 or not all(isinstance(x, int | float) for x in point):
            raise ValueError("its curve has an invalid point")
        points.append((int(point[0]), float(point[1])))
    return points
