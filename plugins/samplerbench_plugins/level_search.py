"""A least-squares search over noise levels, for schedules that are learned from samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

Residuals = Callable[[np.ndarray, int], np.ndarray]
"""Function of the logarithms of the levels (k,) and a number of images n: the residuals (n·d,) of the first n."""

STEP = 0.03
"""Step of the finite differences in log σ. It is large, because the networks are evaluated in float32."""
SIMPLEX = 0.2
"""Size of the first simplex in log σ."""
LONGEST = 1.5
"""Largest change of log σ in one iteration."""
CLOSEST = 0.05
"""Smallest difference of the logarithms of two levels, unless there are so many that they must be closer."""


@dataclass
class LevelSearch:
    """Levenberg-Marquardt from several starts, then Nelder-Mead, with common random numbers.

    The starts are compared on a quarter of the images. The best of them are improved there for a few iterations of
    Levenberg-Marquardt with finite differences (Nocedal & Wright 2006, section 10.3), and the two best results are
    improved on all images until they converge. The rest of the budget goes to Nelder-Mead (Gao & Han 2012), which needs
    no derivative and also improves where a change of the levels moves some images to another mode of the data.

    Args:
        residuals: residuals of the levels.
        images: number of images.
        low: smallest log σ.
        high: largest log σ.
        budget: number of images that may be sampled.

    Attributes:
        sampled: number of images sampled so far.
    """

    residuals: Residuals
    images: int
    low: float
    high: float
    budget: int
    sampled: int = field(default=0, init=False)

    def run(self, starts: Sequence[np.ndarray], kept: int = 4, iterations: int = 4) -> np.ndarray:
        """Return the logarithms of the best levels.

        Args:
            starts: logarithms of the levels to start from, each (k,).
            kept: number of starts that are improved.
            iterations: number of iterations on a quarter of the images.
        """
        few = max(1, self.images // 4)
        sound = [np.clip(start, self.low, self.high) for start in starts]
        sound = [start for start in sound if self._valid(start)]
        values = [self._cost(self._at(start, few)) for start in sound]
        order = np.argsort(values, kind="stable")[:kept]
        improved = [self._improve(sound[i], few, iterations) for i in order]
        # The unchanged best start is a candidate too: an improvement on few images need not be one on all.
        candidates = [*improved, sound[order[0]]]
        whole = [self._cost(self._at(levels, self.images)) for levels in candidates]
        finished = [self._improve(candidates[i], self.images, 1000) for i in np.argsort(whole, kind="stable")[:2]]
        return self._polish(min(finished, key=lambda levels: self._cost(self._at(levels, self.images))))

    def _polish(self, levels: np.ndarray) -> np.ndarray:
        """Nelder-Mead on all images with the rest of the budget. The result is never worse than the start."""
        from scipy.optimize import minimize

        runs = (self.budget - self.sampled) // self.images
        if runs < len(levels) + 2:
            return levels

        def cost(trial: np.ndarray) -> float:
            return self._cost(self._at(trial, self.images)) if self._valid(trial) else np.inf

        corners = [levels]
        for k in range(len(levels)):
            moved = [levels + size * np.eye(len(levels))[k] for size in (-SIMPLEX, SIMPLEX, -STEP, STEP)]
            corners.append(next((corner for corner in moved if self._valid(corner)), levels))
        settings = {"maxfev": runs, "xatol": 5e-3, "fatol": 0.0, "adaptive": True, "initial_simplex": np.stack(corners)}
        return np.asarray(minimize(cost, levels, method="Nelder-Mead", options=settings).x)

    def _at(self, levels: np.ndarray, n: int) -> np.ndarray:
        self.sampled += n
        return self.residuals(levels, n)

    @staticmethod
    def _cost(residuals: np.ndarray) -> float:
        value = float(np.mean(residuals**2))
        return value if np.isfinite(value) else np.inf

    def _valid(self, levels: np.ndarray) -> bool:
        inside = levels[0] <= self.high and levels[-1] >= self.low
        closest = min(CLOSEST, (self.high - self.low) / (4 * len(levels)))
        return bool(inside and (np.diff(levels) <= -closest).all())

    def _improve(self, levels: np.ndarray, n: int, iterations: int) -> np.ndarray:
        """Levenberg-Marquardt on the first n images. Invalid and worse steps are shortened."""
        damping, now = 1e-2, self._at(levels, n)
        cost = self._cost(now)
        for _ in range(iterations):
            if self.sampled + n * (len(levels) + 1) > self.budget or not np.isfinite(cost):
                break
            columns = []
            step = min(STEP, (self.high - self.low) / (8 * len(levels)))  # less than the distance of two levels
            for k in range(len(levels)):
                moved = levels.copy()
                moved[k] += step if levels[k] - step < self.low else -step
                columns.append((self._at(moved, n) - now) / (moved[k] - levels[k]))
            jacobian = np.stack(columns, axis=1)
            square, slope = jacobian.T @ jacobian, jacobian.T @ now
            diagonal = np.diag(square) + 1e-6 * np.trace(square)
            before = cost
            for _ in range(6):
                change = -np.linalg.solve(square + damping * np.diag(diagonal), slope)
                trial = np.clip(levels + np.clip(change, -LONGEST, LONGEST), self.low, self.high)
                if self._valid(trial):
                    there = self._at(trial, n)
                    if self._cost(there) < cost:
                        levels, now, cost = trial, there, self._cost(there)
                        damping = max(damping / 5, 1e-6)
                        break
                damping *= 5
            if cost > before * (1 - 2e-3):
                break
        return levels
