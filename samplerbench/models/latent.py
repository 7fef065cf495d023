"""Autoencoders of latent diffusion models (Rombach et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samplerbench.errors import UserError, argument
from samplerbench.limits import MAX_CHANNELS
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.fields import Fields

PIXELS_AT_ONCE = 2**19
"""Maximum number of pixels per chunk: two images of 512 x 512, or 512 images of 32 x 32."""

VIDEO = "AutoencoderKLQwenImage"
"""An autoencoder of videos. An image is a video of one frame."""
KINDS = ("AutoencoderKL", "VQModel", "AutoencoderDC", VIDEO)
"""Supported autoencoders of diffusers."""
_BLOCKS = {"AutoencoderDC": "encoder_block_out_channels", VIDEO: "temperal_downsample"}
"""Key of the configuration whose length gives the downsampling, where it is not `block_out_channels`."""


@dataclass
class Autoencoder:
    """An autoencoder with the scale of its latents: z = (E(image) - shift)·scale.

    Latents with a mean and a standard deviation per channel use z = (E(image) - mean)·scale/std instead.

    It uses the precision of the states: float32, or float64 for a float64 network. Images are encoded and decoded in
    chunks. The chunk size depends only on the image size, so memory is bounded and images do not depend on the batch.

    Attributes:
        module: the autoencoder.
        image_shape: shape (C, H, W) of the images.
        latent_shape: shape (c, h, w) of the latents.
        scale: `scaling_factor` of the configuration.
        shift: `shift_factor` of the configuration.
        mean: `latents_mean` of the configuration, (c, 1, 1) float64. None if it has none.
        std: `latents_std` of the configuration, (c, 1, 1) float64. None if it has none.
        frames: whether images are videos of one frame for the module, (B, C, 1, H, W).
    """

    module: Any
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    scale: float
    shift: float = 0.0
    mean: Tensor | None = None
    std: Tensor | None = None
    frames: bool = False

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
        z = latents.to(self._dtype) / self._scale(latents.device) + self._shift(latents.device)
        return self.decode_unscaled(z).to(latents.dtype)

    def decode_unscaled(self, z: Tensor) -> Tensor:
        """Decode latents in the scale of the autoencoder: Dec(z).

        Args:
            z: latents, (B, c, h, w).

        Returns:
            Images, (B, C, H, W), in the precision of the autoencoder.
        """
        parts = [self._decode(part.contiguous()) for part in z.to(self._dtype).split(self.chunk)]
        return torch.cat(parts)

    def _decode(self, z: Tensor) -> Tensor:
        if not self.frames:
            return self.module.decode(z).sample
        return self.module.decode(z[:, :, None]).sample[:, :, 0]

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
        device = execution_device(self.module)
        parts = []
        for part in images.split(self.chunk):
            pixels = part.to(device, self._dtype)
            found = self.module.encode(pixels[:, :, None] if self.frames else pixels)
            if hasattr(found, "latent_dist"):
                mode = found.latent_dist.mode()
            else:
                mode = found.latents if hasattr(found, "latents") else found.latent
            mode = mode[:, :, 0] if self.frames else mode
            parts.append(((mode - self._shift(device)) * self._scale(device)).to(images.dtype))
        return torch.cat(parts).to(images.device)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder q(z | x) = N(μ, s²) of a variational autoencoder. The prior of z is N(0, I), without `scale`.

        Args:
            images: images in [-1, 1], (B, C, H, W).

        Returns:
            μ and log s², (B, c, h, w) float64 on the device of the images.

        Raises:
            UserError: if the autoencoder is vector-quantised or deterministic.
        """
        device = execution_device(self.module)
        means, log_variances = [], []
        for part in images.split(self.chunk):
            pixels = part.to(device, self._dtype)
            encoded = self.module.encode(pixels[:, :, None] if self.frames else pixels)
            if not hasattr(encoded, "latent_dist"):
                raise UserError(
                    f"the encoder of this model, {type(self.module).__name__}, is deterministic, so it has no evidence "
                    "lower bound; use a model with an AutoencoderKL."
                )
            q = encoded.latent_dist
            mean, log_variance = (v[:, :, 0] if self.frames else v for v in (q.mean, q.logvar))
            means.append(mean.to(images.device, torch.float64))
            log_variances.append(log_variance.to(images.device, torch.float64))
        return torch.cat(means), torch.cat(log_variances)

    def _scale(self, device: torch.device) -> Any:
        return self.scale if self.std is None else (self.scale / self.std).to(device, self._dtype)

    def _shift(self, device: torch.device) -> Any:
        return self.shift if self.mean is None else self.mean.to(device, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype


def execution_device(module: Any) -> torch.device:
    """Return the device on which a module runs. For an offloaded module, it differs from that of its weights.

    Args:
        module: the module.
    """
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return next(module.parameters()).device if device is None else torch.device(device)


def downsampling(checkpoint: Checkpoint, part: str) -> int:
    """Return the ratio of the side of an image to that of its latents, from the configuration of an autoencoder.

    Args:
        checkpoint: the opened pipeline.
        part: folder of the autoencoder.

    Raises:
        UserError: if the class is not supported, or the configuration is damaged.
    """
    import diffusers

    kind = checkpoint.require(part, *KINDS)
    config = checkpoint.fields(part, getattr(diffusers, kind))
    key = _BLOCKS.get(kind, "block_out_channels")
    blocks = config.values.get(key)
    if not isinstance(blocks, list | tuple) or not 1 <= len(blocks) <= 16:
        raise config.refusal(key, blocks, "a list of 1 to 16 values")
    return int(2 ** (len(blocks) - (kind != VIDEO)))


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

    kind = checkpoint.require(part, *KINDS)
    config = checkpoint.fields(part, getattr(diffusers, kind))
    if kind == VIDEO:
        latents = config.integer("z_dim", 1, MAX_CHANNELS)
        colours = config.integer("input_channels", 1, MAX_CHANNELS)
    else:
        latents = config.integer_or_none("vq_embed_dim", 1, MAX_CHANNELS) or config.integer(
            "latent_channels", 1, MAX_CHANNELS
        )
        colours = config.integer("in_channels" if kind == "AutoencoderDC" else "out_channels", 1, MAX_CHANNELS)
    scale = config.number("scaling_factor", 1e-12, 1e12, 1.0 if kind == VIDEO else None)
    shift = config.number("shift_factor", -1e12, 1e12, 0.0)
    mean, std = (_per_channel(config, key, latents) for key in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        mean = std = None
    if latents != channels:
        raise UserError(
            f"{checkpoint.source}: the network requires {channels} channels, but the latents of the autoencoder in "
            f"{part}/ have {latents}."
        )
    factor = downsampling(checkpoint, part)
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    loaded = checkpoint.load(part, getattr(diffusers, kind), precision, device)
    found = Autoencoder(
        module=loaded.module,
        image_shape=(colours, size[0] * factor, size[1] * factor),
        latent_shape=(channels, *size),
        scale=scale,
        shift=shift,
        mean=mean,
        std=std,
        frames=kind == VIDEO,
    )
    identity = {
        "autoencoder": kind,
        "autoencoder weights": loaded.sha256,
        "scaling factor": found.scale,
        "shift": found.shift,
    }
    if mean is not None and std is not None:
        identity |= {"latents mean": mean.flatten().tolist(), "latents std": std.flatten().tolist()}
    return found, identity


def beside_flow(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the protocol fields of an autoencoder for a rectified flow, whose own field "shift" is that of the times.

    Args:
        identity: protocol fields of the autoencoder, from `load_autoencoder`.
    """
    return {"autoencoder shift" if key == "shift" else key: value for key, value in identity.items()}


def _per_channel(config: Fields, key: str, channels: int) -> Tensor | None:
    """A list of one number per channel of the latents, as (c, 1, 1). None if it is absent."""
    values = config.numbers(key, 1e-12 if key == "latents_std" else -1e12, 1e12, MAX_CHANNELS)
    if values is None:
        return None
    if len(values) != channels:
        raise config.refusal(key, values, f"a list of {channels} numbers, one for each channel of the latents")
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)
