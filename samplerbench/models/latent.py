"""Autoencoders of latent diffusion models (Rombach et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samplerbench.errors import UserError, argument
from samplerbench.limits import MAX_CHANNELS
from samplerbench.models.checkpoint import Checkpoint

PIXELS_AT_ONCE = 2**19
"""Maximum number of pixels per chunk: two images of 512 x 512, or 512 images of 32 x 32."""


@dataclass
class Autoencoder:
    """An `AutoencoderKL` or `VQModel` with the scale of its latents: z = (E(image) - shift)·scale.

    It uses the precision of the states: float32, or float64 for a float64 network. Images are encoded and decoded in
    chunks. The chunk size depends only on the image size, so memory is bounded and images do not depend on the batch.

    Attributes:
        module: the autoencoder.
        image_shape: shape (C, H, W) of the images.
        latent_shape: shape (c, h, w) of the latents.
        scale: `scaling_factor` of the configuration.
        shift: `shift_factor` of the configuration.
    """

    module: Any
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    scale: float
    shift: float = 0.0

    @property
    def decoder(self) -> nn.Module:
        """The decoder module. Decoder passes are counted on it."""
        return self.module.decoder

    @property
    def chunk(self) -> int:
        """Number of images per chunk."""
        return max(1, PIXELS_AT_ONCE // (self.image_shape[1] * self.image_shape[2]))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images: Dec(z/scale + shift).

        Args:
            latents: latents z, (B, c, h, w).

        Returns:
            Images, (B, C, H, W), approximately in [-1, 1].
        """
        z = latents.to(self._dtype) / self.scale + self.shift
        parts = [self.module.decode(part.contiguous()).sample for part in z.split(self.chunk)]
        return torch.cat(parts).to(latents.dtype)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images to latents: (mode of the posterior - shift)·scale.

        For a vector-quantised autoencoder, the latents before quantisation are used.

        Args:
            images: images in [-1, 1], (B, C, H, W).

        Returns:
            Latents, (B, c, h, w).

        Raises:
            UserError: if the shape of the images differs from `image_shape`.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            found, wanted = ("x".join(map(str, shape)) for shape in (images.shape[1:], self.image_shape))
            raise UserError(
                f"the images have shape {found}, but the model requires {wanted}; use other images with "
                f"{argument('data')}."
            )
        device = next(self.module.parameters()).device
        parts = []
        for part in images.split(self.chunk):
            found = self.module.encode(part.to(device, self._dtype))
            mode = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
            parts.append(((mode - self.shift) * self.scale).to(images.dtype))
        return torch.cat(parts).to(images.device)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype


def load_autoencoder(
    checkpoint: Checkpoint, part: str, channels: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Autoencoder, dict[str, Any]]:
    """Load the autoencoder of a pipeline.

    Args:
        checkpoint: the opened pipeline.
        part: folder of the autoencoder.
        channels: number of channels of the network's state, which must match the latents.
        size: (h, w) of the network's state.
        device: device of the autoencoder.
        dtype: dtype of the network's weights.

    Returns:
        The autoencoder, and its protocol fields.

    Raises:
        UserError: if the class is not supported, weights are missing, or the channels of the latents differ from those
            of the network.
    """
    import diffusers

    kind = checkpoint.require(part, "AutoencoderKL", "VQModel")
    config = checkpoint.fields(part, getattr(diffusers, kind))
    latents = config.integer_or_none("vq_embed_dim", 1, MAX_CHANNELS)
    latents = latents or config.integer("latent_channels", 1, MAX_CHANNELS)
    colours = config.integer("out_channels", 1, MAX_CHANNELS)
    scale, shift = config.number("scaling_factor", 1e-12, 1e12), config.number("shift_factor", -1e12, 1e12, 0.0)
    if latents != channels:
        raise UserError(
            f"{checkpoint.source}: the network requires {channels} channels, but the latents of the autoencoder in "
            f"{part}/ have {latents}."
        )
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    loaded = checkpoint.load(part, getattr(diffusers, kind), precision, device)
    settings = loaded.module.config
    factor = 2 ** (len(settings.block_out_channels) - 1)
    found = Autoencoder(
        module=loaded.module,
        image_shape=(colours, size[0] * factor, size[1] * factor),
        latent_shape=(channels, *size),
        scale=scale,
        shift=shift,
    )
    return found, {
        "autoencoder": kind,
        "autoencoder weights": loaded.sha256,
        "scaling factor": found.scale,
        "shift": found.shift,
    }
