"""Classifiers for classifier guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass
class LoadedClassifier:
    """A loaded classifier.

    Attributes:
        module: the network. Its forward and backward passes are counted.
        sha256: hash of its weights.
        logits: function of x, (B, C, H, W), and σ, (B,), that returns logits, (B, K). A classifier of clean images
            ignores σ.
        classes: number of classes, K.
    """

    module: nn.Module
    sha256: str
    logits: Callable[[Tensor, Tensor], Tensor]
    classes: int

    def score(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """Compute ∇ₓ log p(y | x, σ) with one forward and one backward pass.

        Args:
            x: noisy states, or clean images, (B, C, H, W).
            sigma: noise levels, (B,).
            labels: class labels y, (B,) int64.

        Returns:
            The gradient, (B, C, H, W).
        """
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            log_p = self.logits(leaf, sigma).log_softmax(dim=1)
            chosen = log_p[torch.arange(len(x), device=x.device), labels.to(x.device)].sum()
            (score,) = torch.autograd.grad(chosen, leaf)
        return score


class Classified(Protocol):
    """The properties of a model that a classifier must match.

    Attributes:
        shape: shape (C, H, W) of the state.
        classes: number of classes. None for a model without labels.
        device: device of the network.
        dtype: dtype of the network's weights.
    """

    shape: tuple[int, int, int]
    classes: int | None
    device: torch.device
    dtype: torch.dtype

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the images."""
