"""How a training runs, and what it did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from samplerbench.errors import UserError, argument

Precision = Literal["no", "fp16", "bf16"]


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast to learn.

    Attributes:
        batch_size: images per step, over all processes.
        cooldown: last steps of a constant schedule, in which the learning rate falls linearly to 0.
        mixed_precision: precision of the network. None: that of `accelerate launch`, otherwise "no".
        compile: compile the network with torch.compile.
        minutes: stop at a checkpoint after this time, to be resumed later; 0 disables it.
        evaluate_every: steps between evaluations on held-out images, if there are any.
        patience: stop after this number of evaluations without a better value; 0 disables it.

    Raises:
        UserError: a cooldown that is longer than the training, or with another schedule than "constant".
    """

    steps: int = 10_000
    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 500
    schedule: Literal["constant", "cosine"] = "cosine"
    cooldown: int = 0
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    grad_clip: float = 1.0
    mixed_precision: Precision | None = None
    seed: int = 0
    checkpoint_every: int = 1000
    sample_every: int = 0
    cpu: bool = False
    compile: bool = False
    minutes: float = 0.0
    evaluate_every: int = 500
    patience: int = 0

    def __post_init__(self) -> None:
        if self.cooldown and self.schedule != "constant":
            raise UserError(f"{argument('cooldown', self.cooldown)} requires {argument('schedule', 'constant')}.")
        if self.cooldown > self.steps:
            raise UserError(
                f"{argument('cooldown', self.cooldown)}: it must be at most {argument('steps', self.steps)}."
            )


@dataclass
class TrainResult:
    """What a training run did: for the card.

    Attributes:
        steps: steps so far.
        images_seen: images over all steps, with repetitions.
        seconds: time of the training.
        loss: running mean of the loss.
        resumed: whether the training was resumed.
        complete: whether the training has ended and the network is written. Not part of the card.
    """

    steps: int
    images_seen: int
    seconds: float
    loss: float
    resumed: bool
    complete: bool = True

    @property
    def record(self) -> dict[str, Any]:
        """The fields that are stored."""
        return {name: value for name, value in asdict(self).items() if name != "complete"}
