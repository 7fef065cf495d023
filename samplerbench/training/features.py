"""Train the feature network of an FID for small images, and write the reference statistics beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samplerbench.data import ImageSet
from samplerbench.data.pixels import dequantise
from samplerbench.errors import UserError, argument
from samplerbench.metrics.feature_network import FeatureNetwork
from samplerbench.training.augment import random_shift
from samplerbench.training.loop import StepRandom, Task, step_seed


class FeaturesTask(Task):
    """Cross-entropy on images shifted by up to one pixel; a fifth of the data is held out to report an accuracy."""

    what = "features"

    def __init__(self, data: ImageSet, channels: tuple[int, ...] = (32, 64), features: int = 64) -> None:
        if data.labels is None or data.classes is None:
            raise UserError(f"{data.name} has no labels to train features on.")
        if not channels or any(width % 8 for width in channels):
            raise UserError(f"{argument('channels', channels)}: give multiples of 8, the normalisation's groups.")
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(step_seed(0, 0)))
        cut = len(data) // 5
        self.data = data
        self.held_out, self.train = data.subset(order[:cut], "held out"), data.subset(order[cut:], "train")
        self.network: nn.Module = FeatureNetwork(data.shape[0], data.classes, channels, features)

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor | None, random: StepRandom) -> Tensor:
        assert labels is not None
        shifted = random_shift(images, 1, 0.5, random)
        return nn.functional.cross_entropy(network(shifted)[1].float(), labels)

    @torch.no_grad()
    def save(self, network: nn.Module, out: Path) -> dict[str, Any]:
        network.save_pretrained(out)  # type: ignore[operator]
        device = next(network.parameters()).device

        def accuracy(part: ImageSet) -> float:
            assert part.labels is not None
            chosen = [network(dequantise(x.to(device)))[1].argmax(1).cpu() for x in part.images.split(1000)]
            return round((torch.cat(chosen) == part.labels).float().mean().item(), 4)

        return {
            "parameters": sum(p.numel() for p in network.parameters()),
            "features": network.config.features,  # type: ignore[union-attr]
            "training_accuracy": accuracy(self.train),
            "held_out_accuracy": accuracy(self.held_out),
            "held_out_images": len(self.held_out),
        }
