"""A small convolutional network whose penultimate layer gives features for FID on small images."""

from __future__ import annotations

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class FeatureNetwork(ModelMixin, ConfigMixin):
    """A classifier of clean images with a feature layer.

    Args:
        in_channels: number of image channels C. The channels of RGB input to a network with C = 1 are averaged.
        num_classes: number of classes K.
        channels: channel width of each resolution. Each resolution after the first halves the image size.
        features: dimension d of the feature layer.
        groups: number of groups of the group normalisation.
        dropout: dropout probability before the classification layer.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        channels: tuple[int, ...] = (32, 64),
        features: int = 64,
        groups: int = 8,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        previous = in_channels
        for i, width in enumerate(channels):
            for j in range(2):
                stride = 2 if i > 0 and j == 0 else 1
                layers += [
                    nn.Conv2d(previous, width, 3, padding=1, stride=stride),
                    nn.GroupNorm(groups, width),
                ]
                layers.append(nn.SiLU())
                previous = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.project = nn.Linear(16 * previous, features)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(features, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, d) and logits (B, K) of images (B, C, H, W) in [-1, 1]."""
        if images.shape[1] == 3 and self.config.in_channels == 1:
            images = images.mean(dim=1, keepdim=True)
        features = nn.functional.silu(self.project(self.body(images)))
        return features, self.out(self.drop(features))
