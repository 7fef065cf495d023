"""The built-in inverse problems."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from samplerbench.sampling import LinearOperator, Operator, Task, UserError, argument, option
from samplerbench_plugins.linear_operators import (
    BlockMean,
    ChannelMean,
    Circular,
    Identity,
    Projection,
    Selection,
    Separable,
)
from samplerbench_plugins.motion import trajectory_kernel

Shape = tuple[int, int, int]

MAX_DIMENSION = 16_384
"""The largest number of values in an image for a dense random projection."""


def _refuse(task: Task, reason: str) -> UserError:
    return UserError(f"{argument('task', task.spec)}: {reason}")


def _size(shape: Shape) -> str:
    return f"{shape[1]}x{shape[2]}"


@dataclass(frozen=True)
class Inpaint(Task):
    """Inpainting: some pixels are missing, in all channels (Lugmayr et al. 2022; Kawar et al. 2022, DDRM).

    box: a square in the centre is missing. half: the right half is missing. random: `rate` of all pixels are missing,
    the same ones in every image. The published settings of DPS (Chung et al. 2023) for 256 x 256 images are
    `mask=box,size=128` and `mask=random,rate=0.92`, each with σ_y = 0.05.
    """

    mask: Literal["box", "half", "random"] = option("box", "which pixels are missing")
    size: int = option(0, "side of the box in pixels; 0 is half of the shorter side of the image", ge=0, le=65_536)
    rate: float = option(0.92, "part of the pixels that is missing (random)", ge=0.0, lt=1.0)
    seed: int = option(0, "seed of the mask (random)", ge=0, le=2**63 - 1)

    def operator(self, shape: Shape) -> LinearOperator:
        _, h, w = shape
        kept = torch.ones(h, w, dtype=torch.bool)
        if self.mask == "half":
            kept[:, w // 2 :] = False
        elif self.mask == "random":
            missing = round(self.rate * h * w)
            order = torch.randperm(h * w, generator=torch.Generator().manual_seed(self.seed))
            kept.view(-1)[order[:missing]] = False
        else:
            side = self.size or min(h, w) // 2
            if side > min(h, w):
                raise _refuse(self, f"a box of {side}x{side} pixels does not fit into images of {_size(shape)}.")
            top, left = (h - side) // 2, (w - side) // 2
            kept[top : top + side, left : left + side] = False
        if not kept.any():
            raise _refuse(self, f"no pixel of images of {_size(shape)} is observed; use a smaller mask.")
        return Selection(shape, kept)


@dataclass(frozen=True)
class SuperResolution(Task):
    """Super-resolution: the image is reduced by a factor (Kawar et al. 2022, DDRM).

    average: means of blocks. bicubic: the antialiased bicubic filter of Pillow (Keys 1981, a = -0.5). The published
    setting of DPS (Chung et al. 2023) is factor 4, bicubic, σ_y = 0.05.
    """

    factor: int = option(4, "factor by which both sides are reduced; 1 is the identity", ge=1, le=1024)
    filter: Literal["average", "bicubic"] = option("bicubic", "how pixels are combined")

    def operator(self, shape: Shape) -> LinearOperator:
        if shape[1] % self.factor or shape[2] % self.factor:
            raise _refuse(self, f"the factor {self.factor} does not divide the sides of images of {_size(shape)}.")
        if self.filter == "average":
            return BlockMean(shape, self.factor)
        return Separable(shape, *(_bicubic(side, self.factor) for side in shape[1:]))


def _bicubic(side: int, factor: int) -> Tensor:
    """The matrix (side/factor, side) float64 of the antialiased bicubic reduction in one dimension."""
    identity = torch.eye(side, dtype=torch.float64)[None, None]
    size = (side // factor, side)
    return torch.nn.functional.interpolate(identity, size=size, mode="bicubic", antialias=True)[0, 0]


@dataclass(frozen=True)
class Blur(Task):
    """Deblurring: a circular convolution with a kernel whose values sum to 1 (Kawar et al. 2022, DDRM).

    gaussian: a Gaussian of standard deviation `width`. motion: a line of length `width` at an angle, drawn with
    bilinear weights. trajectory: a random path of motion (Borodenko 2020), which is a line for `intensity=0`. The
    convolution is circular, so that the Fourier transform gives its exact pseudo-inverse. Frequencies with less than
    0.001 of the largest response are set to 0. The published settings of DPS (Chung et al. 2023) for 256 x 256 images
    are `width=3,size=61` and `kernel=trajectory,size=61,intensity=0.5`, with σ_y = 0.05. DPS draws another path for
    each image; here all images have the path of `seed`.
    """

    kernel: Literal["gaussian", "motion", "trajectory"] = option("gaussian", "shape of the kernel")
    width: float = option(1.0, "standard deviation (gaussian) or length (motion), in pixels", gt=0.0, le=1000.0)
    size: int = option(0, "side of the kernel in pixels, odd; 0: as large as the kernel or the image", ge=0, le=65_535)
    angle: float = option(45.0, "direction of the motion in degrees; 0 is horizontal", ge=-360.0, le=360.0)
    intensity: float = option(0.5, "curvature and length of the path (trajectory)", ge=0.0, le=1.0)
    seed: int = option(0, "seed of the path (trajectory)", ge=0, le=2**63 - 1)

    def operator(self, shape: Shape) -> LinearOperator:
        side = min(shape[1:])
        largest = side - 1 + side % 2
        if self.size > side:
            raise _refuse(
                self, f"a kernel of {self.size}x{self.size} pixels does not fit into images of {_size(shape)}."
            )
        if self.size and self.size % 2 == 0:
            raise _refuse(self, f"size={self.size} is even; use an odd number of pixels.")
        reach = {"gaussian": 3 * self.width, "motion": self.width / 2, "trajectory": side / 8}[self.kernel]
        size = self.size or min(2 * math.ceil(reach) + 1, largest)
        offsets = torch.arange(size, dtype=torch.float64) - size // 2
        if self.kernel == "gaussian":
            profile = (-0.5 * (offsets / self.width) ** 2).exp()
            kernel = profile[:, None] * profile
        elif self.kernel == "motion":
            kernel = self._line(size)
        else:
            kernel = trajectory_kernel(size, self.intensity, self.seed)
        return Circular(shape, kernel / kernel.sum())

    def _line(self, size: int) -> Tensor:
        """A line through the centre of a square of `size` pixels, (size, size)."""
        points = torch.linspace(-0.5, 0.5, 64 * size + 1, dtype=torch.float64) * min(self.width, size - 1)
        angle = math.radians(self.angle)
        y, x = size // 2 - points * math.sin(angle), size // 2 + points * math.cos(angle)
        pixels = torch.arange(size, dtype=torch.float64)
        near_y, near_x = ((1 - (pixels - at[:, None]).abs()).clamp(min=0) for at in (y, x))
        return near_y.T @ near_x


@dataclass(frozen=True)
class Colourise(Task):
    """Colourisation: the mean over the channels is observed (Kawar et al. 2022, DDRM)."""

    def operator(self, shape: Shape) -> LinearOperator:
        if shape[0] == 1:
            raise _refuse(self, "the images of this model are grey; use a model of colour images.")
        return ChannelMean(shape)


@dataclass(frozen=True)
class Denoise(Task):
    """Denoising: the image itself is observed under noise, y = x₀ + σ_y n (Kawar et al. 2022, DDRM)."""

    def operator(self, shape: Shape) -> LinearOperator:
        return Identity(shape)


@dataclass(frozen=True)
class CompressedSensing(Task):
    """Compressed sensing: projections on random orthonormal directions (Candès & Tao 2006; Kawar et al. 2022)."""

    rate: float = option(0.25, "number of measurements as a part of the number of values", gt=0.0, le=1.0)
    seed: int = option(0, "seed of the directions", ge=0, le=2**63 - 1)

    def operator(self, shape: Shape) -> LinearOperator:
        d = math.prod(shape)
        if d > MAX_DIMENSION:
            raise _refuse(self, f"the images have {d:,} values; at most {MAX_DIMENSION:,} are possible.")
        return Projection(shape, max(1, round(self.rate * d)), self.seed)


class _Clipping(Operator):
    """A x = clamp(gain x, -1, 1)."""

    def __init__(self, shape: Shape, gain: float) -> None:
        self.shape, self.observed, self.gain = shape, shape, gain

    def forward(self, x: Tensor) -> Tensor:
        return (self.gain * x).clamp(-1, 1)


@dataclass(frozen=True)
class Clip(Task):
    """Recovery of clipped values, which is not linear:  A(x) = clamp(gain x, -1, 1) (Song et al. 2023).

    The task of high dynamic range: an overexposed image. Only methods that differentiate through A support it.
    """

    linear: ClassVar[bool] = False

    gain: float = option(2.0, "factor before the clipping", gt=0.0, le=1000.0)

    def operator(self, shape: Shape) -> Operator:
        return _Clipping(shape, self.gain)
