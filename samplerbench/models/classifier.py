"""A classifier beside a model: what a classifier guidance differentiates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass
class LoadedClassifier:
    """A classifier and what is known of it.

    Attributes:
        module: the network, whose passes are counted.
        sha256: hash of its weights.
        logits: (x (B, C, H, W), σ (B,)) to logits (B, K); a classifier of clean images ignores σ.
        classes: K, the number of its labels.
    """

    module: nn.Module
    sha256: str
    logits: Callable[[Tensor, Tensor], Tensor]
    classes: int


class Classified(Protocol):
    """What a classifier has to fit: a model's shapes, labels, device and dtype."""

    shape: tuple[int, int, int]
    classes: int | None
    device: torch.device
    dtype: torch.dtype

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
