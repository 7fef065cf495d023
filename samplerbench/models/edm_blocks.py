"""Layers of the U-Nets of EDM: resampling, residual blocks with self-attention, and noise embeddings.

Source: Karras et al. 2022, appendix F.2 and table 7; Song et al. 2021 (DDPM++, NCSN++); Dhariwal & Nichol 2021 (ADM).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Resampling = Literal["none", "up", "down"]


class Resample(nn.Module):
    """Upsample or downsample each channel by 2 with the separable filter f ⊗ f / (Σ f)².

    Downsampling is a convolution of stride 2. Upsampling is its transpose, times 4.

    Args:
        direction: "up" or "down".
        taps: the filter f: [1, 1] for DDPM++ and ADM, [1, 3, 3, 1] for NCSN++. Its length is even.
        padding: zero padding on each side. None for the one that halves or doubles the size.
    """

    def __init__(self, direction: Resampling, taps: Sequence[float], padding: int | None = None) -> None:
        super().__init__()
        line = torch.tensor(list(taps), dtype=torch.float64)
        kernel = torch.outer(line, line) / line.sum() ** 2
        self.up = direction == "up"
        self.padding = (len(taps) - 1) // 2 if padding is None else padding
        self.register_buffer("kernel", (4 * kernel if self.up else kernel).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Resample x, (B, C, H, W), to (B, C, 2H, 2W) or (B, C, H/2, W/2)."""
        channels = x.shape[1]
        kernel = torch.as_tensor(self.kernel).to(x.dtype).expand(channels, 1, -1, -1)
        convolve: Callable[..., Tensor] = F.conv_transpose2d if self.up else F.conv2d
        return convolve(x, kernel, stride=2, padding=self.padding, groups=channels)


