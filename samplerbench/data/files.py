"""Load data sets from files: a folder of images, a zip archive of such a folder, or an npz file."""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from samplerbench.data.image_set import ImageSet
from samplerbench.data.resize import ResizedSource
from samplerbench.errors import UserError
from samplerbench.limits import MAX_CLASSES, MAX_PIXELS
from samplerbench.text import is_unicode
from samplerbench.untrusted import is_dir, is_file, reason, shorten, user_path

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
IMAGES, LABELS = ("images", "arr_0"), ("labels", "arr_1")
"""Names of the arrays in an npz file. NumPy uses arr_0 and arr_1 for unnamed arrays, as guided-diffusion's files do."""

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF")
"""The image formats that Pillow may decode. Other formats are disabled, because Pillow runs Ghostscript for EPS."""
MAX_FILE_BYTES = 2**30
"""The maximum size of an image file, and of an unpacked member of an archive."""

Open = Callable[[PurePosixPath], IO[bytes]]


@dataclass(frozen=True)
class ImageFiles(ResizedSource):
    """A folder or a zip archive of images, whose sub-folders are classes, resized by a rule."""

    name = "PATH"
    path: ClassVar[str] = ""

    def load(self) -> ImageSet:
        path = user_path(self.path)
        return load_folder(path, self) if is_dir(path) else load_zip(path, self)


def load_folder(path: Path, resized: ResizedSource | None = None) -> ImageSet:
    """Load the images of a folder. Sub-folders are classes in alphabetical order; without sub-folders, no labels.

    Args:
        path: the folder.
        resized: the rule by which images are resized. None: they keep their size.

    Raises:
        UserError: no images, a file that cannot be decoded, or images of several sizes.
    """
    try:
        files = [PurePosixPath(f.relative_to(path).as_posix()) for f in path.rglob("*") if is_image(f) and is_file(f)]
    except OSError as error:
        raise UserError(f"the folder {path} cannot be read ({reason(error)}).") from None
    return _classes_and_images(
        path, path.name, f"the folder {path}", files, lambda file: open(path / file, "rb"), resized
    )


