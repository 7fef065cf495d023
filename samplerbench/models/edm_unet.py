"""The U-Nets of EDM: DDPM++, NCSN++ and ADM as one network with choices (Karras et al. 2022, appendix F.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from samplerbench.errors import UserError
from samplerbench.limits import MAX_CLASSES
from samplerbench.models.edm_blocks import (
    NoiseEmbedding,
    Resample,
    Resampling,
    ResidualBlock,
    convolution_then_down,
    group_norm,
    resampled_convolution,
)
from samplerbench.models.fields import Fields

SONG, ADM = "SongUNet", "DhariwalUNet"
MODEL_TYPES = (SONG, ADM)
"""EDM's names of the architectures: DDPM++ and NCSN++, and ADM."""
CHANNELS_PER_HEAD = 64
MAX_WIDTH = 4096
"""Maximum number of channels at the first level."""
MAX_LEVELS = 10
MAX_BLOCKS = 64
"""Maximum number of blocks of a level."""


@dataclass(frozen=True)
class UNetSettings:
    """The settings of a U-Net, with EDM's names.

    Attributes:
        model_type: "SongUNet" (DDPM++, NCSN++) or "DhariwalUNet" (ADM).
        img_resolution: height and width of the images, in pixels.
        in_channels: channels of the input.
        out_channels: channels of the output.
        label_dim: number of class labels. 0 for none.
        label_dropout: probability with which labels were dropped in training. If it is positive, the network has an
            unconditional prediction.
        model_channels: base number of channels.
        channel_mult: factor of the channels at each level.
        channel_mult_emb: width of the embedding, in units of `model_channels`.
        num_blocks: blocks of each level of the encoder. The decoder has one more.
        attn_resolutions: resolutions with self-attention, in pixels.
        embedding_type: "positional" (DDPM++, ADM) or "fourier" (NCSN++).
        channel_mult_noise: width of the time embedding, in units of `model_channels`.
        encoder_type: "standard" (DDPM++, ADM), "residual" (NCSN++) or "skip".
        decoder_type: "standard" or "skip".
        resample_filter: filter of the resampling: (1, 1), or (1, 3, 3, 1) for NCSN++.
    """

    model_type: str
    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int
    label_dropout: float
    model_channels: int
    channel_mult: tuple[int, ...]
    channel_mult_emb: int
    num_blocks: int
    attn_resolutions: tuple[int, ...]
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: tuple[float, ...] = (1.0, 1.0)

    @property
    def adm(self) -> bool:
        """Whether the network is ADM."""
        return self.model_type == ADM

    def to_json(self) -> dict[str, Any]:
        """The settings as a JSON object. `read_settings` is the inverse."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def read_settings(values: Mapping[str, Any], where: str) -> UNetSettings:
    """Read the settings of a U-Net. Missing ones have EDM's defaults.

    Args:
        values: the settings, with EDM's names. Others are ignored.
        where: prefix of error messages.

    Raises:
        UserError: if a setting is missing, or has a wrong type or range.
    """
    fields = Fields(values, where)
    adm = _choice(fields, "model_type", MODEL_TYPES, SONG) == ADM
    mult = _integers(fields, "channel_mult", MAX_LEVELS, 64) or ((1, 2, 3, 4) if adm else (1, 2, 2, 2))
    size = fields.integer("img_resolution", 1, 2**14)
    if size % 2 ** (len(mult) - 1):
        raise fields.refusal("img_resolution", size, f"a multiple of {2 ** (len(mult) - 1)}, for {len(mult)} levels")
    attention: tuple[int, ...] = (32, 16, 8) if adm else (16,)
    if values.get("attn_resolutions") is not None:
        attention = _integers(fields, "attn_resolutions", MAX_LEVELS, 2**14) if values["attn_resolutions"] else ()
    width = fields.integer("model_channels", 4, MAX_WIDTH, 192 if adm else 128)
    if width % 4:
        raise fields.refusal("model_channels", width, "a multiple of 4")
    made = UNetSettings(
        model_type=ADM if adm else SONG,
        img_resolution=size,
        in_channels=fields.integer("in_channels", 1, 256),
        out_channels=fields.integer("out_channels", 1, 256),
        label_dim=fields.integer("label_dim", 0, MAX_CLASSES, 0),
        label_dropout=fields.number("label_dropout", 0, 1, 0),
        model_channels=width,
        channel_mult=mult,
        channel_mult_emb=fields.integer("channel_mult_emb", 1, 64, 4),
        num_blocks=fields.integer("num_blocks", 1, MAX_BLOCKS, 3 if adm else 4),
        attn_resolutions=attention,
    )
    if adm:
        return made
    taps = fields.numbers("resample_filter", -1e3, 1e3, 16) or [1.0, 1.0]
    if len(taps) % 2 or not sum(taps):
        raise fields.refusal("resample_filter", taps, "an even number of weights with a sum other than 0")
    return replace(
        made,
        embedding_type=_choice(fields, "embedding_type", ("positional", "fourier"), "positional"),
        channel_mult_noise=fields.integer("channel_mult_noise", 1, 64, 1),
        encoder_type=_choice(fields, "encoder_type", ("standard", "residual", "skip"), "standard"),
        decoder_type=_choice(fields, "decoder_type", ("standard", "skip"), "standard"),
        resample_filter=tuple(taps),
    )


def _choice(fields: Fields, key: str, words: tuple[str, ...], default: str) -> str:
    value = fields.text(key, default)
    if value not in words:
        raise fields.refusal(key, value, " or ".join(f'"{word}"' for word in words))
    return value


def _integers(fields: Fields, key: str, longest: int, high: int) -> tuple[int, ...]:
    values = fields.numbers(key, 1, high, longest) or []
    if any(value != int(value) for value in values):
        raise fields.refusal(key, fields.values[key], f"a list of whole numbers from 1 to {high:,}")
    return tuple(int(value) for value in values)


class EncoderLevel(nn.Module):
    """A resolution of the encoder: the layer that enters it, an optional path beside it, and its blocks.

    Args:
        enter: the first convolution, or the block that downsamples.
        blocks: the residual blocks.
        side: what is added to the entered features: NCSN++'s residual convolution, or the projection of the image.
    """

    def __init__(self, enter: nn.Module, blocks: list[nn.Module], side: nn.Module | None) -> None:
        super().__init__()
        self.enter, self.blocks, self.side = enter, nn.ModuleList(blocks), side


class DecoderLevel(nn.Module):
    """A resolution of the decoder: the block that upsamples to it, its blocks, and its contribution to the output.

    Args:
        up: the block that upsamples. None at the lowest resolution.
        blocks: the residual blocks, each of which also takes features of the encoder.
        head: normalisation and convolution to the output. None if only the last level has an output.
    """

    def __init__(self, up: nn.Module | None, blocks: list[nn.Module], head: nn.Module | None) -> None:
        super().__init__()
        self.up, self.blocks, self.head = up, nn.ModuleList(blocks), head


class Head(nn.Module):
    """The output of a level: a convolution of silu(norm(x)).

    Args:
        channels: channels of the features.
        out: channels of the output.
        eps: ε of the normalisation.
    """

    def __init__(self, channels: int, out: int, eps: float) -> None:
        super().__init__()
        self.norm = group_norm(channels, eps)
        self.conv = nn.Conv2d(channels, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output, (B, out, H, W)."""
        return self.conv(F.silu(self.norm(x)))


