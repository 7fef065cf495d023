"""Train a noise-conditional classifier for classifier guidance (Dhariwal & Nichol 2021 section 4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samplerbench.data import ImageSet
from samplerbench.data.pixels import dequantise
from samplerbench.errors import UserError, argument
from samplerbench.models.noise_classifier import NoiseConditionalClassifier
from samplerbench.training.loop import StepRandom, Task

MEASURED = 2_000
"""Maximum number of training images for measuring the accuracies in the card."""


class ClassifierTask(Task):
    """Cross-entropy of p(y | x₀ + σ z, σ) with log σ uniform between the model's smallest and largest level."""

    what = "classifier"

    def __init__(
        self,
        data: ImageSet,
        channels: tuple[int, ...] = (32, 64, 64),
        sigma_min: float = 0.01,
        sigma_max: float = 157.0,
    ) -> None:
        if data.labels is None or data.classes is None:
            raise UserError(f"{data.name} has no labels to train a classifier on.")
        if not channels or any(width % 8 for width in channels):
            raise UserError(f"{argument('channels', channels)}: give multiples of 8, the normalisation's groups.")
        if sigma_min >= sigma_max:
            limit = argument("sigma_max", sigma_max)
            raise UserError(f"{argument('sigma_min', sigma_min)}: it must be less than {limit}.")
        self.data, self.range = data, (sigma_min, sigma_max)
        pixels = dequantise(data.images)
        self.network: nn.Module = NoiseConditionalClassifier(
            data.shape[0], data.classes, channels, round(float(pixels.std()), 4)
        )

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor | None, random: StepRandom) -> Tensor:
        assert labels is not None
        low, high = (torch.tensor(s).log() for s in self.range)
        sigma = (low + (high - low) * random.uniform()).exp()
        noisy = images + sigma[:, None, None, None] * random.normal(*images.shape[1:])
        return nn.functional.cross_entropy(network(noisy, sigma).float(), labels)

    def identity(self) -> dict[str, Any]:
        return {"sigma_min": self.range[0], "sigma_max": self.range[1]}

    @torch.no_grad()
    def save(self, network: nn.Module, out: Path) -> dict[str, Any]:
        network.save_pretrained(out)  # type: ignore[operator]
        device = next(network.parameters()).device
        assert self.data.labels is not None
        images, labels = self.data.images[:MEASURED], self.data.labels[:MEASURED]
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        accuracy = {}
        for level in (0.01, 0.1, 0.3, 1.0, 3.0, 10.0):
            hits = []
            for part, z, truth in zip(images.split(1000), noise.split(1000), labels.split(1000), strict=True):
                noisy = (dequantise(part) + level * z).to(device)
                hits.append(network(noisy, torch.full((len(part),), level, device=device)).argmax(1).cpu() == truth)
            accuracy[f"{level:g}"] = round(torch.cat(hits).float().mean().item(), 4)
        return {
            "parameters": sum(p.numel() for p in network.parameters()),
            "sigma_min": self.range[0],
            "sigma_max": self.range[1],
            "classes": self.data.classes,
            "training_accuracy_at_sigma": accuracy,
        }
