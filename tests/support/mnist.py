"""MNIST's files with random images."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_mnist(root: Path, n: int = 7) -> np.ndarray:
    """The idx files of a set of n random images, in torchvision's layout."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        header = np.array([2051, n, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = bytes(i % 10 if part == "train" else 3 for i in range(n))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([2049, n], ">i4").tobytes() + labels)
    return pixels
