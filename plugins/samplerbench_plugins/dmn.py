"""Optimized time steps (DMN): levels that minimise a bound of the discretisation error, without the network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch

from samplerbench.sampling import ModelView, RunView, Sampler, UserError, argument, option
from samplerbench_plugins.learned_spacing import LearnedSpacing

RESTARTS = 6
"""Largest number of runs of Nelder-Mead, each from the result of the one before."""
ORDER = 3
"""Order of the multistep method that the bound is derived for."""


@dataclass(frozen=True)
class OptimizedTimeSteps(LearnedSpacing):
    """Minimise Σ_n err_n |Σ_s J_n,s| over λ = -log σ (Xue et al. 2024, eq. 14; their code's step_optim.py).

    J_n,s = ∫ e^λ ℓ_n(λ) dλ over step s, with the Lagrange polynomials ℓ_n of an order-3 multistep method, and
    err_n = (α σ)^p/α, the assumed error of D at level n. As in the authors' code, the last step and the first three
    steps are bounded separately. The N intervals go from the model's largest to its smallest level; then the last level
    is replaced by 0. No network is evaluated. The optimisers are those of scipy: trust-constr, as in the authors' code,
    which may stop at a kink of the sum, and then Nelder-Mead, which goes on from there.
    """

    most_steps = 50
    scale: ClassVar[tuple[Callable[[float], float]]]
    logs: ClassVar[np.ndarray]

    power: float = option(2.0, "p of the assumed error of D: 1 or 2 in the paper, 2 in the authors' code", ge=0.0, le=8)
    start: Literal["logsnr", "time"] = option("logsnr", "start of the optimisation: even in log σ, or in the timestep")

    def bind(self, model: ModelView, sampler: Sampler) -> Self:
        state: dict[str, Any] = {"logs": model.levels.double().log().numpy(), "sampler": sampler}
        if isinstance(model, RunView):
            return self.with_state(view=model, scale=(model.alpha,), **state)
        flow = model.flow is not None  # a scheduler knows only its levels
        return self.with_state(scale=(_flow_alpha if flow else _preserving_alpha,), **state)

    def alpha(self, sigma: float) -> float:
        """The scale α(σ) of the bound model."""
        return self.scale[0](sigma)

    def for_steps(self, steps: int) -> Self:
        if not hasattr(self, "logs"):
            raise UserError(f"spacing {self.spec} needs the noise levels of a model; bind it to one first.")
        if steps > self.most_steps:
            raise UserError(
                f"spacing {self.spec} optimises at most {self.most_steps} levels; use fewer {argument('steps')}, or "
                "another spacing."
            )
        sigmas, _ = self.learn(steps)
        return self.with_state(steps=steps, sigmas=torch.tensor([*sigmas, 0.0], dtype=torch.float64))

    def learn(self, steps: int) -> tuple[list[float], int]:
        if not hasattr(self, "view"):
            return self.optimise(steps)[:-1], 0
        settings = {"power": self.power, "start": self.start, "steps": steps, "alpha": self.alpha(1.0)}
        with self.view.estimates("dmn", **settings) as known:
            made: list[float] = []

            def level(i: int) -> float:
                if not made:
                    made.extend(self.optimise(steps))
                return made[i]

            return [known.get(str(i), lambda i=i: level(i)) for i in range(steps)], 0  # type: ignore[misc]

    def optimise(self, steps: int) -> list[float]:
        """Return the steps + 1 levels from the model's largest to its smallest."""
        from scipy.optimize import LinearConstraint, minimize

        first, last = -float(self.logs[-1]), -float(self.logs[0])
        if steps == 1:
            return [math.exp(-first), math.exp(-last)]
        if self.start == "logsnr":
            start = np.linspace(first, last, steps + 1)
        else:
            top = len(self.logs) - 1
            start = -np.interp(np.linspace(top, 0, steps + 1), np.arange(top + 1), self.logs)
        # λ_1 ≥ λ_0, λ_n+1 ≥ λ_n, λ_N ≥ λ_N-1: one row for each interval.
        rows = np.eye(steps, steps - 1) - np.eye(steps, steps - 1, -1)
        low = np.zeros(steps)
        low[0], low[-1] = first, -last
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of quasi-Newton updates without a change of the gradient
            found = minimize(
                lambda inner: self.bound(np.concatenate([[first], inner, [last]])),
                start[1:-1],
                method="trust-constr",
                constraints=[LinearConstraint(rows, low, np.full(steps, np.inf))],
            )

        def inside(inner: np.ndarray) -> float:
            lambdas = np.concatenate([[first], inner, [last]])
            return self.bound(lambdas) if (np.diff(lambdas) > 0).all() else math.inf

        best, value = found.x, inside(found.x)
        for _ in range(RESTARTS):
            settings = {"maxfev": 4000, "adaptive": True, "xatol": 1e-6, "fatol": 1e-9}
            trial = minimize(inside, best, method="Nelder-Mead", options=settings)
            before, best, value = value, trial.x, float(trial.fun)
            if not value < before * (1 - 1e-4):
                break
        return [math.exp(-first), *np.exp(-best).tolist(), math.exp(-last)]

    def bound(self, lambdas: np.ndarray) -> float:
        """The bound of the error for N+1 values of λ, increasing."""
        steps = len(lambdas) - 1
        sigmas = np.exp(-lambdas)
        alphas = np.array([self.alpha(s) for s in sigmas.tolist()])
        error = (alphas * sigmas) ** self.power / alphas
        total, sums = 0.0, np.zeros(steps)
        for s in range(steps):
            order = min(s + 1, steps - s, ORDER)
            nodes = slice(s - order + 1, s + 1)
            terms = error[nodes] * lagrange_integrals(lambdas[nodes], lambdas[s + 1])
            if order == 1 or s < ORDER:
                total += math.sqrt(float(terms @ terms))
            else:
                sums[nodes] += terms
        return total + float(np.abs(sums).sum())


def lagrange_integrals(nodes: np.ndarray, end: float) -> np.ndarray:
    """∫ e^λ ℓ_n(λ) dλ from the last node to `end`, for the Lagrange polynomials on 1 to 3 nodes.

    Args:
        nodes: values of λ, (k,), increasing.
        end: upper limit.

    Returns:
        The integrals, (k,).
    """
    here = nodes[-1]
    h, scale = end - here, math.exp(here)
    zero = math.expm1(h)
    one = h * math.exp(h) - zero
    if len(nodes) == 1:
        return np.array([scale * zero])
    # With u = λ - λ_s, ℓ is a product of (u - u_m)/(u_n - u_m), and ∫ uᵏ eᵘ du is known.
    if len(nodes) == 2:
        a = nodes[0] - here
        return scale * np.array([one / a, -(one - a * zero) / a])
    two = h * h * math.exp(h) - 2 * one
    a, b = nodes[0] - here, nodes[1] - here
    return scale * np.array(
        [
            (two - b * one) / (a * (a - b)),
            (two - a * one) / (b * (b - a)),
            (two - (a + b) * one + a * b * zero) / (a * b),
        ]
    )


def _flow_alpha(sigma: float) -> float:
    return 1 / (1 + sigma)


def _preserving_alpha(sigma: float) -> float:
    return 1 / math.sqrt(1 + sigma**2)
