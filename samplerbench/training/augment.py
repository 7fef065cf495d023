"""Augmentations of training images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from samplerbench.training.loop import StepRandom


def random_shift(images: Tensor, pixels: int, probability: float, random: StepRandom) -> Tensor:
    """Shift each image with a probability, by integers that are uniform in [-pixels, pixels] in both directions.

    The border is filled with the nearest pixels of the image.

    Args:
        images: images, (B, C, H, W).
        pixels: largest shift, in pixels.
        probability: probability that an image is shifted.
        random: random numbers of the step.

    Returns:
        The shifted images, (B, C, H, W).
    """
    height, width = images.shape[2:]
    padded = nn.functional.pad(images, (pixels,) * 4, mode="replicate")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2 pixels + 1, 2 pixels + 1, H, W)
    rows, columns = random.integers(2 * pixels + 1), random.integers(2 * pixels + 1)
    shifted = random.uniform() < probability
    centre = torch.full_like(rows, pixels)
    rows, columns = rows.where(shifted, centre), columns.where(shifted, centre)
    return windows[torch.arange(len(images), device=images.device), :, rows, columns]
