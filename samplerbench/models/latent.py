"""Autoencoders between images and the latents that a diffusion model works on (Rombach et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samplerbench.errors import UserError, argument
from samplerbench.limits import MAX_CHANNELS
from samplerbench.models.checkpoint import Checkpoint

PIXELS_AT_ONCE = 2**19
"""Pixels that are encoded or decoded together: two images of 512 x 512, or 512 of 32 x 32."""


@dataclass
class Autoencoder:
    """An `AutoencoderKL` or `VQModel` with its latents' scale: z = (E(image) - shift)·scale.

    It runs in the state's precision: float32, or float64 for a float64 network. Images are encoded and decoded in
    chunks whose size follows from an image's size alone, so memory is bounded and no image depends on the batch.

    module: the autoencoder. image_shape: (C, H, W). latent_shape: (c, h, w). scale, shift: `scaling_factor` and
    `shift_factor` of its configuration.
    """

    module: Any
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    scale: float
    shift: float = 0.0

    @property
    def decoder(self) -> nn.Module:
        """The part that makes images: where decoder passes are counted."""
        return self.module.decoder

    @property
    def chunk(self) -> int:
        """Images at a time."""
        return max(1, PIXELS_AT_ONCE // (self.image_shape[1] * self.image_shape[2]))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W), near [-1, 1], of latents (B, c, h, w): Dec(z/scale + shift)."""
        z = latents.to(self._dtype) / self.scale + self.shift
        parts = [self.module.decode(part.contiguous()).sample for part in z.split(self.chunk)]
        return torch.cat(parts).to(latents.dtype)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, c, h, w) of images (B, C, H, W) in [-1, 1]: (the posterior's mode - shift)·scale.

        A vector-quantised autoencoder's are those before quantisation.

        Raises:
            UserError: images of another shape than the model's.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            found, wanted = ("x".join(map(str, shape)) for shape in (images.shape[1:], self.image_shape))
            raise UserError(
                f"the images are {found}, but the model's are {wanted}; name others with {argument('data')}."
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
    """The autoencoder in a pipeline's folder `part`, and what the protocol says of it.

    channels, size: of the network's state, which must be the autoencoder's latents. dtype: the network's.

    Raises:
        UserError: an unsupported class, missing weights, or latents with other channels than the network's.
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
            f"{checkpoint.source}: the network takes {channels} channels, but the latents of the autoencoder in "
            f"{part}/ have {latents}; the two do not belong together."
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
