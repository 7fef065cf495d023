"""Nearest neighbours among real images, in pixels or features."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from samplerbench.errors import UserError

CHUNK = 1024
"""Rows of the matrix of distances that are computed together."""

CANDIDATES = 4
"""Neighbours whose distances are computed again in float64, without the cancellation of the expanded square."""


class Neighbours:
    """The nearest of N real points to others.

    Args:
        real: (N, d), N ≥ 3.

    Raises:
        UserError: fewer than 3 points.
    """

    def __init__(self, real: Tensor) -> None:
        if len(real) < 3:
            raise UserError(f"nearest neighbours need at least 3 real images; there are {len(real)}.")
        self.real = real.double().cpu()
        self._centre = self.real.mean(dim=0)
        self._single = (self.real - self._centre).float()
        self._squares = self._single.square().sum(dim=1)

    def nearest(self, points: Tensor, k: int = 2) -> tuple[Tensor, Tensor]:
        """The k nearest real points, k ≤ 3.

        Args:
            points: (B, d).
            k: how many neighbours.

        Returns:
            Their Euclidean distances, (B, k) float64, increasing, and their indices, (B, k) int64.
        """
        parts = [self._nearest(part, k) for part in points.cpu().split(CHUNK)]
        return torch.cat([d for d, _ in parts]), torch.cat([i for _, i in parts])

    def _nearest(self, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
        single = (points.double() - self._centre).float()
        squares = self._squares - 2 * single @ self._single.T  # + ‖x‖², the same for every real point
        candidates = squares.topk(min(CANDIDATES, len(self.real)), dim=1, largest=False).indices
        exact = (points.double()[:, None] - self.real[candidates]).square().sum(dim=2)
        order = exact.argsort(dim=1, stable=True)[:, :k]
        return exact.gather(1, order).sqrt(), candidates.gather(1, order)

    @cached_property
    def own(self) -> Tensor:
        """(N,) float64, the distance from each real point to the nearest other one."""
        found = []
        for first in range(0, len(self.real), CHUNK):
            part = self.real[first : first + CHUNK]
            distances, indices = self._nearest(part, 2)
            itself = indices == torch.arange(first, first + len(part))[:, None]
            # With duplicates among the real points the point itself need not be the first; the other one is as near.
            found.append(torch.where(itself[:, 0], distances[:, 1], distances[:, 0]))
        return torch.cat(found)
