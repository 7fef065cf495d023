"""CMMD: the maximum mean discrepancy of CLIP embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from samplerbench.metrics.encoders import DEFAULTS
from samplerbench.metrics.metric import Accumulator, Context, LabelledStore, Metric
from samplerbench.metrics.strata import strata_of, variance_of_mean
from samplerbench.options import option

SIGMA, SCALE = 10.0, 1000.0
"""The bandwidth of the kernel and the factor of the value (Jayasumana et al. 2024)."""


@dataclass(frozen=True)
class CMMD(Metric):
    """CMMD (Jayasumana et al. 2024): 1000 times the biased squared MMD of L2-normalised CLIP-L/14-336 embeddings.

    The kernel is exp(-‖x-y‖²/(2 σ²)) with σ = 10. The mean over pairs includes each image with itself. Images are
    resized to 336x336 by torch's bicubic filter without antialiasing, as in cmmd-pytorch. The authors' own code in JAX
    resizes with antialiasing: `antialias=true`. The two differ for larger images, and the tables name the space. The
    standard error is that of the linear part, as for `kid`.
    """

    min_images: ClassVar[int] = 2
    needs_real_images: ClassVar[bool] = True
    min_real_images: ClassVar[int] = 2

    model: str = option(DEFAULTS["cmmd"], "hub id or folder of a CLIP model of transformers")
    antialias: bool = option(False, "resize with antialiasing, as the authors' JAX code; false: as cmmd-pytorch")

    @property
    def feature_space(self) -> str:
        return f"cmmd-antialiased:{self.model}" if self.antialias else f"cmmd:{self.model}"

    def start(self, context: Context) -> Accumulator:
        return _CMMD(context)


class _CMMD(LabelledStore):
    def result(self) -> dict[str, Any]:
        value, error = biased_mmd(self.features(), self.context.real_features("fid"), labels=self.labels())
        return {"value": value, "standard_error": error}


_WITHIN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def mean_kernels(x: Tensor, y: Tensor, sigma: float, chunk: int = 2048) -> Tensor:
    """For each row of x, the mean of exp(-‖x-y‖²/(2σ²)) over the rows of y.

    Args:
        x: (n, d) float64.
        y: (m, d) float64.
        sigma: bandwidth σ.
        chunk: number of rows per block of the kernel matrix.

    Returns:
        (n,) float64.
    """
    squares = y.square().sum(dim=1)
    parts = []
    for part in x.split(chunk):
        distances = part.square().sum(dim=1, keepdim=True) - 2 * part @ y.T + squares
        parts.append(torch.exp(distances * (-0.5 / sigma**2)).mean(dim=1))
    return torch.cat(parts)


def biased_mmd(
    x: Tensor, y: Tensor, sigma: float = SIGMA, scale: float = SCALE, labels: Tensor | None = None
) -> tuple[float, float]:
    """The biased squared MMD of normalised rows (Gretton et al. 2012, equation 5), and its standard error.

    scale · (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)), where the means are over all pairs, also of a row with
    itself.

    Args:
        x: (n, d), embeddings of the generated images.
        y: (m, d), embeddings of the real images.
        sigma: bandwidth σ of the kernel exp(-‖x-y‖²/(2σ²)).
        scale: factor of the value.
        labels: (n,) int64, labels of x where their numbers are fixed; None for independent draws.

    Returns:
        (value, standard error).
    """
    real = y
    x, y = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (x, y))
    # The real images are the same for all blocks and cells of a run, so their kernel means are cached.
    known = _WITHIN.setdefault(real, {})
    if sigma not in known:
        known[sigma] = mean_kernels(y, y, sigma)
    within_x, within_y = mean_kernels(x, x, sigma), known[sigma]
    across_x, across_y = mean_kernels(x, y, sigma), mean_kernels(y, x, sigma)
    value = within_x.mean() + within_y.mean() - 2 * across_x.mean()
    strata = None if labels is None else strata_of(labels)
    variance = variance_of_mean(within_x - across_x, strata) + variance_of_mean(within_y - across_y, None)
    return scale * float(value), scale * 2 * math.sqrt(variance)
