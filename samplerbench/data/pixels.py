"""The one rule from network range to pixels and back."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise(images: Tensor) -> Tensor:
    """uint8 pixels round(clamp(x, -1, 1)·127.5 + 127.5) of images in [-1, 1]; DESIGN's rule, before any feature."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def dequantise(pixels: Tensor) -> Tensor:
    """float32 images pixels/127.5 - 1 in [-1, 1] of uint8 pixels."""
    return pixels.float() / 127.5 - 1
