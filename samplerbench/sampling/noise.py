"""Counter-based random numbers: noise as a pure function of (seed, purpose, sample index, draw).

Sample i is therefore the same image for any batch size, number of processes and order of execution.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x32-10).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from samplerbench.errors import UserError

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


class Purpose(IntEnum):
    """Independent random streams. An additional draw from one stream does not change the others."""

    PRIOR = 0
    STEP = 1
    LABEL = 2
    ESTIMATE = 3
    LIKELIHOOD = 4
    PROBE = 5
    DEQUANTISATION = 6
    OBSERVATION = 7
    POSTERIOR = 8
    SCHEDULE = 9


def philox(counter: Sequence[Tensor | int], key: Sequence[int]) -> list[Tensor]:
    """Compute Philox4x32-10 (Salmon et al. 2011).

    Args:
        counter: four 32-bit words, each an int or an int64 tensor. They must be broadcastable.
        key: two 32-bit words.

    Returns:
        Four int64 tensors of the broadcast shape with values below 2³², on the device of the first and
        third word.
    """
    # Keep Python numbers: converting them to device tensors would synchronise with the device.
    c0, c1, c2, c3 = counter
    c0, c2 = (word if isinstance(word, Tensor) else torch.tensor(word) for word in (c0, c2))
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2⁶⁴, so all 64 bits of a 32x32-bit product are kept.
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((high >> 32) & _WORD) ^ c1 ^ k0, high & _WORD
        c2, c3 = ((low >> 32) & _WORD) ^ c3 ^ k1, low & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return list(torch.broadcast_tensors(c0, c1, c2, c3))


def split_seed(seed: int) -> tuple[int, int]:
    """Split a seed into two 32-bit key words, low word first.

    Args:
        seed: random seed, 0 ≤ seed < 2⁶⁴.

    Raises:
        UserError: if the seed is out of range.
    """
    if not 0 <= seed < 2**64:
        raise UserError(f"the seed {seed} is not between 0 and 2^64 - 1.")
    return seed & _WORD, seed >> 32


def _blocks(seed: int, purpose: Purpose, index: Tensor, draw: int, size: int) -> list[Tensor]:
    """Four uniform numbers of each block of the generator, (B, ⌈size/4⌉) float64 each.

    They are the centres of 2³² equal cells, so they are never 0, and their logarithm is finite.
    """
    blocks = torch.arange(-(-size // 4), device=index.device)
    words = philox((blocks[None, :], draw, index[:, None], int(purpose)), split_seed(seed))
    return [(w.double() + 0.5) * 2.0**-32 for w in words]


def normal(seed: int, purpose: Purpose, index: Tensor, draw: int, shape: Sequence[int]) -> Tensor:
    """Draw standard normal numbers with the Box-Muller transform.

    Args:
        seed: random seed, 0 ≤ seed < 2⁶⁴.
        purpose: random stream.
        index: sample indices, (B,) int64, 0 ≤ index < 2³².
        draw: index of the draw in the stream.
        shape: shape of one sample.

    Returns:
        Normal numbers, (B, *shape) float64 on the device of index.
    """
    size = math.prod(shape)
    u = _blocks(seed, purpose, index, draw, size)
    radii = [(-2 * a.log()).sqrt() for a in (u[0], u[2])]
    angles = [b * (2 * math.pi) for b in (u[1], u[3])]
    parts = [f for r, a in zip(radii, angles, strict=True) for f in (r * a.cos(), r * a.sin())]
    return torch.stack(parts, dim=-1).flatten(1)[:, :size].reshape(len(index), *shape)


def uniform(seed: int, purpose: Purpose, index: Tensor, draw: int = 0) -> Tensor:
    """Draw one uniform number in (0, 1) per sample.

    Args:
        seed: random seed, 0 ≤ seed < 2⁶⁴.
        purpose: random stream.
        index: sample indices, (B,) int64, 0 ≤ index < 2³².
        draw: index of the draw in the stream.

    Returns:
        Uniform numbers, (B,) float64 on the device of index.
    """
    word = philox((0, draw, index, int(purpose)), split_seed(seed))[0]
    return (word.double() + 0.5) * 2.0**-32


def uniforms(seed: int, purpose: Purpose, index: Tensor, draw: int, shape: Sequence[int]) -> Tensor:
    """Draw uniform numbers in (0, 1).

    Args:
        seed: random seed, 0 ≤ seed < 2⁶⁴.
        purpose: random stream.
        index: sample indices, (B,) int64, 0 ≤ index < 2³².
        draw: index of the draw in the stream.
        shape: shape of one sample.

    Returns:
        Uniform numbers, (B, *shape) float64 on the device of index.
    """
    size = math.prod(shape)
    numbers = torch.stack(_blocks(seed, purpose, index, draw, size), dim=-1)
    return numbers.flatten(1)[:, :size].reshape(len(index), *shape)


class Noise:
    """The noise source for the steps of one batch. Each call draws the next z ~ N(0, I) for every sample.

    Args:
        seed: random seed, 0 ≤ seed < 2⁶⁴.
        index: sample indices, (B,) int64, 0 ≤ index < 2³².
        shape: shape of one sample.
        dtype: dtype of z.
    """

    def __init__(self, seed: int, index: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._seed, self._index, self._shape, self._dtype = seed, index, tuple(shape), dtype
        self.draws = 0
        """Number of draws so far."""

    def __call__(self) -> Tensor:
        """Draw the next z, (B, *shape), on the device of index."""
        z = normal(self._seed, Purpose.STEP, self._index, self.draws, self._shape)
        self.draws += 1
        return z.to(self._dtype)
