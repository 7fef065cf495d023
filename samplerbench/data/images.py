"""Image sets by name (`digits`) or by path (a folder of images whose sub-folders are classes)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.options import did_you_mean

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class ImageSet:
    """A data set in memory.

    images: (n, C, H, W) uint8, C = 1 or 3. labels: (n,) int64 in 0 … classes-1, or None. classes: their number or
    None. name, split: what the protocol calls it.
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor | None
    classes: int | None
    licence: str = ""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return (channels, height, width)

    @cached_property
    def sha256(self) -> str:
        """Hash of shape, pixels and labels: the identity of the set in a protocol."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def class_counts(self) -> list[int]:
        """How many images each class has. Raises UserError on a set without labels."""
        if self.labels is None or self.classes is None:
            raise UserError(f"the data set {self.name} has no labels.")
        return torch.bincount(self.labels, minlength=self.classes).tolist()

    def subset(self, index: Tensor, split: str) -> ImageSet:
        """The images at `index` as a set of its own."""
        labels = None if self.labels is None else self.labels[index]
        return ImageSet(self.name, split, self.images[index], labels, self.classes, self.licence)


def _digits() -> ImageSet:
    """scikit-learn's 1,797 real 8x8 digits (UCI test set of optical recognition of handwritten digits).

    The 17 grey levels 0 … 16 become 0 … 255.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return ImageSet(
        name="digits",
        split="all",
        images=torch.from_numpy(images)[:, None],
        labels=torch.from_numpy(bunch.target.astype(np.int64)),
        classes=10,
        licence="CC BY 4.0 (UCI Machine Learning Repository: Alpaydin & Kaynak 1998)",
    )


NAMED: dict[str, Callable[[], ImageSet]] = {"digits": _digits}


def load_data(source: str) -> ImageSet:
    """The data set `source`: a name (`digits`) or a folder of equally sized images.

    In a folder, sub-folders are classes in alphabetical order; a folder without sub-folders has no labels.

    Raises:
        UserError: no such name or folder, no images, a file that cannot be decoded, or images of several sizes.
    """
    if source in NAMED:
        return NAMED[source]()
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    raise UserError(
        f'no data set "{source}": it is neither a folder nor one of {", ".join(NAMED)}.{did_you_mean(source, NAMED)}'
    )


def _folder(path: Path) -> ImageSet:
    from PIL import Image

    files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"the folder {path} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    folders = sorted({f.relative_to(path).parts[0] for f in files if f.parent != path})
    if folders and any(f.parent == path for f in files):
        raise UserError(f"the folder {path} has images both at its top and in class sub-folders; use one or the other.")
    arrays = []
    for file in files:
        try:
            with Image.open(file) as image:
                image.load()
                arrays.append(np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB")))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"the image {file} cannot be read ({error}); mend or remove it.") from None
        if arrays[-1].shape != arrays[0].shape:
            raise UserError(
                f"the image {file} is {_size(arrays[-1])}, but {files[0]} is {_size(arrays[0])}; "
                "all images of a set have one size and one number of channels."
            )
    stack = torch.from_numpy(np.stack(arrays))
    images = stack[:, None] if stack.ndim == 3 else stack.permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([folders.index(f.relative_to(path).parts[0]) for f in files]) if folders else None
    return ImageSet(path.name, "all", images, labels, len(folders) or None)


def _size(array: np.ndarray) -> str:
    height, width = array.shape[:2]
    return f"{width}x{height} {'grey' if array.ndim == 2 else 'RGB'}"
