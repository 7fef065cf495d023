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

    def score(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """∇ₓ log p(y | x, σ), (B, C, H, W): one forward and one backward pass.

        Args:
            x: (B, C, H, W), noisy states, or clean images.
            sigma: (B,), their noise levels.
            labels: (B,) int64, y.
        """
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            log_p = self.logits(leaf, sigma).log_softmax(dim=1)
            chosen = log_p[torch.arange(len(x), device=x.device), labels.to(x.device)].sum()
            (score,) = torch.autograd.grad(chosen, leaf)
        return score


class Classified(Protocol):
    """What a classifier has to fit: a model's shapes, labels, device and dtype."""

    shape: tuple[int, int, int]
    classes: int | None
    device: torch.device
    dtype: torch.dtype

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
