"""Metrics of restored images: against the observed images, and against the observations."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from samplerbench.metrics import Accumulator, Batch, Context, Metric
from samplerbench.sampling import Observation, UserError, option
from samplerbench_plugins.lpips import NeedsLPIPS
from samplerbench_plugins.observations import mean_of_clusters

MAX_PSNR = 60.0
"""The limit of the PSNR of one image in dB. Equal images have an infinite PSNR."""


@dataclass(frozen=True)
class Restoration(Metric, ABC):
    """Base of metrics of each restored image. The value is the mean over the images.

    Its standard error is over the observations: several samples of one observation are not independent.
    """

    needs_features: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_truth: ClassVar[bool] = True

    def start(self, context: Context) -> Accumulator:
        return _Mean(self, context)

    @abstractmethod
    def measure(self, batch: Batch, truth: Tensor, observation: Observation | None) -> Tensor:
        """The values (B,) float64 of a batch.

        Args:
            batch: the restored images.
            truth: the observed images as uint8 pixels, (B, C, H, W), on the CPU.
            observation: the task and its operator. None outside a run with a task.
        """


@dataclass(frozen=True)
class PSNR(Restoration):
    """Peak signal-to-noise ratio of the restored images in dB: the mean of 10 log₁₀(255²/MSE).

    MSE is that of the uint8 pixels of one image over all channels. The PSNR of an image is limited to 60 dB. The mean
    squared error is least for the posterior mean, not for a sample of the posterior, whose expected MSE is twice as
    large (Blau & Michaeli 2018).
    """

    better: ClassVar[Literal["lower", "higher"]] = "higher"

    def measure(self, batch: Batch, truth: Tensor, observation: Observation | None) -> Tensor:
        error = (batch.images.cpu().double() - truth.double()).square().flatten(1).mean(1)
        return (10 * torch.log10(255**2 / error)).clamp(max=MAX_PSNR)


@dataclass(frozen=True)
class SSIM(Restoration):
    """Structural similarity of the restored images and the observed ones (Wang et al. 2004), the mean over images.

    With a Gaussian window of standard deviation 1.5 on uint8 pixels, k₁ = 0.01 and k₂ = 0.03, for each channel, over
    the positions at which the window is inside of the image.
    """

    better: ClassVar[Literal["lower", "higher"]] = "higher"

    size: int = option(
        11, "side of the window in pixels, odd; at most the largest odd number of the sides", ge=1, le=99
    )

    def measure(self, batch: Batch, truth: Tensor, observation: Observation | None) -> Tensor:
        a, b = batch.images.cpu().double(), truth.double()
        shortest = min(a.shape[2:])
        size = min(self.size - 1 + self.size % 2, shortest - 1 + shortest % 2)
        offsets = torch.arange(size, dtype=torch.float64) - size // 2
        profile = (-0.5 * (offsets / 1.5) ** 2).exp()
        profile = profile / profile.sum()

        def mean(x: Tensor) -> Tensor:
            channels = x.shape[1]
            rows = torch.nn.functional.conv2d(
                x, profile.reshape(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels
            )
            across = profile.reshape(1, 1, 1, -1).repeat(channels, 1, 1, 1)
            return torch.nn.functional.conv2d(rows, across, groups=channels)

        mean_a, mean_b = mean(a), mean(b)
        variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
        covariance = mean(a * b) - mean_a * mean_b
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
        similarity = similarity / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
        return similarity.flatten(1).mean(1)


@dataclass(frozen=True)
class DataFidelity(Restoration):
    """Distance to the observation in units of its noise (this work): the mean of ‖y - A x̂‖/(σ_y √m), for m values of y.

    It is about 1 for the truth. Much less than 1 fits the noise. With σ_y = 0 it is the root mean square of y - A x̂.
    The states are measured before they are quantised.
    """

    def measure(self, batch: Batch, truth: Tensor, observation: Observation | None) -> Tensor:
        if observation is None or batch.inputs is None:
            raise UserError(f"the metric {self.label()} requires a task.")
        y = batch.inputs.tensors["observation"].to(batch.states)
        residual = (y - observation.operator.forward(batch.states)).double().flatten(1)
        return residual.square().mean(1).sqrt().cpu() / (observation.sigma or 1.0)


@dataclass(frozen=True)
class RestoredLPIPS(NeedsLPIPS, Restoration):
    """LPIPS of the restored images and the observed ones (Zhang et al. 2018, version 0.1), the mean over images.

    The weights are the state dict of the package lpips as safetensors, with the network AlexNet or VGG-16, which is
    read off the file. The uint8 images keep their size.
    """

    def start(self, context: Context) -> Accumulator:
        if context.model is not None:
            self.lpips.check(context.model.image_shape)
        return super().start(context)

    def measure(self, batch: Batch, truth: Tensor, observation: Observation | None) -> Tensor:
        self.lpips.check(tuple(truth.shape[1:]))
        return self.lpips_on(batch.images.device)(batch.images, truth.to(batch.images.device))


class _Mean(Accumulator):
    """The mean over images, from sums: for each observation, where it has several samples; else of all images."""

    def __init__(self, metric: Restoration, context: Context) -> None:
        self.metric = metric
        self.observation = None if context.model is None else context.model.observation
        count = 0 if self.observation is None else len(self.observation.images)
        self.repeated = count > 0 and (not context.n or count < context.n)
        self.sums = torch.zeros((count, 2) if self.repeated else 3, dtype=torch.float64)
        """Number of values and their sum, for each observation; or number of values, their sum, and that of squares."""

    def update(self, batch: Batch) -> None:
        if batch.truth is None:
            raise UserError(f"the metric {self.metric.label()} requires a task.")
        pixels = (batch.truth.cpu().double().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
        values = self.metric.measure(batch, pixels, self.observation)
        one = torch.ones_like(values)
        if self.repeated and self.observation is not None:
            image = self.observation.image(batch.index.cpu())
            self.sums = self.sums.index_add(0, image, torch.stack([one, values], dim=1))
        else:
            self.sums = self.sums + torch.stack([one.sum(), values.sum(), values.square().sum()])

    def state(self) -> dict[str, Tensor]:
        return {"sums": self.sums}

    def merge(self, state: dict[str, Tensor]) -> None:
        self.sums = self.sums + state["sums"]

    def result(self) -> dict[str, Any]:
        if self.repeated:
            return mean_of_clusters(self.sums)
        n, total, squares = self.sums.tolist()
        if not n:
            return {}
        mean = total / n
        entry = {"value": mean}
        if n > 1:
            entry["standard_error"] = math.sqrt(max(0.0, squares / n - mean**2) / (n - 1))
        return entry
