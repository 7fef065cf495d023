"""SA-Solver."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step, UserError, intervals, is_infinite, option
from samplerbench_plugins.exponential import adams_weights


@dataclass(frozen=True)
class SASolver(Sampler):
    """SA-Solver: a stochastic Adams method with data prediction (Xue et al. 2023, algorithm 1, eq. 14 and 17).

    With h = log(s/t):  x ← (t/s) e^{-τ²h} x + Σ_j b_j D_j + t √(1 - e^{-2τ²h}) z, where Σ b_j D_j is the integral of
    (1+τ²) e^{-(1+τ²)(h-u)} P(u) over the step, and P interpolates D in λ = -log σ. The predictor of order p uses the
    last p evaluations. The corrector of order q repeats the step with q evaluations, of which one is D at the predicted
    state, and with the same z. It takes no evaluations, because the next step needs this D too. τ = 0 is a method for
    the ODE, τ = 1 for the reverse SDE. τ applies to steps that begin at low ≤ σ ≤ high; the others have τ = 0.

    The authors' code, and libraries based on it, replace the integral of (1+τ²) e^{-(1+τ²)(h-u)} u by (1+τ²) h²/2 in
    methods of order 2, a change of O(h³). weights=exact uses the integral. The first steps, and the last ones before
    σ = 0, have lower order. The last interval is x ← D. The first step from t = 1 of a rectified flow has no corrector.
    """

    spacing = "logsnr"
    from_infinity = True

    predictor: int = option(2, "order p of the predictor", ge=1, le=4)
    corrector: int = option(2, "order q of the corrector; 0: no corrector", ge=0, le=4)
    tau: float = option(1.0, "τ, the scale of the noise: 0 is the ODE, 1 the reverse SDE", ge=0.0, le=10.0)
    low: float = option(0.0, "lowest noise level σ with noise", ge=0.0)
    high: float | None = option(None, "highest noise level σ with noise; none: no limit", gt=0.0)
    weights: Literal["authors", "exact"] = option("authors", "weights of order 2")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high is not None and self.low >= self.high:
            raise UserError(f"sampler sa-solver: low = {self.low:g} is not below high = {self.high:g}.")

    def convergence(self) -> int | None:
        if self.tau > 0:
            return None
        return min(self.corrector, self.predictor + 1) if self.corrector else self.predictor

    def convergence_from_any_start(self) -> int | None:
        claimed = self.convergence()
        return None if claimed is None else min(claimed, 3 if self.corrector > 1 else 2)

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        levels = sigmas.tolist()
        n, ends_at_zero = len(levels) - 1, levels[-1] == 0
        past: list[tuple[float, Tensor]] = []  # (λ, D), latest first
        last: tuple[Tensor, float, Tensor | None] | None = None  # state, level and z of the previous step
        for i, (s, t) in enumerate(intervals(sigmas)):
            x0 = denoise(x, s)
            if last is not None and self.corrector and not is_infinite(last[1]):
                start, level, z = last
                order = min(self.corrector, n - i + 2 if ends_at_zero else self.corrector, len(past) + 1)
                x = self._move(start, level, s, [(-math.log(s), x0), *past][:order], z)
            if last is not None and is_infinite(last[1]):
                past = []  # D at σ = ∞ has no weight in later steps: its λ is infinite
            past = [(-math.log(s), x0), *past[: max(self.predictor, self.corrector - 1) - 1]]
            if t == 0:
                yield Step(t, x0, x0)
                continue
            z = noise() if self._tau(s) > 0 else None
            order = min(self.predictor, n - i if ends_at_zero else self.predictor, len(past))
            last = (x, s, z)
            x = self._move(x, s, t, past[:order], z)
            yield Step(t, x, x0)

    def _tau(self, s: float) -> float:
        """τ of the step that begins at level s."""
        return self.tau if self.low <= s and (self.high is None or s <= self.high) else 0.0

    def _move(self, x: Tensor, s: float, t: float, known: list[tuple[float, Tensor]], z: Tensor | None) -> Tensor:
        """The step from s to t with the polynomial through the known values of D, (λ, D)."""
        h, tau = math.log(s / t), self._tau(s)
        nodes = [place + math.log(s) for place, _ in known]
        weights = adams_weights(nodes, h, 1 + tau**2)
        if self.weights == "authors" and len(known) == 2:
            # D = D₁ + (D₁-D₂)/(u₁-u₂) (u - u₁), with the integral of u replaced by (1+τ²) h²/2.
            total, first = sum(weights), (1 + tau**2) * h**2 / 2
            slope = (first - nodes[0] * total) / (nodes[0] - nodes[1])
            weights = [total + slope, -slope]
        x = (t / s) * math.exp(-(tau**2) * h) * x
        for weight, (_, x0) in zip(weights, known, strict=True):
            x = x + weight * x0
        return x if z is None else x + (t * math.sqrt(-math.expm1(-2 * tau**2 * h))) * z
