"""Train a `UNet2DModel` on the latents of an autoencoder: latent diffusion (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samplerbench.data import ImageSet
from samplerbench.errors import UserError, argument
from samplerbench.models.fields import Fields
from samplerbench.models.files import check_no_code, check_weights, hash_files
from samplerbench.training.autoencoder import encoded
from samplerbench.training.loop import StepRandom
from samplerbench.training.unet import UNetSettings, UNetTask
from samplerbench.untrusted import read_json, reason, user_path

_CPU = torch.device("cpu")


class LatentUNetTask(UNetTask):
    """`UNetTask` on z·scaling_factor, where z is a new sample of the image's posterior in every step.

    The data is encoded once, when the task is created, and stored as means and standard deviations of the posteriors.

    Args:
        data: the training data.
        settings: settings of the network and the loss.
        autoencoder: folder of a diffusers `AutoencoderKL`.
        device: device for encoding the data.

    Raises:
        UserError: no such autoencoder, one of other images, or an option that has no meaning for latents.
    """

    def __init__(self, data: ImageSet, settings: UNetSettings, autoencoder: str, device: torch.device = _CPU) -> None:
        refused = {
            "learn_variance": settings.learn_variance,  # its bound is of pixels with 256 levels
            "clip_sample": settings.clip_sample,
            "flip": settings.flip,
            "shift": bool(settings.shift),
        }
        if unsupported := [name for name, wanted in refused.items() if wanted]:
            raise UserError(
                f"{argument(unsupported[0])} applies to images, but {argument('autoencoder')} trains on latents; "
                "leave it out."
            )
        self.autoencoder = load_autoencoder(autoencoder).to(device)
        config: Any = self.autoencoder.config
        if config.in_channels != data.shape[0]:
            raise UserError(
                f"the autoencoder in {autoencoder} is of images with {config.in_channels} channels; "
                f"{data.name} has {data.shape[0]}."
            )
        self.factor = float(config.scaling_factor)
        self.weights = hash_files(sorted(user_path(autoencoder).glob("*.safetensors")))
        parts = [
            torch.cat([mean, (logarithm / 2).exp()], 1).cpu() for _, mean, logarithm in encoded(self.autoencoder, data)
        ]
        self.posteriors = torch.cat(parts)
        channels, height, width = self.posteriors.shape[1:]
        super().__init__(data, settings, (channels // 2, height, width))

    def inputs(self, data: ImageSet, index: Tensor, device: torch.device) -> Tensor:
        """Means and standard deviations of the posteriors of the images at `index`, (B, 2c, h, w)."""
        return self.posteriors[index].to(device)

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor | None, random: StepRandom) -> Tensor:
        mean, deviation = images.chunk(2, dim=1)
        latents = (mean + deviation * random.normal(*mean.shape[1:])) * self.factor
        return super().loss(network, latents, labels, random)

    def evaluator(self, data: ImageSet) -> Callable[[nn.Module], float]:
        """See `Task.evaluator`. The bound is defined for images with 256 levels, not for latents.

        Raises:
            UserError: always.
        """
        raise UserError(f"{argument('held_out')} requires a network in pixel space; leave it out.")

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "autoencoder": self.weights}

    def decode(self, x: Tensor) -> Tensor:
        self.autoencoder.to(x.device)
        return self.autoencoder.decode(x / self.factor).sample

    def pipeline(self, network: nn.Module) -> Any:
        from diffusers import DDIMScheduler, LDMPipeline

        scheduler = DDIMScheduler(**self.scheduler_config, clip_sample=False, timestep_spacing="trailing")
        return LDMPipeline(vqvae=self.autoencoder, unet=network, scheduler=scheduler)

    def save(self, network: nn.Module, out: Path) -> dict[str, Any]:
        figures = super().save(network, out)
        parameters = sum(p.numel() for p in self.autoencoder.parameters())
        shape = [self.posteriors.shape[1] // 2, *self.posteriors.shape[2:]]
        return figures | {
            "latent_shape": shape,
            "latents": "posterior samples, drawn anew in every step",
            "autoencoder_sha256": self.weights,
            "autoencoder_parameters": parameters,
        }


def load_autoencoder(folder: str) -> Any:
    """Load a diffusers `AutoencoderKL` from a folder in float32, in evaluation mode. Requires safetensors.

    Raises:
        UserError: no such folder, or no such autoencoder in it.
    """
    from diffusers import AutoencoderKL

    path = user_path(folder)
    if not (path / "config.json").exists() or not list(path.glob("*.safetensors")):
        raise UserError(
            f"no autoencoder in {folder}: config.json or its safetensors weights do not exist; "
            "`samplerbench train autoencoder` makes one."
        )
    complaint = f"{folder} cannot be loaded as an AutoencoderKL"
    fields = Fields(read_json(path / "config.json", complaint), f"{folder}: config.json")
    check_no_code(fields.values, complaint)
    check_weights(path, path.glob("*.safetensors"), None, complaint)
    fields.number("scaling_factor", 1e-12, 1e12, 1.0)
    try:
        found, info = AutoencoderKL.from_pretrained(
            path,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # what diffusers raises for a configuration of its classes has no end
        raise UserError(f"{complaint}: {reason(error)}") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{folder} is not a complete AutoencoderKL: its weights lack {len(missing)} tensors, {missing[0]}."
        )
    return found.requires_grad_(False).eval()
