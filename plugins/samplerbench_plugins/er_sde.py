"""ER-SDE solvers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step, intervals, option


@dataclass(frozen=True)
class ERSDE(Sampler):
    """ER-SDE-Solver-1, -2 and -3 for the extended reverse-time SDE (Cui et al. 2023, algorithms 1-3, eq. 13-16).

    With the noise scale function φ and r = φ(t)/φ(s):
    x ← r x + (1-r) D + I₁ D' + I₂ D'' + √(t² - r² s²) z,
    where D' and D'' are the first and second derivatives of D in σ from earlier evaluations, and
    I_k = ∫_s^t (1 - φ(t)/φ(σ)) (σ-s)^{k-1}/(k-1)! dσ. In the state x = x₀ + σ z the form for variance-preserving models
    is the same as for variance-exploding ones. φ = σ is the ODE, where order 1 is DDIM; φ = σ² is the reverse SDE. The
    default is the paper's "ER SDE 5". The last interval is x ← D.

    The paper takes D' at the middle of the last interval, which leaves order 3 at order 2 for the ODE. With
    derivatives=exact it is the derivative of the parabola at s, and the order is 3.
    """

    spacing = "karras"
    from_infinity = True

    order: Literal[1, 2, 3] = option(3, "order of the method")
    phi: Literal["ode", "sde", "er-4", "er-5"] = option(
        "er-5", "φ(σ): σ (ode), σ² (sde), σ^0.9 log₁₀(1 + 100 σ^1.5) (er-4), σ (exp(σ^0.3) + 10) (er-5)"
    )
    derivatives: Literal["paper", "exact"] = option(
        "paper", "D' for order 3: at the middle of the last interval, or at s"
    )

    def convergence(self) -> int | None:
        if self.phi != "ode":
            return None
        return 2 if self.order == 3 and self.derivatives == "paper" else self.order

    def convergence_from_any_start(self) -> int | None:
        claimed = self.convergence()
        return None if claimed is None else min(2, claimed)

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        past: list[tuple[float, Tensor]] = []  # (σ, D), latest first
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            past = [(s, x0), *past[: self.order - 1]]
            if t == 0:
                yield Step(t, x0, x0)
                continue
            # φ must not grow more slowly than σ, as that of er-4 does above σ = 1000.
            r = min(math.exp(self._log_phi(t) - self._log_phi(s)), t / s)
            x = r * x + (1 - r) * x0
            for k, derivative in enumerate(self._derivatives(past), start=1):
                x = x + self._integral(s, t, k) * derivative
            variance = 0.0 if self.phi == "ode" else t**2 - (s * r) ** 2
            if variance > 0:
                x = x + math.sqrt(variance) * noise()
            yield Step(t, x, x0)

    def _derivatives(self, past: list[tuple[float, Tensor]]) -> list[Tensor]:
        """D' and D'' in σ, as far as earlier evaluations define them."""
        if len(past) < 2:
            return []
        (s, x0), (s1, x1) = past[:2]
        slope = (x0 - x1) / (s - s1)
        if len(past) < 3:
            return [slope]
        s2, x2 = past[2]
        bend = 2 * (slope - (x1 - x2) / (s1 - s2)) / (s - s2)
        return [slope + (s - s1) / 2 * bend if self.derivatives == "exact" else slope, bend]

    def _integral(self, s: float, t: float, k: int) -> float:
        """I_k by Gauss-Legendre quadrature in log σ."""
        end = self._log_phi(t)

        def integrand(u: float) -> float:
            sigma = math.exp(u)
            return -math.expm1(end - self._log_phi(sigma)) * (sigma - s) ** (k - 1) / math.factorial(k - 1) * sigma

        return -_quadrature(integrand, math.log(t), math.log(s))

    def _log_phi(self, sigma: float) -> float:
        """log φ(σ), without overflow for large σ."""
        log = math.log(sigma)
        if self.phi == "ode":
            return log
        if self.phi == "sde":
            return 2 * log
        if self.phi == "er-4":
            return 0.9 * log + math.log(math.log1p(100 * sigma**1.5) / math.log(10))
        power = sigma**0.3
        return log + power + math.log1p(10 * math.exp(-power))


_NODES, _WEIGHTS = (values.tolist() for values in np.polynomial.legendre.leggauss(48))


def _quadrature(f: Callable[[float], float], a: float, b: float) -> float:
    """∫_a^b f(u) du."""
    middle, half = (a + b) / 2, (b - a) / 2
    return half * sum(w * f(middle + half * node) for node, w in zip(_NODES, _WEIGHTS, strict=True))