def load_zip(path: Path, resized: ResizedSource | None = None) -> ImageSet:
    """Load the images of a zip archive with the layout of `load_folder`. A single top-level folder is skipped.

    Args:
        path: the archive.
        resized: the rule by which images are resized. None: they keep their size.

    Raises:
        UserError: as `load_folder`, or not a zip archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _image_members(path, archive)
            tops = {n.parts[0] for n in members}
            wrapped = len(tops) == 1 and all(len(n.parts) > 2 for n in members)
            base = PurePosixPath(next(iter(tops))) if wrapped else PurePosixPath()
            files = [n.relative_to(base) for n in members]
            return _classes_and_images(
                path, path.stem, f"the archive {path}", files, lambda file: archive.open(members[base / file]), resized
            )
    except UserError:
        raise
    except Exception as error:  # zipfile raises many types for a damaged archive
        raise UserError(f"the archive {path} cannot be read ({reason(error)}).") from None


def _image_members(path: Path, archive: zipfile.ZipFile) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """The images of an archive by name, except macOS metadata. Raises UserError for an unsafe member."""
    found: dict[PurePosixPath, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = PurePosixPath(member.filename.replace("\\", "/"))  # some Windows programs write backslashes
        if member.is_dir() or not is_image(name) or name.parts[0].startswith("__MACOSX"):
            continue
        problem = ""
        if name.is_absolute() or ".." in name.parts or (len(name.parts[0]) == 2 and name.parts[0][1] == ":"):
            problem = "its name points outside the archive"
        elif name in found:
            problem = "two members have this name"
        elif member.flag_bits & 1:
            problem = "it is encrypted"
        elif member.file_size > MAX_FILE_BYTES:
            problem = f"it has {member.file_size:,} bytes unpacked; at most {MAX_FILE_BYTES:,} are read"
        if problem:
            raise UserError(f"the archive {path}: {shorten(member.filename)}: {problem}; create the archive again.")
        found[name] = member
    return found


def load_npz(path: Path) -> ImageSet:
    """Load an npz file with the arrays `images` (or `arr_0`), (n, H, W[, C]) uint8, and `labels` (or `arr_1`), (n,).

    Raises:
        UserError: no such arrays, or another type or shape.
    """
    arrays, held = read_npz(path, (*IMAGES, *LABELS))
    images = next((arrays[name] for name in IMAGES if name in arrays), None)
    labels = next((arrays[name] for name in LABELS if name in arrays), None)
    if images is None:
        raise UserError(
            f"{path} holds no images (an array called {' or '.join(IMAGES)}), only "
            f"{shorten(', '.join(held)) or 'nothing'}."
        )
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
        raise UserError(
            f"{path}: the images are {images.dtype} of shape {images.shape}; give uint8 (n, H, W) or (n, H, W, 1 or 3)."
        )
    if not images.size:
        raise UserError(f"{path} holds no images: their shape is {images.shape}.")
    stack = torch.from_numpy(np.ascontiguousarray(images))
    stack = stack[:, None] if stack.ndim == 3 else stack.permute(0, 3, 1, 2)
    if labels is not None and (labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer)):
        raise UserError(f"{path}: the labels are {labels.dtype} of shape {labels.shape}, not one integer per image.")
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < MAX_CLASSES:
        raise UserError(
            f"{path}: the labels are {int(labels.min())} to {int(labels.max())}; they must be 0 to at most "
            f"{MAX_CLASSES - 1:,}."
        )
    numbers = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    return ImageSet(
        name=path.stem,
        split="all",
        images=stack.contiguous(),
        labels=numbers,
        classes=None if numbers is None else int(numbers.max()) + 1,
        source=str(path),
    )


def read_npz(path: Path, names: Iterable[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read the named arrays of an npz file.

    The shape in the header of an array is compared with its number of bytes before memory is allocated. Pickles are
    not loaded.

    Args:
        path: the npz file.
        names: names of the arrays.

    Returns:
        The arrays by name, and the names of all arrays in the file.

    Raises:
        UserError: not an npz file, or one of these arrays cannot be read.
    """
    wanted, found = set(names), {}
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("ignore")  # NumPy warns about headers written by Python 2
            held = [m.filename.removesuffix(".npy") for m in archive.infolist()]
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in wanted and name in found:
                    raise ValueError(f"two arrays are called {name}")
                if name in wanted:
                    with archive.open(member) as stream:
                        found[name] = _read_array(name, stream, member.file_size)
    except Exception as error:  # zipfile and NumPy raise many types for a damaged file
        raise UserError(f"{path} cannot be read as an npz file ({reason(error)}).") from None
    return found, held


