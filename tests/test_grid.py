"""Sample grids as PNG."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from samplerbench.data.grid import save_grid
from samplerbench.data.pixels import dequantise


def images(n: int, channels: int = 1, height: int = 8, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 250, (n, channels, height, width), dtype=torch.uint8, generator=generator)


def read(pixels: Tensor, **options: int) -> np.ndarray:
    buffer = io.BytesIO()
    save_grid(pixels, buffer, **options)
    with Image.open(buffer) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_image_without_gap_is_the_image(channels: int) -> None:
    pixels = images(1, channels)
    found = read(pixels, least_side=1, gap=0)
    assert np.array_equal(found.reshape(8, 8, channels), pixels[0].permute(1, 2, 0))


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (4, 2), (5, 3), (9, 3), (10, 4), (100, 10)])
def test_a_grid_is_about_square_and_in_reading_order(n: int, columns: int) -> None:
    pixels = images(n)
    sheet = read(pixels, least_side=8, gap=2).copy()
    rows = -(-n // columns)
    assert sheet.shape == (rows * 10 + 2, columns * 10 + 2)
    for i in range(n):
        top, left = 2 + i // columns * 10, 2 + i % columns * 10
        assert np.array_equal(sheet[top : top + 8, left : left + 8], pixels[i, 0])
        sheet[top : top + 8, left : left + 8] = 255
    assert (sheet == 255).all()  # what is no image is white


def test_columns_are_as_asked_but_no_more_than_images() -> None:
    assert read(images(6), columns=6, least_side=8, gap=0).shape == (8, 48)
    assert read(images(3), columns=5, least_side=8, gap=0).shape == (8, 24)


def test_small_images_are_enlarged_by_whole_pixels() -> None:
    pixels = images(1)
    assert np.array_equal(read(pixels, gap=0), np.kron(pixels[0, 0], np.ones((4, 4), dtype=np.uint8)))
    assert read(images(1, height=12, width=12), gap=0).shape == (36, 36)
    assert read(images(1, height=32, width=32), gap=0).shape == (32, 32)
    assert read(images(1, height=8, width=16), gap=0).shape == (32, 64)


def test_images_in_network_range_are_quantised() -> None:
    pixels = images(4, 3)
    assert np.array_equal(read(dequantise(pixels)), read(pixels))


def test_a_path_will_do(tmp_path: Path) -> None:
    save_grid(images(2), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert np.array_equal(np.asarray(picture), read(images(2)))
