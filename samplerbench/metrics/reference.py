"""Reference statistics: the moments of a data set's features."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from samplerbench.errors import UserError
from samplerbench.metrics.moments import Moments

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
        """`digits (all, 1797)`."""
        return f"{self.data['name']} ({self.data['split']}, {self.data['n']})"

    def save(self, file: Path) -> None:
        """Write mean (d,), covariance (d, d) in float64, and the identities, as safetensors."""
        from safetensors.torch import save_file

        tensors = {"mean": self.moments.mean, "covariance": self.moments.covariance}
        metadata = {"data": json.dumps(self.data), "features": json.dumps(self.features)}
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, file, metadata)


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
        data, features = json.loads(metadata["data"]), json.loads(metadata["features"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{file} is no reference written by `samplerbench stats`: {error}") from None
    return Reference(Moments.from_statistics(mean.to(torch.float64), covariance, data["n"]), data, features)
