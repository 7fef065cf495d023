"""The models that are included with samplerbench: class-conditional U-Nets of handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from samplerbench.assets import asset
from samplerbench.models.diffusers_unet import load_diffusers_unet
from samplerbench.models.model import Model, ModelSource
from samplerbench.options import option


@dataclass(frozen=True)
class Embedded(ModelSource):
    """Base class of the included U-Nets. NAME is loaded from the assets NAME and NAME-classifier."""

    n: ClassVar[int | None] = None
    """Default number of images per block. None: the number of real images."""

    rounding: Literal["fractional", "nearest"] = option(
        "fractional", "how a noise level between two timesteps is met: interpolated in log σ, or rounded"
    )

    def load(self, device: torch.device, dtype: torch.dtype) -> Model:
        name = self.label()
        model = load_diffusers_unet(str(asset(name)), device, dtype, self.rounding)
        model.identity["source"] = self.spec
        model.features = f"{name}-cnn"
        model.classifier_folder = str(asset(f"{name}-classifier"))
        model.default_n = self.n
        return model


class Digits(Embedded):
    """The embedded class-conditional U-Net of real 8x8 digits (ε-prediction, T = 1000, linear β).

    It was trained on the 1,442 images of `digits:split=train`, with early stopping on the 355 held-out images.
    """


class MNIST(Embedded):
    """The embedded class-conditional U-Net of MNIST's 28x28 digits (ε-prediction, T = 1000, linear β).

    It was trained on the 60,000 training images. FID needs no data: the statistics of `mnist` (the training images)
    and `mnist:split=test` are included. By default a cell has 10,000 images.
    """

    n = 10_000
