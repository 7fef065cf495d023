"""Linear operators with a closed-form pseudo-inverse: tight frames, separable and circular operators."""

from __future__ import annotations

import math
from abc import ABC

import torch
from torch import Tensor

from samplerbench.sampling import SVD, LinearOperator, coefficient

Shape = tuple[int, int, int]

CUTOFF = 1e-3
"""Singular values of a separable or circular operator below this part of the largest one are set to 0."""


def divide(r: Tensor, divisor: Tensor) -> Tensor:
    """Return r / divisor, and 0 where the divisor is 0."""
    return torch.where(divisor > 0, r / divisor.where(divisor > 0, divisor.new_ones(())), r.new_zeros(()))


def at(constant: Tensor, like: Tensor) -> Tensor:
    """Return a constant tensor in the dtype and on the device of another tensor."""
    return constant.to(device=like.device, dtype=like.dtype)


def at_complex(constant: Tensor, like: Tensor) -> Tensor:
    """Return a constant complex tensor in the precision and on the device of a real tensor."""
    return constant.to(device=like.device, dtype=torch.promote_types(like.dtype, torch.complex64))


class TightFrame(LinearOperator, ABC):
    """An operator with A Aᵀ = c I. Its pseudo-inverse is Aᵀ/c, and its singular value decomposition √c (A/√c).

    Attributes:
        square: the number c.
    """

    square: float = 1.0

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return self.adjoint(y) / self.square

    def solve(self, r: Tensor, scale: float | Tensor, shift: float | Tensor) -> Tensor:
        divisor = coefficient(scale, r) * self.square + coefficient(shift, r)
        return divide(r, torch.as_tensor(divisor, dtype=r.dtype, device=r.device))

    def svd(self) -> SVD:
        root = math.sqrt(self.square)
        return SVD(
            torch.tensor(root, dtype=torch.float64),
            u_adjoint=lambda y: y,
            v_adjoint=lambda x: self.forward(x) / root,
            v=lambda c: self.adjoint(c) / root,
        )


class Identity(TightFrame):
    """A = I.

    Args:
        shape: shape (C, H, W) of the images.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape, self.observed = shape, shape

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()

    def adjoint(self, y: Tensor) -> Tensor:
        return y.clone()


class Selection(TightFrame):
    """A keeps some pixels, in all channels: A Aᵀ = I.

    Args:
        shape: shape (C, H, W) of the images.
        kept: whether each pixel is observed, (H, W) bool.
    """

    def __init__(self, shape: Shape, kept: Tensor) -> None:
        self.shape, self.pixels = shape, kept.flatten().nonzero()[:, 0]
        self.observed = (shape[0], len(self.pixels))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2)[:, :, self.pixels.to(x.device)]

    def adjoint(self, y: Tensor) -> Tensor:
        x = y.new_zeros(len(y), self.shape[0], self.shape[1] * self.shape[2])
        x[:, :, self.pixels.to(y.device)] = y
        return x.reshape(len(y), *self.shape)


class ChannelMean(TightFrame):
    """A is the mean over the channels: A Aᵀ = I/C.

    Args:
        shape: shape (C, H, W) of the images.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape, self.observed, self.square = shape, (1, *shape[1:]), 1 / shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        return y.repeat(1, self.shape[0], 1, 1) / self.shape[0]


class BlockMean(TightFrame):
    """A is the mean over blocks of f x f pixels: A Aᵀ = I/f².

    Args:
        shape: shape (C, H, W) of the images. f divides H and W.
        factor: f.
    """

    def __init__(self, shape: Shape, factor: int) -> None:
        self.shape, self.factor, self.square = shape, factor, factor**-2.0
        self.observed = (shape[0], shape[1] // factor, shape[2] // factor)

    def forward(self, x: Tensor) -> Tensor:
        c, h, w = self.observed
        return x.reshape(len(x), c, h, self.factor, w, self.factor).mean(dim=(3, 5))

    def adjoint(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3) * self.square


class Projection(TightFrame):
    """A has m orthonormal rows in random directions: A Aᵀ = I.

    Args:
        shape: shape (C, H, W) of the images.
        rows: m.
        seed: seed of the directions.
    """

    def __init__(self, shape: Shape, rows: int, seed: int) -> None:
        self.shape, self.observed = shape, (rows,)
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(math.prod(shape), rows, generator=generator, dtype=torch.float64)
        self.matrix = torch.linalg.qr(random)[0].T

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ at(self.matrix, x).T

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ at(self.matrix, y)).reshape(len(y), *self.shape)


