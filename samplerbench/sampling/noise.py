"""Noise as a pure function of (seed, purpose, sample index, draw): a counter-based generator.

So sample i is the same image for any batch size, any number of processes and any order of work.
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
    """Separate streams, so that one more draw in one of them changes nothing in the others."""

    PRIOR = 0
    STEP = 1
    LABEL = 2
    ESTIMATE = 3


def philox(counter: Sequence[Tensor | int], key: Sequence[int]) -> list[Tensor]:
    """Philox4x32-10 of a counter of four 32-bit words under a key of two.

    Args:
        counter: four tensors (int64, values below 2³²) or numbers that broadcast together.
        key: two numbers below 2³².

    Returns:
        Four int64 tensors of the broadcast shape, each value below 2³², on the device of the first and third word.
    """
    # Numbers stay numbers: made into tensors they would be copied to the device, which waits for it.
    c0, c1, c2, c3 = counter
    c0, c2 = (word if isinstance(word, Tensor) else torch.tensor(word) for word in (c0, c2))
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2⁶⁴, which keeps all 64 bits of a 32x32-bit product.
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((high >> 32) & _WORD) ^ c1 ^ k0, high & _WORD
        c2, c3 = ((low >> 32) & _WORD) ^ c3 ^ k1, low & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return list(torch.broadcast_tensors(c0, c1, c2, c3))


def split_seed(seed: int) -> tuple[int, int]:
    """The two key words of a seed, 0 ≤ seed < 2⁶⁴. Raises UserError outside."""
    if not 0 <= seed < 2**64:
        raise UserError(f"the seed {seed} is not between 0 and 2^64 - 1.")
    return seed & _WORD, seed >> 32


def normal(seed: int, purpose: Purpose, index: Tensor, draw: int, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers by Box-Muller, (B, *shape) float64 on index's device.

    Args:
        index: (B,) int64, which samples: 0 ≤ index < 2³². draw: which draw of the stream. shape: of one sample.
    """
    size = math.prod(shape)
    blocks = torch.arange(-(-size // 4), device=index.device)
    words = philox((blocks[None, :], draw, index[:, None], int(purpose)), split_seed(seed))
    # Centres of 2³² equal cells: never 0, so the logarithm is finite.
    u = [(w.double() + 0.5) * 2.0**-32 for w in words]
    radii = [(-2 * a.log()).sqrt() for a in (u[0], u[2])]
    angles = [b * (2 * math.pi) for b in (u[1], u[3])]
    parts = [f for r, a in zip(radii, angles, strict=True) for f in (r * a.cos(), r * a.sin())]
    return torch.stack(parts, dim=-1).flatten(1)[:, :size].reshape(len(index), *shape)


def uniform(seed: int, purpose: Purpose, index: Tensor, draw: int = 0) -> Tensor:
    """One uniform number in (0, 1) per sample, (B,) float64."""
    word = philox((0, draw, index, int(purpose)), split_seed(seed))[0]
    return (word.double() + 0.5) * 2.0**-32


class Noise:
    """The step noise of one batch: each call draws the next z ~ N(0, I) of every sample in it.

    A sampler calls it only where the method uses noise; `noise()` has the shape, dtype and device of the state.
    """

    def __init__(self, seed: int, index: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._seed, self._index, self._shape, self._dtype = seed, index, tuple(shape), dtype
        self.draws = 0
        """How many times noise has been drawn."""

    def __call__(self) -> Tensor:
        """The next z, (B, *shape)."""
        z = normal(self._seed, Purpose.STEP, self._index, self.draws, self._shape)
        self.draws += 1
        return z.to(self._dtype)
