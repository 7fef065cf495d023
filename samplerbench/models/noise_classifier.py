"""A classifier of noisy images, p(y | x, σ), for classifier guidance."""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class NoiseConditionalClassifier(ModelMixin, ConfigMixin):
    """The classifier p(y | x, σ) for x = x₀ + σ z (Dhariwal & Nichol 2021, section 4).

    The input of the network is x/√(σ² + σ_data²), which has unit variance at every noise level. A sinusoidal embedding
    of log σ scales and shifts the feature maps. One classifier therefore works with every schedule.

    Args:
        in_channels: number of image channels, C.
        num_classes: number of classes, K.
        channels: number of channels at each resolution. Each resolution after the first halves the image size.
        sigma_data: standard deviation of the data in [-1, 1].
        groups: number of groups of the group normalisation.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        channels: tuple[int, ...] = (32, 64, 64),
        sigma_data: float = 0.5,
        groups: int = 8,
    ) -> None:
        super().__init__()
        width = channels[-1]
        self.embed = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        previous = (channels[0], *channels[:-1])
        self.blocks = nn.ModuleList(
            _Block(a, b, width, groups, stride=1 if i == 0 else 2)
            for i, (a, b) in enumerate(zip(previous, channels, strict=True))
        )
        self.head = nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), nn.Flatten())
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.out = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            x: noisy states, (B, C, H, W).
            sigma: noise levels, (B,).

        Returns:
            Logits, (B, K).
        """
        scale = (sigma**2 + self.config.sigma_data**2).rsqrt()
        embedding = self.embed(_sinusoids(sigma.log() / 4, 32).to(x.dtype))
        h = self.stem(x * scale.to(x.dtype)[:, None, None, None])
        for block in self.blocks:
            h = block(h, embedding)
        return self.out(self.head(self.pool(h)))


class _Block(nn.Module):
    def __init__(self, a: int, b: int, width: int, groups: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, a)
        self.conv1 = nn.Conv2d(a, b, 3, padding=1, stride=stride)
        self.modulate = nn.Linear(width, 2 * b)
        self.norm2 = nn.GroupNorm(groups, b)
        self.conv2 = nn.Conv2d(b, b, 3, padding=1)
        self.skip = nn.Conv2d(a, b, 1, stride=stride)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(nn.functional.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


def _sinusoids(value: Tensor, dim: int) -> Tensor:
    frequencies = torch.exp(
        torch.arange(dim // 2, device=value.device, dtype=value.dtype) * (math.log(200.0) / (dim // 2 - 1))
    )
    angles = value[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
