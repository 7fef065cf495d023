"""The default model: a class-conditional U-Net for the scikit-learn digits, included with samplerbench."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from samplerbench.assets import asset
from samplerbench.models.diffusers_unet import load_diffusers_unet
from samplerbench.models.model import Model, ModelSource
from samplerbench.options import option


@dataclass(frozen=True)
class Digits(ModelSource):
    """The embedded class-conditional U-Net of real 8x8 digits (ε-prediction, T = 1000, linear β).

    It was trained on the 1,442 images of `digits:split=train`, with early stopping on the 355 held-out images.
    """

    rounding: Literal["fractional", "nearest"] = option(
        "fractional", "how a noise level between two timesteps is met: interpolated in log σ, or rounded"
    )

    def load(self, device: torch.device, dtype: torch.dtype) -> Model:
        model = load_diffusers_unet(str(asset("digits")), device, dtype, self.rounding)
        model.identity["source"] = "digits"
        model.features = "digits-cnn"
        model.classifier_folder = str(asset("digits-classifier"))
        return model
