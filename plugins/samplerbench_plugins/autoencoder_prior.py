"""The autoencoder's own samples: the baseline that latent diffusion must beat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step


@dataclass(frozen=True)
class AutoencoderPrior(Sampler):
    """Samples of a latent model's autoencoder alone (Kingma & Welling 2014):  z ~ N(0, I), decoded in one pass.

    z has the autoencoder's own scale, not that of the diffusion's states. The denoiser is never asked, so there is no
    network evaluation, no grid, no guidance and no label: what this row scores is what the decoder and its
    Kullback-Leibler term give without a diffusion.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"autoencoder"})

    def nfe(self, steps: int) -> int:
        return 0

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        yield Step(0.0, denoise.scale_latents(noise()))