def _read_array(name: str, stream: IO[bytes], size: int) -> np.ndarray:
    """Read the array in a stream of `size` bytes. Raises ValueError if its header does not match the bytes."""
    version = np.lib.format.read_magic(stream)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in header:
        raise ValueError(f"the array {name} has the npy version {version[0]}.{version[1]}")
    shape, fortran, dtype = header[version](stream)
    if dtype.hasobject or not dtype.itemsize or any(n < 0 for n in shape):
        raise ValueError(f"the array {name} is of type {dtype} and shape {shape}")
    count = math.prod(shape)
    if count * dtype.itemsize > size:
        raise ValueError(
            f"the array {name} declares the shape {shape} of {dtype}, {count * dtype.itemsize:,} bytes, but has at "
            f"most {size:,}"
        )
    data = stream.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise ValueError(f"the array {name} ends after {len(data):,} of {count * dtype.itemsize:,} bytes")
    array = np.frombuffer(bytearray(data), dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def is_image(file: PurePosixPath | Path) -> bool:
    """Whether a file name has the suffix of an image."""
    return file.suffix.lower() in IMAGE_SUFFIXES


def _classes_and_images(
    path: Path,
    name: str,
    shown: str,
    files: Iterable[PurePosixPath],
    opener: Open,
    resized: ResizedSource | None,
) -> ImageSet:
    images = sorted(f for f in files if is_image(f))
    if not images:
        raise UserError(f"{shown} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    classes = sorted({f.parts[0] for f in images if len(f.parts) > 1})
    if classes and any(len(f.parts) == 1 for f in images):
        raise UserError(f"{shown} has images both at its top and in class sub-folders; use one or the other.")
    numbers = {folder: i for i, folder in enumerate(classes)}

    def decoded() -> Iterable[tuple[str, Any]]:
        for file in images:
            try:
                with opener(file) as stream:
                    data = stream.read(MAX_FILE_BYTES + 1)
            except Exception as error:  # from a file or a member of an archive
                raise _unreadable(path / file, reason(error)) from None
            if len(data) > MAX_FILE_BYTES:
                raise _unreadable(path / file, f"it has more than {MAX_FILE_BYTES:,} bytes")
            yield str(path / file), io.BytesIO(data)

    labels = torch.tensor([numbers[f.parts[0]] for f in images]) if classes else None
    rule = "" if resized is None else resized.rule
    return ImageSet(
        name,
        "all",
        stack_images(decoded(), resized),
        labels,
        len(classes) or None,
        source=f"{path}:{rule}" if rule else str(path),
        resized=rule,
        # A file name on Linux can be any bytes. A name that is not Unicode cannot be written to a model card.
        class_names=tuple(name if is_unicode(name) else "" for name in classes),
    )


def stack_images(named: Iterable[tuple[str, Any]], resized: ResizedSource | None = None) -> Tensor:
    """Decode images, and stack them as (n, C, H, W) uint8. Grey images have C = 1, all others are converted to RGB.

    Args:
        named: pairs of a name for error messages and a PIL image or a stream.
        resized: the rule by which images are resized. None: they keep their size.

    Raises:
        UserError: an image that cannot be decoded, or that differs from the first in size or number of channels.
    """

    arrays: list[np.ndarray] = []
    first = ""
    for name, item in named:
        arrays.append(_decode(name, item, resized))
        first = first or name
        if arrays[-1].shape != arrays[0].shape:
            by_size = arrays[-1].ndim == arrays[0].ndim
            advice = " To resize them, add a rule to the name of the data: DATA:resize=64." if by_size else ""
            raise UserError(
                f"the image {name} is {_size(arrays[-1])}, but {first} is {_size(arrays[0])}; "
                f"all images of a data set must have the same size and number of channels.{advice}"
            )
    stack = torch.from_numpy(np.stack(arrays))
    return stack[:, None] if stack.ndim == 3 else stack.permute(0, 3, 1, 2).contiguous()


def _decode(name: str, item: Any, resized: ResizedSource | None) -> np.ndarray:
    """Decode a PIL image or a stream as uint8, (H, W) or (H, W, 3)."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow first warns about its own size limits
            with item if isinstance(item, Image.Image) else Image.open(item, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ValueError(f"it has {width:,} x {height:,} pixels; at most {MAX_PIXELS:,} are read")
                if image.mode == "F" or image.mode.startswith("I"):
                    raise ValueError("it has more than 8 bits per channel; convert it to 8 bits")
                image.load()
                pixels = image.convert("L" if image.mode in ("1", "L") else "RGB")
                return np.asarray(pixels if resized is None else resized.resized(pixels))
    except Image.UnidentifiedImageError:
        why = "unsupported image format"
    except Image.DecompressionBombError:
        why = f"it has more than the maximum of {MAX_PIXELS:,} pixels"
    except Exception as error:  # Pillow's decoders raise many types for a damaged file
        why = reason(error)
    raise _unreadable(name, why)


def _unreadable(name: str | Path, why: str) -> UserError:
    return UserError(f"the image {name} cannot be read ({why}); repair or remove it.")


def _size(array: np.ndarray) -> str:
    height, width = array.shape[:2]
    return f"{width}x{height} {'grey' if array.ndim == 2 else 'RGB'}"
