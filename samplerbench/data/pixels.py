"""Conversion between the network's range [-1, 1] and uint8 pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8 pixels: round(clamp(x, -1, 1)·127.5 + 127.5)."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def dequantise(pixels: Tensor) -> Tensor:
    """Convert uint8 pixels to float32 images in [-1, 1]: pixels/127.5 - 1."""
    return pixels.float() / 127.5 - 1
