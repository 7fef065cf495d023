"""Distances between decoded images and those of the same model's converged solution."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from samplerbench.metrics import Accumulator, Batch, Context, Metric
from samplerbench.sampling import Sampler, UserError, option
from samplerbench_plugins.lpips import NeedsLPIPS
from samplerbench_plugins.pf_ode import ProbabilityFlow

MAX_PSNR = 60.0
"""The limit of a single PSNR in dB, for 8 bits that of libvmaf: 6·8 + 12. Equal images have an infinite PSNR."""


@dataclass(frozen=True)
class ImageGap(Metric, ABC):
    """Base of metrics that compare each image with the converged one from the same x_T, as uint8 pixels."""

    needs_features: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    images: int = option(0, "how many images of each block are solved and compared; 0 is all", ge=0, le=100_000_000)
    tol: float = option(1e-5, "relative and absolute tolerance of the converged solution", gt=0.0, le=1e-2)

    @property
    def solver(self) -> ProbabilityFlow:
        """The sampler that computes the converged solution, the same as that of `gap`."""
        return ProbabilityFlow(solver="rk45", rtol=self.tol, atol=self.tol)

    def solution(self, n: int) -> tuple[Sampler, int]:
        return self.solver, min(self.images or n, n)

    def start(self, context: Context) -> Accumulator:
        return _Mean(self, context)

    def check(self, images: Tensor) -> None:
        """Raise UserError for images (B, C, H, W) that cannot be measured. Called before anything is solved."""

    @abstractmethod
    def measure(self, images: Tensor, converged: Tensor) -> Tensor:
        """The values (B,) float64 on the CPU of images and converged images, both (B, C, H, W) uint8 on one device."""


@dataclass(frozen=True)
class PSNRGap(ImageGap):
    """Peak signal-to-noise ratio to the converged image from the same x_T, in dB: the mean of 10 log₁₀(255²/MSE).

    MSE is that of the uint8 pixels of one image over all channels, after decoding. Each image's PSNR is limited to
    60 dB, the limit of libvmaf for 8 bits. This includes equal images (MSE = 0); `equal` is their share. The converged
    image is that of `gap`: the probability-flow ODE (Song et al. 2021) of the same model, prompts and guidance, solved
    to the tolerance `tol`. No real images are needed. A sampler that draws noise has no such image, and its cell in a
    table stays empty.
    """

    better: ClassVar[Literal["lower", "higher"]] = "higher"

    def measure(self, images: Tensor, converged: Tensor) -> Tensor:
        error = (images.cpu().double() - converged.cpu().double()).square().flatten(1).mean(dim=1)
        return (10 * torch.log10(255**2 / error)).clamp(max=MAX_PSNR)


@dataclass(frozen=True)
class LPIPSGap(NeedsLPIPS, ImageGap):
    """Mean LPIPS to the converged image from the same x_T (Zhang et al. 2018, version 0.1), on decoded uint8 images.

    The converged image is that of `gap` and `psnr-gap`. The weights are the state dict of the package lpips as
    safetensors, with the network AlexNet or VGG-16, which is read off the file. Images keep their size.
    """

    def check(self, images: Tensor) -> None:
        self.lpips.check(images.shape)

    def measure(self, images: Tensor, converged: Tensor) -> Tensor:
        return self.lpips_on(images.device)(images, converged)


class _Mean(Accumulator):
    """The mean over images, and its standard error, from sums."""

    def __init__(self, metric: ImageGap, context: Context) -> None:
        self.metric, self.solver, self.context = metric, metric.solver, context
        self.sums = torch.zeros(4, dtype=torch.float64)
        """Number of images, Σ values, Σ values², number of images that are equal to the converged one."""

    def update(self, batch: Batch) -> None:
        if self.context.solve_images is None:
            raise UserError(f"the metric {self.metric.label()} has a value only within a run.")
        if batch.stochastic:
            return
        chosen = torch.ones(len(batch.index), dtype=torch.bool)
        if self.metric.images:
            chosen = batch.index.cpu() % self.context.n < self.metric.images
        if not chosen.any():
            return
        images = batch.images[chosen.to(batch.images.device)]
        self.metric.check(images)
        converged = self.context.solve_images(batch.index[chosen], self.solver).to(images.device)
        values = self.metric.measure(images, converged)
        equal = (images == converged).flatten(1).all(dim=1).cpu().double()
        self.sums = self.sums + torch.stack(
            [torch.tensor(len(values)).double(), values.sum(), values.square().sum(), equal.sum()]
        )

    def state(self) -> dict[str, Tensor]:
        return {"sums": self.sums}

    def merge(self, state: dict[str, Tensor]) -> None:
        self.sums = self.sums + state["sums"]

    def result(self) -> dict[str, Any]:
        n, total, squares, equal = self.sums.tolist()
        if not n:
            return {}
        mean = total / n
        entry = {"value": mean, "equal": equal / n}
        if n > 1:
            entry["standard_error"] = math.sqrt(max(0.0, squares / n - mean**2) / (n - 1))
        return entry
