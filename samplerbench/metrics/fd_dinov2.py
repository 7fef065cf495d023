"""FD-DINOv2: the Fréchet distance of DINOv2 features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from samplerbench.metrics.encoders import DEFAULTS
from samplerbench.metrics.fid import FrechetAccumulator
from samplerbench.metrics.metric import Accumulator, Context, Metric
from samplerbench.options import option


@dataclass(frozen=True)
class FDDINOv2(Metric):
    """FD-DINOv2 (Stein et al. 2023): the Fréchet distance of DINOv2 ViT-L/14 features, as EDM2 and dgm-eval compute it.

    The features are the normalised class token. Images are resized to 224x224 by an antialiased bicubic filter in
    float32 (EDM2's default; dgm-eval uses Pillow, which also rounds), and normalised with ImageNet's mean and standard
    deviation. The position embeddings are interpolated with the offset of the authors' code. torch-fidelity's
    `dinov2-vit-l-14` resizes in another way, and its distances are not comparable. Published values are of 50,000
    images.
    """

    min_images: ClassVar[int] = 2

    model: str = option(DEFAULTS["dinov2"], "hub id or folder of a Dinov2Model of transformers")

    @property
    def feature_space(self) -> str:
        return f"dinov2:{self.model}"

    def start(self, context: Context) -> Accumulator:
        return FrechetAccumulator(context.reference)
