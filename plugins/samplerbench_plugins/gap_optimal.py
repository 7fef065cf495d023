"""Noise levels that minimise the distance to the model's converged solution."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import torch

from samplerbench.sampling import SIGMA_INFINITY, UserError, option
from samplerbench_plugins.learned_spacing import LearnedSpacing
from samplerbench_plugins.level_search import LevelSearch
from samplerbench_plugins.pf_ode import ProbabilityFlow
from samplerbench_plugins.sigma_spacings import Karras, LogSNR
from samplerbench_plugins.timestep_spacings import Linspace, Trailing


@dataclass(frozen=True)
class GapOptimal(LearnedSpacing):
    """Levels that minimise the metric `gap`, mean ‖x - x*‖²/d, of any deterministic sampler (this work).

    x* is the solution of the probability-flow ODE from the same noise, under the same guidance and labels. Minimising
    the distance to a converged solution over the levels is the idea of LD3 (Tong et al. 2024). Here the sampler is not
    differentiated: log σ is optimised with common random numbers, by Levenberg-Marquardt with finite differences from
    several starts, and then by Nelder-Mead. The noise of the learning images is never that of a run. The first level of
    a rectified flow stays at σ = ∞. The other levels are free between the smallest and the largest of the model.
    """

    most_steps = 50

    images: int = option(64, "number of images that the levels are learned on", ge=4, le=1_000_000)
    runs: int = option(120, "budget: how often all images are sampled during the search", ge=1, le=1_000_000)
    tol: float = option(1e-3, "relative and absolute tolerance of the converged solution", gt=0.0, le=1e-2)
    seed: int = option(0, "seed of the noise that the levels are learned on", ge=0, le=2**63 - 1)
    batch: int = option(64, "images per batch; changes only the last digits", ge=1, le=1_000_000)

    def learn(self, steps: int) -> tuple[list[float], int]:
        settings: dict[str, str | int | float] = {
            "sampler": self.view.describe(self.sampler),
            "solver": self.view.describe(self.solver),
            "steps": steps,
            "images": self.images,
            "runs": self.runs,
            "seed": self.seed,
            "batch": self.batch,
        }
        with self.view.estimates("gap-optimal", **settings) as known:
            made: list[float] = []

            def level(i: int) -> float:
                if not made:
                    made.extend(self._search(steps))
                return made[i]

            found = [known.get(str(i), lambda i=i: level(i)) for i in range(steps)]  # type: ignore[misc]
            return found, known.evaluations

    @property
    def solver(self) -> ProbabilityFlow:
        """The sampler that computes x*."""
        return ProbabilityFlow(solver="rk45", rtol=self.tol, atol=self.tol)

    @property
    def from_infinity(self) -> bool:
        """Whether the first level is fixed at σ = ∞."""
        return self.view.flow is not None

    def _search(self, steps: int) -> list[float]:
        largest = SIGMA_INFINITY if self.from_infinity else float(self.view.levels[-1])
        if steps == 1:
            return [largest]
        index = torch.arange(self.images)
        ends = torch.tensor([largest, 0.0], dtype=torch.float64)
        truth = torch.cat([self.view.sample(self.solver, ends, part, self.seed) for part in index.split(self.batch)])

        def residuals(logs: np.ndarray, n: int) -> np.ndarray:
            grid = torch.tensor(self._levels(logs), dtype=torch.float64)
            parts = index[:n].split(self.batch)
            states = torch.cat([self.view.sample(self.sampler, grid, part, self.seed) for part in parts])
            return (states.double() - truth[:n].double()).flatten().cpu().numpy()

        low, high = (float(self.view.levels[i].log()) for i in (0, -1))
        search = LevelSearch(residuals, self.images, low, high, self.runs * self.images)
        starts = [logs[1:] if self.from_infinity else logs for logs in self._starts(steps)]
        return self._levels(search.run(starts))[:-1]

    def _levels(self, logs: np.ndarray) -> list[float]:
        """All levels for the logarithms of the free ones."""
        free = np.exp(logs).tolist()
        return [SIGMA_INFINITY, *free, 0.0] if self.from_infinity else [*free, 0.0]

    def _starts(self, steps: int) -> Iterator[np.ndarray]:
        """The logarithms of hand-made levels: over the timesteps, and over parts of the model's range."""
        levels = self.view.levels
        low, high = float(levels[0]), float(levels[-1])
        tops = [high, *(top for top in (40.0,) if top < high)]
        bottoms = [low, *(bottom for bottom in (0.1, 0.4) if bottom > low)]
        spacings = [Trailing(), Linspace()]
        for kind, top, bottom in product((LogSNR, Karras), tops, bottoms):
            spacings.append(kind(sigma_min=bottom, sigma_max=top))
        for spacing in spacings:
            try:
                grid = spacing.grid(levels, steps)
            except UserError:
                continue
            if all(a > b for a, b in pairwise(grid.tolist())):
                yield np.array([math.log(sigma) for sigma in grid[:-1].tolist()])
