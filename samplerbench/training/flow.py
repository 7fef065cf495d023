"""Train a diffusers `UNet2DModel` as a rectified flow: the velocity of straight paths from data to noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samplerbench.data import ImageSet
from samplerbench.data.pixels import dequantise
from samplerbench.errors import Argument, UserError, argument
from samplerbench.models.model import Model
from samplerbench.training.loop import StepRandom
from samplerbench.training.unet import COPIES, UNetSettings, UNetTask


class FlowTask(UNetTask):
    """Conditional flow matching: E‖v(y, t) - (z - x₀)‖² with y = (1-t) x₀ + t z (Liu et al. 2023; Lipman et al. 2023).

    Times are uniform in [0, 1), or logit-normal, t = sigmoid(u) with u ~ N(0, 1) (Esser et al. 2024, eq. 19). The time
    input of the network is 1000 t, as the flow-matching schedulers of diffusers give it.

    Args:
        data: the training data.
        settings: settings of the network and the loss.
    """

    value = ("velocity error", "")

    def __init__(self, data: ImageSet, settings: UNetSettings) -> None:
        for name in ("learn_variance", "clip_sample"):
            if getattr(settings, name):
                raise UserError(f"{argument(name)} cannot be used with {argument('objective', 'flow')}.")
        super().__init__(data, settings)
        self.scheduler_config = {"num_train_timesteps": settings.timesteps}

    def check_process(self, model: Model, name: Argument) -> None:
        if model.flow is None or model.flow.timesteps != self.settings.timesteps:
            raise UserError(
                f"{name}: it is not a rectified flow with {argument('timesteps', self.settings.timesteps)}; use the "
                f"{argument('objective')} and the {argument('timesteps')} that it was trained with."
            )

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor | None, random: StepRandom) -> Tensor:
        images = self.augmented(images, random)
        t = random.uniform() if self.settings.times == "uniform" else random.normal().sigmoid()
        noise = random.normal(*images.shape[1:])
        labels = self.dropped(labels, random)
        return self._error(network, images, noise, t, labels).mean()

    def _error(self, network: nn.Module, x0: Tensor, z: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The squared error of the velocity, (B, C, H, W)."""
        time = t[:, None, None, None]
        output = network((1 - time) * x0 + time * z, self.settings.timesteps * t, class_labels=labels).sample
        return (output.float() - (z - x0)).square()

    @torch.no_grad()
    def evaluate(self, network: nn.Module, data: ImageSet) -> float:
        """The mean squared error of the velocity on held-out images, for uniform times.

        One time is drawn for each of the copies of an image, stratified over all of them, with the same noise in every
        evaluation.

        Args:
            network: the network in evaluation mode.
            data: held-out images. Labels are given to a class-conditional network.

        Returns:
            The error. Lower is better.
        """
        device = next(network.parameters()).device
        draws = torch.Generator().manual_seed(0)
        total = COPIES * len(data)
        t = ((torch.arange(total) + torch.rand(total, generator=draws)) / total)[torch.randperm(total, generator=draws)]
        image = torch.arange(total) % len(data)
        x0, error = dequantise(data.images), 0.0
        for rows in torch.arange(total).split(1024):
            images = x0[image[rows]]
            noise = torch.randn(images.shape, generator=draws)
            labels = None if self.classes is None or data.labels is None else data.labels[image[rows]].to(device)
            terms = self._error(network, images.to(device), noise.to(device), t[rows].to(device), labels)
            error += float(terms.double().flatten(1).mean(1).sum())
        return error / total

    def pipeline(self, network: nn.Module) -> Any:
        """The diffusers pipeline that is saved."""
        from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler

        return DDPMPipeline(unet=network, scheduler=FlowMatchEulerDiscreteScheduler(**self.scheduler_config))

    @torch.no_grad()
    def preview(self, network: nn.Module, file: Path) -> None:
        from samplerbench.data.grid import save_grid

        device = next(network.parameters()).device
        config: Any = network.config
        generator = torch.Generator().manual_seed(0)
        y = torch.randn((100, config.in_channels, config.sample_size, config.sample_size), generator=generator)
        y = y.to(device)
        labels = None if self.classes is None else (torch.arange(100, device=device) // 10) % self.classes
        steps = 50
        for i in range(steps):
            t = torch.full((100,), self.settings.timesteps * (1 - i / steps), device=device)
            y = y - network(y, t, class_labels=labels).sample / steps
        save_grid(self.decode(y).cpu(), file, columns=10)
