"""Train a small diffusers `AutoencoderKL`, the first stage of latent diffusion (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from samplerbench.data import ImageSet
from samplerbench.data.pixels import dequantise
from samplerbench.errors import UserError, argument
from samplerbench.training.loop import StepRandom, Task

CHUNK = 500
"""Batch size for encoding a data set."""

MEASURED = 10_000
"""Maximum number of training images for measuring the scaling factor and the errors of the trained network."""


@dataclass(frozen=True)
class AutoencoderSettings:
    """Settings of the network and the loss, as the options of `samplerbench train autoencoder`.

    kl is the weight of the KL divergence, 2s² for a decoder N(x̂, s²).
    """

    channels: tuple[int, ...] = (8, 16, 32)
    layers: int = 1
    latent_channels: int = 4
    groups: int = 8
    attention: bool = False
    error: Literal["l2", "l1"] = "l2"
    kl: float = 1e-3


class Autoencoding(nn.Module):
    """A forward pass of an `AutoencoderKL` with given noise of the posterior."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder: Any = autoencoder

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns x̂ (B, C, H, W) for z = μ + s·noise, and μ and log s² of the posterior, (B, c, h, w)."""
        posterior = self.autoencoder.encode(images).latent_dist
        z = posterior.mean + posterior.std * noise
        return self.autoencoder.decode(z).sample, posterior.mean, posterior.logvar


class AutoencoderTask(Task):
    """mean |x - x̂|² (or |x - x̂|) + kl · KL(q(z | x) ‖ N(0, I))/d over the d values of an image.

    With l2 and kl = 2s² this is, up to a factor and a constant, the negative evidence lower bound of a variational
    autoencoder whose decoder is N(x̂, s² I) (Kingma & Welling 2014 eq. 10).
    """

    what = "autoencoder"

    def __init__(self, data: ImageSet, settings: AutoencoderSettings) -> None:
        from diffusers import AutoencoderKL

        channels, height, width = data.shape
        depth = len(settings.channels)
        factor = 2 ** (depth - 1)
        if not depth or any(value % settings.groups for value in settings.channels):
            raise UserError(
                f"{argument('channels', settings.channels)}: give multiples of {argument('groups', settings.groups)}."
            )
        if height % factor or width % factor:
            raise UserError(
                f"{data.name} is {height}x{width}; an autoencoder of {depth} resolutions needs sides that are "
                f"multiples of {factor}: give fewer {argument('channels')}."
            )
        self.data, self.settings = data, settings
        self.latent_shape = (settings.latent_channels, height // factor, width // factor)
        autoencoder = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            block_out_channels=settings.channels,
            layers_per_block=settings.layers,
            latent_channels=settings.latent_channels,
            norm_num_groups=settings.groups,
            sample_size=max(height, width),
            mid_block_add_attention=settings.attention,
        )
        self.network: nn.Module = Autoencoding(autoencoder)
        self._parts: dict[str, Tensor] = {}

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor | None, random: StepRandom) -> Tensor:
        decoded, mean, log_variance = network(images, random.normal(*self.latent_shape))
        difference = decoded.float() - images
        error = (difference.square() if self.settings.error == "l2" else difference.abs()).mean()
        divergence = divergences(mean.float(), log_variance.float()).mean()
        self._parts = {self.settings.error: error.detach(), "KL": divergence.detach()}
        return error + self.settings.kl * divergence / images[0].numel()

    def parts(self) -> dict[str, Tensor]:
        return self._parts

    def identity(self) -> dict[str, Any]:
        return asdict(self.settings)

    @torch.no_grad()
    def save(self, network: nn.Module, out: Path) -> dict[str, Any]:
        autoencoder: Any = network.autoencoder
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(0))
        part = self.data.subset(order[:MEASURED], "measured")
        squares = divergence = 0.0
        means, variances = [], []
        for images, mean, log_variance in encoded(autoencoder, part):
            decoded = autoencoder.decode(mean).sample
            squares += float((decoded.float() - images).double().square().sum())
            divergence += float(divergences(mean.float(), log_variance.float()).double().sum())
            means.append(mean.double().cpu())
            variances.append(log_variance.double().exp().cpu())
        deviation = sample_deviation(torch.cat(means), torch.cat(variances))
        autoencoder.register_to_config(scaling_factor=1 / deviation)
        autoencoder.save_pretrained(out, safe_serialization=True)
        return {
            "parameters": sum(p.numel() for p in autoencoder.parameters()),
            "latent_shape": list(self.latent_shape),
            "scaling_factor": 1 / deviation,
            "scaling": "1/standard deviation of posterior samples",
            "measured_images": len(part),
            "reconstruction_mse": squares / part.images.numel(),
            "kl_nats_per_image": divergence / len(part),
        }

    @torch.no_grad()
    def preview(self, network: nn.Module, file: Path) -> None:
        """Write rows of images, each above a row of their reconstructions from the posterior mean."""
        from samplerbench.data.grid import save_grid

        autoencoder: Any = network.autoencoder
        rows = []
        for ten in dequantise(self.data.images[:50]).to(next(network.parameters()).device).split(10):
            rows += [ten, autoencoder.decode(autoencoder.encode(ten).latent_dist.mode()).sample]
        save_grid(torch.cat(rows).cpu(), file, columns=10)


def divergences(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(μ, s²) ‖ N(0, I)) of each image in nats, (B,): Σ (μ² + s² - 1 - log s²)/2 (Kingma & Welling 2014)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


def sample_deviation(mean: Tensor, variance: Tensor) -> float:
    """The standard deviation of posterior samples over all images and latent values: √(Var[μ] + E[s²])."""
    return float((mean.var(correction=0) + variance.mean()).sqrt())


@torch.no_grad()
def encoded(autoencoder: Any, data: ImageSet) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Encode a data set in chunks. Yields images in [-1, 1], and μ and log s² of the posterior."""
    device = next(autoencoder.parameters()).device
    for part in data.images.split(CHUNK):
        images = dequantise(part.to(device))
        posterior = autoencoder.encode(images).latent_dist
        yield images, posterior.mean, posterior.logvar
