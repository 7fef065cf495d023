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
    """Base class of the included U-Nets. NAME is loaded from the asset NAME."""

    n: ClassVar[int | None] = None
    """Default number of images per block. None: the number of real images."""

    features: ClassVar[str] = ""
    """Default feature space."""

    classifier: ClassVar[str] = ""
    """Asset of the noise-conditional classifier. Empty if there is none."""

    def load(self, device: torch.device, dtype: torch.dtype) -> Model:
        rounding: Literal["fractional", "nearest"] = getattr(self, "rounding", "fractional")
        model = load_diffusers_unet(str(asset(self.label())), device, dtype, rounding)
        model.identity["source"] = self.spec
        model.features = self.features
        model.classifier_folder = str(asset(self.classifier)) if self.classifier else ""
        model.default_n = self.n
        return model


@dataclass(frozen=True)
class _Discrete(Embedded):
    """Base class of the included variance-preserving U-Nets."""

    rounding: Literal["fractional", "nearest"] = option(
        "fractional", "how a noise level between two timesteps is met: interpolated in log σ, or rounded"
    )


class Digits(_Discrete):
    """The embedded class-conditional U-Net of real 8x8 digits (ε-prediction, T = 1000, linear β).

    It was trained on the 1,442 images of `digits:split=train`, with early stopping on the 355 held-out images.
    """

    features = "digits-cnn"
    classifier = "digits-classifier"


class DigitsFlow(Embedded):
    """The embedded class-conditional rectified flow of real 8x8 digits: the U-Net of `digits` predicts the velocity.

    It was trained on the 1,442 images of `digits:split=train`, with uniform times and early stopping on the 355
    held-out images.
    """

    features = "digits-cnn"
    classifier = "digits-classifier"


class DigitsLearnedVariance(_Discrete):
    """The embedded class-conditional U-Net of real 8x8 digits with a learned variance, for `ddpm:variance=learned`.

    It has the network and the data of `digits`, with the loss L_simple + 0.001 L_vlb (Nichol & Dhariwal 2021, eq. 16).
    """

    features = "digits-cnn"
    classifier = "digits-classifier"


class MNIST(_Discrete):
    """The embedded class-conditional U-Net of MNIST's 28x28 digits (ε-prediction, T = 1000, linear β).

    It was trained on the 60,000 training images. FID needs no data: the statistics of `mnist` (the training images)
    and `mnist:split=test` are included. By default a cell has 10,000 images.
    """

    features = "mnist-cnn"
    classifier = "mnist-classifier"
    n = 10_000