class EDMUNet(nn.Module):
    """The network F of EDM: DDPM++, NCSN++ or ADM, without dropout and augmentation labels.

    Source: Karras et al. 2022, appendix F.2 and table 7.

    Args:
        settings: the settings.
    """

    def __init__(self, settings: UNetSettings) -> None:
        super().__init__()
        self.settings = settings
        # The attributes that adapters read of the configuration of a `UNet2DModel`.
        size = settings.img_resolution
        self.config = SimpleNamespace(
            in_channels=settings.in_channels, out_channels=settings.out_channels, sample_size=size
        )
        width = settings.model_channels
        self.embedding_width = width * settings.channel_mult_emb
        self.embed = NoiseEmbedding(
            width * settings.channel_mult_noise,
            self.embedding_width,
            settings.label_dim,
            settings.embedding_type,
            settings.adm,
        )
        channels, skips = self._build_encoder()
        self.middle = nn.ModuleList(
            [self._block(channels, channels, attention=True), self._block(channels, channels, attention=False)]
        )
        self._build_decoder(channels, skips)
        whole = settings.decoder_type == "skip"
        self.enlarge = Resample("up", settings.resample_filter) if whole else None
        self.reduce = Resample("down", settings.resample_filter) if settings.encoder_type == "skip" else None

    def _block(self, channels: int, out: int, attention: bool, direction: Resampling = "none") -> ResidualBlock:
        adm = self.settings.adm
        return ResidualBlock(
            channels,
            out,
            self.embedding_width,
            direction=direction,
            heads=(out // CHANNELS_PER_HEAD if adm else 1) if attention else 0,
            adaptive=adm,
            scale=1.0 if adm else math.sqrt(0.5),
            eps=1e-5 if adm else 1e-6,
            taps=self.settings.resample_filter,
            project=not adm,
        )

    def _build_encoder(self) -> tuple[int, list[int]]:
        """Create the encoder. Return its last number of channels, and those of every feature that the decoder takes."""
        s = self.settings
        channels = s.model_channels * (s.channel_mult[0] if s.adm else 1)
        side_channels, skips, levels = s.in_channels, [], []
        for level, mult in enumerate(s.channel_mult):
            side: nn.Module | None = None
            if level == 0:
                enter: nn.Module = nn.Conv2d(s.in_channels, channels, 3, padding=1)
            else:
                enter = self._block(channels, channels, attention=False, direction="down")
                if s.encoder_type == "residual":
                    side = convolution_then_down(side_channels, channels, s.resample_filter)
                    side_channels = channels
                elif s.encoder_type == "skip":
                    side = resampled_convolution(s.in_channels, channels, 1, "none", s.resample_filter)
            skips.append(channels)
            blocks: list[nn.Module] = []
            for _ in range(s.num_blocks):
                out = s.model_channels * mult
                blocks.append(self._block(channels, out, s.img_resolution >> level in s.attn_resolutions))
                channels = out
                skips.append(channels)
            levels.append(EncoderLevel(enter, blocks, side))
        self.encoder = nn.ModuleList(levels)
        return channels, skips

    def _build_decoder(self, channels: int, skips: list[int]) -> None:
        """Create the decoder, from the lowest resolution to the highest."""
        s, skips = self.settings, list(skips)
        levels = []
        for level in reversed(range(len(s.channel_mult))):
            lowest = level == len(s.channel_mult) - 1
            up = None if lowest else self._block(channels, channels, attention=False, direction="up")
            attended = s.img_resolution >> level in s.attn_resolutions
            blocks: list[nn.Module] = []
            for index in range(s.num_blocks + 1):
                out = s.model_channels * s.channel_mult[level]
                # DDPM++ and NCSN++ have attention in the last block of a level only.
                blocks.append(self._block(channels + skips.pop(), out, attended and (s.adm or index == s.num_blocks)))
                channels = out
            has_head = level == 0 or s.decoder_type == "skip"
            head = Head(channels, s.out_channels, 1e-5 if s.adm else 1e-6) if has_head else None
            levels.append(DecoderLevel(up, blocks, head))
        self.decoder = nn.ModuleList(levels)

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        """Compute F(x, time).

        Args:
            x: scaled input c_in x, (B, C, H, W), in the dtype of the weights.
            time: time input c_noise, (B,), float32 or float64.
            class_labels: class labels, (B,) int64. The label `label_dim`, or None, stands for no label.

        Returns:
            The output, (B, out_channels, H, W), as `sample`.
        """
        embedding = self.embed(time, class_labels)
        skips: list[Tensor] = []
        x = self._encode(x, embedding, skips)
        for block in self.middle:
            x = block(x, embedding)
        total: Tensor | None = None
        for stage in self.decoder:
            level: Any = stage
            if level.up is not None:
                x = level.up(x, embedding)
            for block in level.blocks:
                x = block(torch.cat([x, skips.pop()], dim=1), embedding)
            if level.head is not None:
                if total is not None and self.enlarge is not None:
                    total = self.enlarge(total)
                total = level.head(x) if total is None else total + level.head(x)
        assert total is not None
        return UNet2DOutput(sample=total)

    def _encode(self, x: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        """Compute the encoder. The features that the decoder takes are appended to `skips`."""
        side = x
        for stage in self.encoder:
            level: Any = stage
            x = level.enter(x) if not skips else level.enter(x, embedding)
            if self.reduce is not None and level.side is not None:
                side = self.reduce(side)
                x = x + level.side(side)
            elif level.side is not None:
                x = side = (x + level.side(side)) * math.sqrt(0.5)
            skips.append(x)
            for block in level.blocks:
                x = block(x, embedding)
                skips.append(x)
        return x


def build_unet(values: Mapping[str, Any]) -> EDMUNet:
    """Create a U-Net.

    Args:
        values: the settings, with EDM's names.

    Raises:
        ValueError: if a setting is missing, or has a wrong type or range.
    """
    try:
        return EDMUNet(read_settings(values, "unet"))
    except UserError as error:
        raise ValueError(str(error)) from None
