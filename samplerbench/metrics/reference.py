"""Reference statistics: the moments of a data set's features."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from samplerbench.cache import cache_dir
from samplerbench.errors import UserError
from samplerbench.metrics.moments import Moments
from samplerbench.tensor_seal import open_seal, sealed

if TYPE_CHECKING:
    from samplerbench.data import ImageSet
    from samplerbench.metrics.extractors import Extractor


@dataclass(frozen=True)
class Reference:
    """The real side of a metric.

    moments: of the features of n real images. data: name, split, n and hash of the set. features: identity of the
    feature space.
    """

    moments: Moments
    data: dict[str, Any]
    features: dict[str, str]

    @property
    def label(self) -> str:
        """`digits (all, 1797)`; without the number where it is not known."""
        number = "" if self.data["n"] is None else f", {self.data['n']}"
        return f"{self.data['name']} ({self.data['split']}{number})"

    def save(self, file: Path) -> None:
        """Write mean (d,), covariance (d, d) in float64, and the identities, as sealed safetensors."""
        from safetensors.torch import save_file

        tensors = {"mean": self.moments.mean, "covariance": self.moments.covariance}
        metadata = {"data": json.dumps(self.data), "features": json.dumps(self.features)}
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, file, sealed(tensors, metadata))


def measure(data: ImageSet, extractor: Extractor) -> Reference:
    """The reference of a data set in a feature space."""
    moments: Moments | None = None
    for images in data.images.split(extractor.chunk):
        features = extractor(images)
        moments = moments or Moments(features.shape[1], features.device)
        moments.update(features)
    if moments is None or moments.n < 2:
        raise UserError(f"the data set {data.name} has {len(data)} images; a reference needs at least 2.")
    moments.mean, moments.scatter = moments.mean.cpu(), moments.scatter.cpu()
    described = {"name": data.name, "split": data.split, "n": len(data), "sha256": data.sha256}
    return Reference(moments, described, extractor.identity)


def measure_once(data: ImageSet, extractor: Extractor) -> Reference:
    """`measure`, kept in the user's cache under the hashes of the images and of the extractor's weights."""
    identity = [data.name, data.split, data.sha256, extractor.identity, str(extractor.device.type)]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    file = cache_dir() / f"reference-{key}.safetensors"
    if file.exists():
        with contextlib.suppress(UserError):  # a damaged file in a cache is made anew
            return load_reference(file)
    reference = measure(data, extractor)
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        os.close(handle)
        reference.save(Path(temporary))
        os.replace(temporary, file)
    return reference


def load_published(file: Path, extractor: Extractor) -> Reference | None:
    """Published statistics: the arrays `mu` (d,) and `sigma` (d, d) of an npz; None where it has none.

    That is the format of EDM, of pytorch-fid and of guided-diffusion's reference batches. It says neither the feature
    space, which is taken to be the extractor's, nor the number of images, which stays unknown.

    Raises:
        UserError: not an npz, or statistics of another number of features.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if "mu" not in arrays or "sigma" not in arrays:
                return None
            mean, covariance = torch.from_numpy(arrays["mu"]), torch.from_numpy(arrays["sigma"])
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} cannot be read as an npz file ({error}).") from None
    d = len(mean) if mean.ndim == 1 else 0
    if covariance.shape != (d, d) or not d:
        raise UserError(f"{file}: mu is {tuple(mean.shape)} and sigma {tuple(covariance.shape)}; not (d,) and (d, d).")
    dimension = extractor(torch.zeros(1, 1, 32, 32, dtype=torch.uint8)).shape[1]
    if dimension != d:
        raise UserError(
            f"{file} holds statistics of {d} features, but {extractor.name} has {dimension}; name the features they "
            "were taken in with --features."
        )
    described = {
        "name": file.stem,
        "split": "published statistics",
        "n": None,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    return Reference(Moments.from_statistics(mean, covariance, None), described, extractor.identity)


def load_reference(file: Path) -> Reference:
    """A reference written by `Reference.save`.

    Raises:
        UserError: no such file, or not one of these.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as handle:
            metadata = handle.metadata() or {}
            mean, covariance = handle.get_tensor("mean"), handle.get_tensor("covariance")
        # A file of an older version has no seal.
        metadata, _ = open_seal({"mean": mean, "covariance": covariance}, metadata)
        data, features = json.loads(metadata["data"]), json.loads(metadata["features"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{file} is no reference written by `samplerbench stats`: {error}") from None
    return Reference(Moments.from_statistics(mean.to(torch.float64), covariance, data["n"]), data, features)
