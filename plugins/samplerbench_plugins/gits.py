"""GITS: levels by dynamic programming over the trajectories of a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from samplerbench.sampling import Noise, Ode, UserError, argument, option
from samplerbench_plugins.ipndm import IPNDM
from samplerbench_plugins.learned_spacing import LearnedSpacing
from samplerbench_plugins.sigma_spacings import Karras


@dataclass(frozen=True)
class GITS(LearnedSpacing):
    """Geometry-inspired time scheduling (Chen et al. 2024, algorithm 1): dynamic programming over teacher trajectories.

    A teacher (iPNDM of order 4) samples on M levels. A jump from level i to j is one step of Euler,
    x̂ = x_i + (σ_j - σ_i) d_i with d = (x - D)/σ, and needs no new evaluation. Its cost c_ij is the mean of
    dev(x̂) - dev(x_j), with dev the distance from the line between both ends of the trajectory, or the distance
    ‖x̂ - x_j‖ in the norm L1 or L2. The levels are those of the path of N jumps from the first level to 0 with the least
    Σ_k γ^k c, where k counts the jumps from 0. The teacher's levels are EDM's (ρ = 7). For a rectified flow they are
    even in t, and the jumps are in t. The levels do not depend on the sampler. The authors use γ = 1.15 in pixel
    space and 1.2 for Stable Diffusion.
    """

    gamma: float = option(1.15, "γ: above 1 puts more weight on the last steps", gt=0.0, le=10.0)
    cost: Literal["deviation", "l1", "l2"] = option("deviation", "cost of a jump")
    points: int = option(61, "M: number of levels of the teacher, with the last one, 0", ge=2, le=1001)
    images: int = option(256, "number of trajectories", ge=1, le=1_000_000)
    seed: int = option(0, "seed of the noise that the levels are learned on", ge=0, le=2**63 - 1)
    batch: int = option(64, "images per batch; changes only the last digits", ge=1, le=1_000_000)

    def learn(self, steps: int) -> tuple[list[float], int]:
        if steps >= self.points:
            raise UserError(
                f"spacing {self.spec} chooses from {self.points - 1} levels, so it cannot give {steps} steps; use "
                f"fewer {argument('steps')}, or points={steps + 1}."
            )
        costs, evaluations = self.costs()
        path = best_path(costs, steps, self.gamma)
        levels = self.candidates().tolist()
        return [levels[i] for i in path[:-1]], evaluations

    def candidates(self) -> Tensor:
        """The levels of the teacher, (M,) float64, decreasing to 0."""
        if self.view.flow is not None:
            return self.view.flow.grid(self.points - 1)
        return Karras().grid(self.view.levels, self.points - 1)

    def costs(self) -> tuple[np.ndarray, int]:
        """The cost of every jump, (M, M), infinite unless i < j, and the network evaluations of the teacher."""
        M = self.points
        settings = {"points": M, "images": self.images, "seed": self.seed, "batch": self.batch, "cost": self.cost}
        with self.view.estimates("gits", **settings) as known:
            made: list[tuple[np.ndarray, np.ndarray]] = []

            def measured() -> tuple[np.ndarray, np.ndarray]:
                if not made:
                    made.append(self._distances())
                return made[0]

            # They are cached apart from each other, because their difference may be negative.
            own = [known.get(f"teacher {j}", lambda j=j: float(measured()[1][j])) for j in range(M)]  # type: ignore[misc]
            found = np.full((M, M), np.inf)
            for i in range(M):
                for j in range(i + 1, M):
                    jump = known.get(f"{i} {j}", lambda i=i, j=j: float(measured()[0][i, j]))  # type: ignore[misc]
                    found[i, j] = jump - own[j]
            return found, known.evaluations

    @torch.no_grad()
    def _distances(self) -> tuple[np.ndarray, np.ndarray]:
        """Means over the trajectories: the distance of every jump, (M, M), and of the teacher, (M,)."""
        M, sigmas = self.points, self.candidates()
        jumps, own = np.zeros((M, M)), np.zeros(M)
        for index in torch.arange(self.images).split(self.batch):
            times, states, slopes = self._teacher(index, sigmas)
            first, last = states[0], states[-1]
            for i in range(M):
                if self.cost == "deviation":
                    own[i] += float(_deviation(states[i], first, last).sum())
                for j in range(i + 1, M):
                    jumped = states[i] + (times[j] - times[i]) * slopes[i]
                    if self.cost == "deviation":
                        distance = _deviation(jumped, first, last)
                    else:
                        distance = (jumped - states[j]).norm(p=1 if self.cost == "l1" else 2, dim=1)
                    jumps[i, j] += float(distance.sum())
        return jumps / self.images, own / self.images

    def _teacher(self, index: Tensor, sigmas: Tensor) -> tuple[list[float], list[Tensor], list[Tensor]]:
        """The times, states and slopes of the trajectories of one batch, in the variables of `Ode`, (B, d) float64."""
        denoise = self.view.run_denoiser(index)
        ode = Ode(denoise)
        x = self.view.start(index, float(sigmas[0]), self.seed)
        noise = Noise(self.seed, index.to(x.device), self.view.shape, x.dtype)
        times, states, slopes = [], [], []
        sigma = float(sigmas[0])
        for step in IPNDM().steps(denoise, x, sigmas, noise):
            assert step.x0 is not None
            y, time = ode.state(x, sigma).double().flatten(1), ode.time(sigma)
            times.append(time)
            states.append(y)
            slopes.append((y - step.x0.double().flatten(1)) / time)
            x, sigma = step.x, step.sigma
        return [*times, 0.0], [*states, x.double().flatten(1)], slopes


def _deviation(x: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """The distance of points from the line through two others, (B,).

    Args:
        x: points, (B, d).
        first: points on the lines, (B, d).
        last: other points on the lines, (B, d).
    """
    line = first - last
    share = ((x - last) * line).sum(1, keepdim=True) / line.square().sum(1, keepdim=True)
    return (x - last - share * line).norm(dim=1)


def best_path(costs: np.ndarray, jumps: int, gamma: float) -> list[int]:
    """The path with the least Σ_k γ^k c from the first point to the last, with a number of jumps, k from 0.

    V[k][j] = min_i c_ji + γ V[k-1][i] is the least cost from j to the end with k jumps (Chen et al. 2024, eq. 11).

    Args:
        costs: cost of the jump from i to j, (M, M), infinite unless i < j.
        jumps: number of jumps, from 1 to M-1.
        gamma: weight γ.

    Returns:
        The indices of the points, jumps + 1 of them, from 0 to M-1.
    """
    M = len(costs)
    value, choices = costs[:, -1].copy(), []
    for _ in range(jumps - 1):
        totals = costs + gamma * value[None, :]
        choices.append(totals.argmin(axis=1))
        value = totals.min(axis=1)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return [*path, M - 1]
