"""Data sets in files: a folder of images, a zip of such a folder, or arrays in an npz."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from samplerbench.data.image_set import ImageSet
from samplerbench.errors import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
IMAGES, LABELS = ("images", "arr_0"), ("labels", "arr_1")
"""Names of the arrays in an npz: ours, and numpy's for arrays without a name (guided-diffusion's sample files)."""

Open = Callable[[PurePosixPath], IO[bytes]]


def load_folder(path: Path) -> ImageSet:
    """The images in a folder: sub-folders are classes in alphabetical order; without sub-folders, no labels.

    Raises:
        UserError: no images, a file that cannot be decoded, or images of several sizes.
    """
    files = [PurePosixPath(f.relative_to(path).as_posix()) for f in path.rglob("*") if f.is_file()]
    return _classes_and_images(path, path.name, f"the folder {path}", files, lambda file: open(path / file, "rb"))


def load_zip(path: Path) -> ImageSet:
    """The images in a zip of such a folder; one folder around everything is looked through.

    Raises:
        UserError: as `load_folder`, or no zip file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [PurePosixPath(i.filename) for i in archive.infolist() if not i.is_dir()]
            names = [n for n in names if not n.parts[0].startswith("__MACOSX")]
            tops = {n.parts[0] for n in names if is_image(n)}
            wrapped = len(tops) == 1 and all(len(n.parts) > 2 for n in names if is_image(n))
            base = PurePosixPath(next(iter(tops))) if wrapped else PurePosixPath()
            files = [n.relative_to(base) for n in names if is_image(n)]
            return _classes_and_images(
                path, path.stem, f"the archive {path}", files, lambda file: archive.open(str(base / file))
            )
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"the archive {path} cannot be read ({error}).") from None


def load_npz(path: Path) -> ImageSet:
    """The array `images` (or `arr_0`), (n, H, W[, C]) uint8, and `labels` (or `arr_1`), (n,), of an npz file.

    Raises:
        UserError: no such arrays, or of another type or shape.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = next((arrays[name] for name in IMAGES if name in arrays), None)
            labels = next((arrays[name] for name in LABELS if name in arrays), None)
            held = ", ".join(arrays.files)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an npz file ({error}).") from None
    if images is None:
        raise UserError(f"{path} holds no images (an array called {' or '.join(IMAGES)}), only {held or 'nothing'}.")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
        raise UserError(
            f"{path}: the images are {images.dtype} of shape {images.shape}; give uint8 (n, H, W) or (n, H, W, 1 or 3)."
        )
    stack = torch.from_numpy(images)
    stack = stack[:, None] if stack.ndim == 3 else stack.permute(0, 3, 1, 2)
    if labels is not None and (labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer)):
        raise UserError(f"{path}: the labels are {labels.dtype} of shape {labels.shape}, not one integer per image.")
    numbers = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    return ImageSet(
        name=path.stem,
        split="all",
        images=stack.contiguous(),
        labels=numbers,
        classes=None if numbers is None else int(numbers.max()) + 1,
        source=str(path),
    )


def is_image(file: PurePosixPath | Path) -> bool:
    """Whether a file's name is that of an image."""
    return file.suffix.lower() in IMAGE_SUFFIXES


def _classes_and_images(path: Path, name: str, shown: str, files: Iterable[PurePosixPath], opener: Open) -> ImageSet:
    found = sorted(f for f in files if is_image(f))
    if not found:
        raise UserError(f"{shown} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    classes = sorted({f.parts[0] for f in found if len(f.parts) > 1})
    if classes and any(len(f.parts) == 1 for f in found):
        raise UserError(f"{shown} has images both at its top and in class sub-folders; use one or the other.")
    numbers = {folder: i for i, folder in enumerate(classes)}

    def decoded() -> Iterable[tuple[str, Any]]:
        for file in found:
            with opener(file) as stream:
                yield str(path / file), io.BytesIO(stream.read())

    labels = torch.tensor([numbers[f.parts[0]] for f in found]) if classes else None
    return ImageSet(name, "all", stack_images(decoded()), labels, len(classes) or None, source=str(path))


def stack_images(named: Iterable[tuple[str, Any]]) -> Tensor:
    """Images (n, C, H, W) uint8 from (name, PIL image or stream); grey ones stay grey, all others become RGB.

    Raises:
        UserError: one that cannot be decoded, or is of another size or kind than the first; it is named.
    """
    from PIL import Image

    arrays: list[np.ndarray] = []
    first = ""
    for name, item in named:
        try:
            with item if isinstance(item, Image.Image) else Image.open(item) as image:
                image.load()
                arrays.append(np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB")))
        except (OSError, SyntaxError, ValueError) as error:
            reason = "no image file that is known here" if isinstance(error, Image.UnidentifiedImageError) else error
            raise UserError(f"the image {name} cannot be read ({reason}); mend or remove it.") from None
        first = first or name
        if arrays[-1].shape != arrays[0].shape:
            raise UserError(
                f"the image {name} is {_size(arrays[-1])}, but {first} is {_size(arrays[0])}; "
                "all images of a set have one size and one number of channels."
            )
    stack = torch.from_numpy(np.stack(arrays))
    return stack[:, None] if stack.ndim == 3 else stack.permute(0, 3, 1, 2).contiguous()


def _size(array: np.ndarray) -> str:
    height, width = array.shape[:2]
    return f"{width}x{height} {'grey' if array.ndim == 2 else 'RGB'}"
