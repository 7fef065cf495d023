"""Sample grids: several images in one PNG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from samplerbench.data.pixels import quantise

MAX_PIXELS = 2**24
"""Maximum number of pixels of the images in the grid of a cell: 16 images of 1024x1024, 64 of 512x512."""


def grid_size(most: int, image_shape: tuple[int, ...]) -> int:
    """The number of images in the grid of a cell: at least 1, and at most as many as have `MAX_PIXELS` pixels.

    Args:
        most: maximum number of images.
        image_shape: (C, H, W) of an image.
    """
    return max(1, min(most, MAX_PIXELS // (image_shape[-2] * image_shape[-1])))


def save_grid(
    images: Tensor,
    file: Path | IO[bytes],
    columns: int | None = None,
    least_side: int = 32,
    gap: int | None = None,
) -> None:
    """Write images as a grid in one PNG. Small images are enlarged by an integer factor.

    Args:
        images: (n, C, H, W), uint8 or in [-1, 1].
        file: path or binary stream to write.
        columns: the number of columns; None for a square grid.
        least_side: the minimum height of an image, in pixels.
        gap: pixels between images; None for half the factor of enlargement.
    """
    from PIL import Image

    pixels = images if images.dtype == torch.uint8 else quantise(images)
    n, channels, height, width = pixels.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    zoom = max(1, math.ceil(least_side / height))
    pixels = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    gap = max(1, zoom // 2) if gap is None else gap
    rows = math.ceil(n / columns)
    high, wide = height * zoom + gap, width * zoom + gap
    sheet = torch.full((channels, rows * high + gap, columns * wide + gap), 255, dtype=torch.uint8)
    for i, picture in enumerate(pixels):
        top, left = gap + (i // columns) * high, gap + (i % columns) * wide
        sheet[:, top : top + height * zoom, left : left + width * zoom] = picture
    array = sheet.permute(1, 2, 0).numpy()
    Image.fromarray(array[:, :, 0] if channels == 1 else array).save(file, format="PNG")