class Separable(LinearOperator):
    """A x = H x Wᵀ in each channel, by the singular value decompositions of H and W.

    Args:
        shape: shape (C, H, W) of the images.
        rows: the matrix H, (h, H) float64.
        columns: the matrix W, (w, W) float64.
    """

    def __init__(self, shape: Shape, rows: Tensor, columns: Tensor) -> None:
        self.shape, self.observed = shape, (shape[0], len(rows), len(columns))
        (self.u, s, self.v), (self.p, t, self.q) = (torch.linalg.svd(m, full_matrices=False) for m in (rows, columns))
        values = s[:, None] * t
        self.values = torch.where(values < CUTOFF * values.max(), 0.0, values)

    def forward(self, x: Tensor) -> Tensor:
        return self._leave(self._enter(x, self.v, self.q) * at(self.values, x), self.u.T, self.p.T)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._leave(self._enter(y, self.u.T, self.p.T) * at(self.values, y), self.v, self.q)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return self._leave(divide(self._enter(y, self.u.T, self.p.T), at(self.values, y)), self.v, self.q)

    def solve(self, r: Tensor, scale: float | Tensor, shift: float | Tensor) -> Tensor:
        divisor = coefficient(scale, r) * at(self.values, r) ** 2 + coefficient(shift, r)
        return self._leave(divide(self._enter(r, self.u.T, self.p.T), divisor), self.u.T, self.p.T)

    def svd(self) -> SVD:
        return SVD(
            self.values,
            u_adjoint=lambda y: self._enter(y, self.u.T, self.p.T),
            v_adjoint=lambda x: self._enter(x, self.v, self.q),
            v=lambda c: self._leave(c, self.v, self.q),
        )

    @staticmethod
    def _enter(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return at(left, x) @ x @ at(right, x).T

    @staticmethod
    def _leave(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return at(left, x).T @ x @ at(right, x)


class Circular(LinearOperator):
    """A is the circular convolution with a kernel in each channel, which the Fourier transform makes diagonal.

    Args:
        shape: shape (C, H, W) of the images.
        kernel: the kernel, (k, l) float64 with odd sides, at most (H, W). Its centre is the observed pixel.
    """

    def __init__(self, shape: Shape, kernel: Tensor) -> None:
        self.shape, self.observed = shape, shape
        padded = torch.zeros(shape[1:], dtype=torch.float64)
        padded[: kernel.shape[0], : kernel.shape[1]] = kernel
        response = torch.fft.rfft2(padded.roll((-(kernel.shape[0] // 2), -(kernel.shape[1] // 2)), dims=(0, 1)))
        self.response = torch.where(response.abs() < CUTOFF * response.abs().max(), 0.0, response)

    def forward(self, x: Tensor) -> Tensor:
        return self._filter(x, self._response(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self._filter(y, self._response(y).conj())

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        square = at(self.response.abs().square(), y)
        return self._filter(y, self._response(y).conj() * divide(torch.ones_like(square), square))

    def solve(self, r: Tensor, scale: float | Tensor, shift: float | Tensor) -> Tensor:
        divisor = coefficient(scale, r) * at(self.response.abs().square(), r) + coefficient(shift, r)
        return self._filter(r, divide(torch.ones_like(divisor), divisor))

    def svd(self) -> SVD:
        size = self.response.abs()
        phase = torch.where(size > 0, self.response / size.where(size > 0, torch.ones_like(size)), 1.0)

        def transform(x: Tensor) -> Tensor:
            return torch.fft.rfft2(x, norm="ortho")

        return SVD(
            size,
            u_adjoint=lambda y: transform(y) * at_complex(phase, y).conj(),
            v_adjoint=transform,
            v=lambda c: torch.fft.irfft2(c, s=self.shape[1:], norm="ortho"),
        )

    def _response(self, x: Tensor) -> Tensor:
        return at_complex(self.response, x)

    def _filter(self, x: Tensor, response: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * response, s=self.shape[1:])
