"""Reference statistics: the moments of the features of a data set."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from samplerbench.cache import cache_dir
from samplerbench.data.files import IMAGES
from samplerbench.errors import UserError, argument
from samplerbench.metrics.moments import Moments
from samplerbench.portable import replace_file
from samplerbench.tensor_seal import open_seal, sealed

if TYPE_CHECKING:
    from samplerbench.data import ImageSet
    from samplerbench.metrics.extractors import Extractor


MOST_ASYMMETRY = 1e-5
"""Tolerance for the asymmetry and the negative eigenvalues of a covariance, relative to its largest entry."""


@dataclass(frozen=True)
class Reference:
    """Statistics of the real images.

    Attributes:
        moments: mean and covariance of the features of n real images.
        data: name, split, number n and hash of the data set.
        features: identity of the feature extractor.
        shape: (C, H, W) of the images, with C = 1 for grey images; None if it is unknown.
    """

    moments: Moments
    data: dict[str, Any]
    features: dict[str, str]
    shape: tuple[int, int, int] | None = None

    @property
    def label(self) -> str:
        """`digits (all, 1797)`, with the rule by which images were resized; without the number if it is unknown."""
        number = "" if self.data["n"] is None else f", {self.data['n']}"
        resized = f", {self.data['resized']}" if self.data.get("resized") else ""
        return f"{self.data['name']} ({self.data['split']}{number}{resized})"

    def save(self, file: Path) -> None:
        """Write the mean (d,) and covariance (d, d) in float64, with the metadata and a digest, as safetensors."""
        from safetensors.torch import save_file

        tensors = {"mean": self.moments.mean, "covariance": self.moments.covariance}
        metadata = {"data": json.dumps(self.data), "features": json.dumps(self.features)}
        if self.shape is not None:
            metadata["shape"] = json.dumps(self.shape)
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, file, sealed(tensors, metadata))


def measure(data: ImageSet, extractor: Extractor) -> Reference:
    """Compute the reference of a data set with an extractor. Raises UserError for fewer than two images."""
    moments: Moments | None = None
    for images in data.images.split(extractor.chunk):
        features = extractor(images)
        moments = moments or Moments(features.shape[1], features.device)
        moments.update(features)
    if moments is None or moments.n < 2:
        images = "1 image" if len(data) == 1 else f"{len(data)} images"
        raise UserError(f"the data set {data.name} has {images}; a reference needs at least 2.")
    moments.mean, moments.scatter = moments.mean.cpu(), moments.scatter.cpu()
    return Reference(moments, data.identity, extractor.identity, data.shape_as_seen)


def measure_once(data: ImageSet, extractor: Extractor) -> Reference:
    """`measure`, cached in the user's cache under the hashes of the images and of the extractor's weights."""
    identity = [data.name, data.split, data.sha256, extractor.identity, str(extractor.device.type)]
    identity += [data.resized] if data.resized else []
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    file = cache_dir() / f"reference-{key}.safetensors"
    with contextlib.suppress(UserError, OSError):  # a damaged or unreadable cache file is replaced
        if file.exists():
            kept = load_reference(file)
            if kept.features == extractor.identity and kept.data.get("sha256") == data.sha256:
                return replace(kept, shape=data.shape_as_seen)
    reference = measure(data, extractor)
    with contextlib.suppress(OSError):  # the cache is optional
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        os.close(handle)
        reference.save(Path(temporary))
        replace_file(temporary, file)
    return reference


def holds_only_statistics(file: Path) -> bool:
    """Whether a file is an npz with `mu` and `sigma` and no images."""
    try:
        held = _npz_headers(file, ("mu", "sigma", *IMAGES))
    except Exception:  # the error is reported when the file is read
        return False
    return {"mu", "sigma"} <= held.keys() and not held.keys() & set(IMAGES)


def load_published(file: Path, extractor: Extractor) -> Reference | None:
    """Load published statistics: the arrays `mu` (d,) and `sigma` (d, d) of an npz file.

    This is the format of EDM, of pytorch-fid and of guided-diffusion's reference batches. It contains neither the
    feature space, which is assumed to be that of the extractor, nor the number of images, which remains unknown.

    Args:
        file: the npz file.
        extractor: the extractor that the statistics were computed with.

    Returns:
        The reference; None if the file has no such arrays.

    Raises:
        UserError: not an npz file, another number of features, or an invalid covariance.
    """
    sizes = published_sizes(file)
    if sizes is None:
        return None
    d, shape = sizes
    dimension = extractor(torch.zeros(1, 1, 32, 32, dtype=torch.uint8)).shape[1]
    if dimension != d:
        raise UserError(
            f"{file} holds statistics of {d} features, but {extractor.name} has {dimension}; select the feature "
            f"space of the statistics with {argument('features')}."
        )
    try:
        with np.load(file, allow_pickle=False) as arrays:
            mean, covariance = arrays["mu"], arrays["sigma"]
            sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    except Exception as error:
        raise UserError(f"{file} cannot be read as an npz file ({_first_line(error)}).") from None
    moments = _moments(file, mean, covariance, None)
    described = {"name": file.stem, "split": "published statistics", "n": None, "sha256": sha256}
    return Reference(moments, described, extractor.identity, shape)


def published_sizes(file: Path) -> tuple[int, tuple[int, int, int] | None] | None:
    """The sizes of published statistics. Only the headers of the arrays are read.

    Returns:
        d, and the shape (C, H, W) of the images in the same file or None. None for a file without statistics.

    Raises:
        UserError: not an npz file, or shapes of `mu` and `sigma` other than (d,) and (d, d).
    """
    try:
        shapes = _npz_headers(file, ("mu", "sigma", *IMAGES))
    except Exception as error:  # zipfile and numpy raise many types on a damaged or odd archive
        raise UserError(f"{file} cannot be read as an npz file ({_first_line(error)}).") from None
    if "mu" not in shapes or "sigma" not in shapes:
        return None
    d = shapes["mu"][0] if len(shapes["mu"]) == 1 else 0
    if not d or shapes["sigma"] != (d, d):
        raise UserError(f"{file}: mu is {shapes['mu']} and sigma {shapes['sigma']}; not (d,) and (d, d).")
    images = next((shapes[name] for name in IMAGES if name in shapes), ())
    height, width, channels = (*images[1:], 1)[:3] if len(images) in (3, 4) else (0, 0, 0)
    return d, (channels, height, width) if height else None


def load_reference(file: Path) -> Reference:
    """Load a reference written by `Reference.save`.

    Raises:
        UserError: no such file, another format, or invalid statistics.
    """
    from safetensors import safe_open

    try:
        with safe_open(str(file), "pt") as handle:
            metadata = handle.metadata() or {}
            mean, covariance = handle.get_tensor("mean"), handle.get_tensor("covariance")
        # Files of older versions have no digest.
        metadata, _ = open_seal({"mean": mean, "covariance": covariance}, metadata)
        data, features = json.loads(metadata["data"]), json.loads(metadata["features"])
        shape = json.loads(metadata["shape"]) if "shape" in metadata else None
        mean, covariance = mean.numpy(), covariance.numpy()  # bfloat16 and float8 have no numpy type
    except Exception as error:  # safetensors, json and numpy raise many types on a damaged or odd file
        raise UserError(
            f"{file} is not a reference file of `samplerbench stats`: {_first_line(error).rstrip('.')}."
        ) from None
    wrong = _wrong_identity(data, features, shape)
    if wrong:
        raise UserError(f"{file} is not a reference file of `samplerbench stats`: {wrong}")
    moments = _moments(file, mean, covariance, data["n"])
    return Reference(moments, data, features, None if shape is None else (shape[0], shape[1], shape[2]))


def _wrong_identity(data: Any, features: Any, shape: Any) -> str:
    """The error in the metadata of a reference; "" if there is none."""
    texts = {"name", "split", "sha256"}
    if not isinstance(data, dict) or any(not isinstance(data.get(name), str) for name in texts):
        return f"its data lacks one of the strings {', '.join(sorted(texts))}."
    n = data.get("n", ...)
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or not 2 <= n <= MOST_IMAGES):
        shown = "missing" if n is ... else _shorten(repr(n))
        return f"its number of images is {shown}; it must be a whole number, at least 2, or null."
    if not isinstance(features, dict) or any(not isinstance(features.get(k), str) for k in ("name", "weights")):
        return "its features lack one of the strings name, weights."
    sizes = shape if isinstance(shape, list) else []
    if shape is not None and (len(sizes) != 3 or any(type(size) is not int or size < 1 for size in sizes)):
        return f"its shape of the images is {_shorten(repr(shape))}; it must be [C, H, W]."
    return ""


LARGEST_FEATURE = 1e30
"""The maximum magnitude of a mean, and the square root of that of a covariance, so that products stay finite."""

MOST_IMAGES = 10**15
"""The maximum number of images of a reference, which is exact in float64."""


def _moments(file: Path, mean: np.ndarray, covariance: np.ndarray, n: int | None) -> Moments:
    """Validate the statistics in a file, and convert them to moments.

    Raises:
        UserError: shapes other than (d,) and (d, d), values that are not finite real numbers, or a covariance that is
            not symmetric and positive semi-definite.
    """
    d = len(mean) if mean.ndim == 1 else 0
    if not d or covariance.shape != (d, d):
        raise UserError(f"{file}: the mean is {mean.shape} and the covariance {covariance.shape}; not (d,) and (d, d).")
    for name, array in (("mean", mean), ("covariance", covariance)):
        if not np.issubdtype(array.dtype, np.floating):
            raise UserError(f"{file}: the {name} is {array.dtype}; statistics are real floating-point numbers.")
        if not np.isfinite(array).all():
            raise UserError(f"{file}: the {name} has values that are not finite.")
        most = LARGEST_FEATURE if array is mean else LARGEST_FEATURE**2
        if float(np.abs(array).max()) > most:
            raise UserError(f"{file}: the {name} has values above {most:.0e}, which no features have.")
    covariance = covariance.astype(np.float64)
    largest = float(np.abs(covariance).max())
    if float(np.abs(covariance - covariance.T).max()) > MOST_ASYMMETRY * largest:
        raise UserError(f"{file}: the covariance is not symmetric.")
    moments = Moments.from_statistics(torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance), n)
    # A Cholesky factor proves that the matrix is positive definite. The Fréchet distance needs the factor anyway.
    if moments.cholesky is None:
        values = torch.linalg.eigvalsh(torch.from_numpy(covariance))
        least, rank = float(values[0]), int((values > MOST_ASYMMETRY * largest).sum())
        if least < -MOST_ASYMMETRY * largest:
            raise UserError(f"{file}: the covariance is not positive semi-definite (an eigenvalue is {least:.3g}).")
        if n is not None and rank > n - 1:
            raise UserError(f"{file}: the covariance has rank {rank}, which {n} images cannot have.")
    return moments


def _npz_headers(file: Path, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the named arrays in an npz file, read from their headers.

    Raises:
        ValueError: the header of an array does not match its number of bytes. zipfile and NumPy raise other errors.
    """
    shapes = {}
    with zipfile.ZipFile(file) as archive:
        held = {info.filename: info for info in archive.infolist()}
        for name in names:
            info = held.get(f"{name}.npy")
            if info is None:
                continue
            with archive.open(info) as stream:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(stream)
                header = stream.tell()
            if dtype.hasobject:
                raise ValueError(f"{name} is an array of objects")
            if header + math.prod(shape) * dtype.itemsize != info.file_size:
                raise ValueError(f"the header of {name} declares the shape {shape}, but the data have another size")
            shapes[name] = tuple(int(size) for size in shape)
    return shapes


def _first_line(error: Exception) -> str:
    """The first line of an error message, shortened."""
    lines = str(error).splitlines()
    return _shorten(lines[0] if lines else type(error).__name__)


def _shorten(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:119]}…"
