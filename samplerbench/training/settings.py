"""How a training runs, and what it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["no", "fp16", "bf16"]


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast to learn.

    Attributes:
        batch_size: images per step, over all processes.
        mixed_precision: precision of the network. None: that of `accelerate launch`, otherwise "no".
        compile: compile the network with torch.compile.
        minutes: stop at a checkpoint after this time, to be resumed later; 0 disables it.
    """

    steps: int = 10_000
    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 500
    schedule: Literal["constant", "cosine"] = "cosine"
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


@dataclass
class TrainResult:
    """What a training run did: for the card."""

    steps: int
    images_seen: int
    seconds: float
    loss: float
    resumed: bool