def resampled_convolution(
    channels: int, out: int, size: int, direction: Resampling, taps: Sequence[float]
) -> nn.Sequential:
    """Create a convolution of the resampled input. It is the last module, under the name "conv".

    Args:
        channels: channels of the input.
        out: channels of the output.
        size: side of the convolution's kernel, odd. 0 for no convolution.
        direction: how to resample the input.
        taps: filter of `Resample`.
    """
    made = nn.Sequential()
    if direction != "none":
        made.add_module("resample", Resample(direction, taps))
    if size:
        made.add_module("conv", nn.Conv2d(channels, out, size, padding=size // 2))
    return made


def convolution_then_down(channels: int, out: int, taps: Sequence[float]) -> nn.Sequential:
    """Create the 3x3 convolution of NCSN++'s residual encoder, which is downsampled without padding in between.

    The convolution pads the input for both, so that the filter sees the convolution beyond the edges, not zeros.

    Args:
        channels: channels of the input.
        out: channels of the output.
        taps: filter of `Resample`.
    """
    made = nn.Sequential()
    made.add_module("conv", nn.Conv2d(channels, out, 3, padding=1 + (len(taps) - 1) // 2))
    made.add_module("resample", Resample("down", taps, padding=0))
    return made


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Create a group normalisation with at most 32 groups of at least 4 channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class SelfAttention(nn.Module):
    """Multi-head self-attention over the pixels, softmax(qᵀk/√d) v, before its residual connection.

    The rows of `qkv` are ordered by head, then channel, then query, key and value.

    Args:
        channels: number of channels.
        heads: number of heads.
        eps: ε of the normalisation.
    """

    def __init__(self, channels: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels, eps)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the attention of x, (B, C, H, W)."""
        batch, channels, height, width = x.shape
        rows = self.qkv(self.norm(x)).view(batch, self.heads, channels // self.heads, 3, height * width)
        query, key, value = rows.permute(3, 0, 1, 4, 2)  # (B, heads, H W, C/heads) each
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(2, 3).reshape(batch, channels, height, width))


class ResidualBlock(nn.Module):
    """A residual block with optional resampling and self-attention: (shortcut(x) + h(x, e)) · s, then (· + attn) · s.

    Args:
        channels: channels of the input.
        out: channels of the output.
        embedding: width of the noise embedding e.
        direction: how to resample.
        heads: number of attention heads. 0 for no attention.
        adaptive: whether e scales and shifts the normalised features (ADM). If not, it is added before the norm.
        scale: factor s of the residual sums: √½ for DDPM++ and NCSN++, 1 for ADM.
        eps: ε of the normalisations.
        taps: filter of `Resample`.
        project: whether a resampling shortcut has a 1x1 convolution. It always has one if the channels differ.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        embedding: int,
        *,
        direction: Resampling = "none",
        heads: int = 0,
        adaptive: bool,
        scale: float,
        eps: float,
        taps: Sequence[float],
        project: bool,
    ) -> None:
        super().__init__()
        self.adaptive, self.scale = adaptive, scale
        self.norm_in = group_norm(channels, eps)
        self.conv_in = resampled_convolution(channels, out, 3, direction, taps)
        self.modulation = nn.Linear(embedding, 2 * out if adaptive else out)
        self.norm_out = group_norm(out, eps)
        self.conv_out = nn.Conv2d(out, out, 3, padding=1)
        pointwise = channels != out or (project and direction != "none")
        self.shortcut = resampled_convolution(channels, out, 1 if pointwise else 0, direction, taps)
        self.attention = SelfAttention(out, heads, eps) if heads else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Compute the block.

        Args:
            x: features, (B, channels, H, W).
            embedding: noise embeddings, (B, embedding).
        """
        hidden = self.conv_in(F.silu(self.norm_in(x)))
        modulation = self.modulation(embedding)[:, :, None, None]
        if self.adaptive:
            gain, shift = modulation.chunk(2, dim=1)
            hidden = shift + (1 + gain) * self.norm_out(hidden)
        else:
            hidden = self.norm_out(hidden + modulation)
        x = (self.shortcut(x) + self.conv_out(F.silu(hidden))) * self.scale
        return x if self.attention is None else (x + self.attention(x)) * self.scale


class Frequencies(nn.Module):
    """Random Fourier frequencies, float32 in a network of any dtype: 16 bits would move the phases.

    Args:
        count: number of frequencies.
    """

    freqs: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(count, dtype=torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def forward(self, time: Tensor) -> Tensor:
        """The phases 2π f t, (B, count), of times t, (B,)."""
        return torch.outer(time, 2 * math.pi * self.freqs.to(time.dtype))


class NoiseEmbedding(nn.Module):
    """The embedding of the time input c_noise and of the class label.

    DDPM++ and NCSN++: e = silu(A₁ silu(A₀ (p(t) + L √K onehot(y)))), p = [sin, cos].
    ADM: e = silu(A₁ silu(A₀ p(t)) + L onehot(y)), p = [cos, sin].

    EDM's networks also have augmentation labels. They are zero in sampling and their layer has no bias, so it adds
    nothing and is left out.

    Args:
        width: width of p.
        out: width of e.
        classes: number of class labels K. 0 for none.
        kind: "positional" or "fourier".
        adm: whether the form is that of ADM.
    """

    def __init__(self, width: int, out: int, classes: int, kind: str, adm: bool) -> None:
        super().__init__()
        self.width, self.classes, self.adm = width, classes, adm
        # The first tensor has the dtype of the network: by it, diffusers decides whether a loaded network is converted.
        self.first = nn.Linear(width, out)
        self.second = nn.Linear(out, out)
        self.label = nn.Linear(classes, out if adm else width, bias=not adm) if classes else None
        self.fourier = Frequencies(width // 2) if kind == "fourier" else None

    def forward(self, time: Tensor, labels: Tensor | None) -> Tensor:
        """Compute e.

        Args:
            time: c_noise, (B,), float32 or float64.
            labels: class labels, (B,) int64. The label K, or None, stands for no label: the one-hot vector is zero.

        Returns:
            The embeddings, (B, out), in the dtype of the weights.
        """
        dtype = self.first.weight.dtype
        phases = self._ladder(time) if self.fourier is None else self.fourier(time)
        pair = (phases.cos(), phases.sin())
        embedding = torch.cat(pair if self.adm else pair[::-1], dim=1).to(dtype)
        label = None if self.label is None else self.label(self._one_hot(labels, len(time), dtype))
        if label is not None and not self.adm:
            embedding = embedding + label
        embedding = self.second(F.silu(self.first(embedding)))
        if label is not None and self.adm:
            embedding = embedding + label
        return F.silu(embedding)

    def _ladder(self, time: Tensor) -> Tensor:
        """The phases t 10000^(-i/n), where n is one less for DDPM++, so that the last frequency is 1/10000."""
        half = self.width // 2
        steps = torch.arange(half, dtype=time.dtype, device=time.device) / (half if self.adm else half - 1)
        return torch.outer(time, 10_000.0**-steps)

    def _one_hot(self, labels: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor:
        if labels is None:
            return self.first.weight.new_zeros(batch, self.classes)
        rows = F.one_hot(labels, self.classes + 1)[:, : self.classes].to(dtype)
        return rows if self.adm else rows * math.sqrt(self.classes)
