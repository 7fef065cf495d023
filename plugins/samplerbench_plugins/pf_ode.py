"""The probability-flow ODE with general-purpose solvers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from samplerbench.sampling import RECTIFIED_FLOW, SIGMA_INFINITY, Denoiser, Noise, Ode, Sampler, Step, intervals, option


@dataclass(frozen=True)
class ProbabilityFlow(Sampler):
    """The probability-flow ODE dx/dσ = (x - D)/σ (Song et al. 2021, eq. 13; Karras et al. 2022, eq. 1 with σ(t) = t).

    euler, heun (explicit trapezoidal rule, order 2) and rk4 (classical Runge-Kutta, order 4) step on the σ grid. The
    last interval, to σ = 0 where the right-hand side is undefined, is an Euler step, x ← D.
    rk45 is the adaptive 5(4) method of Dormand & Prince in log σ, with a separate step size for each sample, from the
    start to the smallest level of the model. The last step is x ← D. rk45 ignores the number of steps, and
    synchronises with the device after each attempted step.
    For a rectified flow, all solvers integrate dy/dt = v = (y - D)/t in the model's time t instead, with y = (1-t) x,
    and may start at t = 1.
    """

    from_infinity = True
    reversible = True

    solver: Literal["euler", "heun", "rk4", "rk45"] = option("heun", "numerical method")
    rtol: float = option(1e-4, "rk45: relative error tolerance", gt=0.0, lt=1.0)
    atol: float = option(1e-4, "rk45: absolute error tolerance", gt=0.0, lt=1.0)

    def nfe(self, steps: int) -> int | None:
        stages = {"euler": 1, "heun": 2, "rk4": 4}
        return stages[self.solver] * (steps - 1) + 1 if self.solver in stages else None

    def convergence(self) -> int | None:
        return {"euler": 1, "heun": 2, "rk4": 4}.get(self.solver)

    def convergence_from_infinity(self) -> int | None:
        return self.convergence()

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        if self.solver == "rk45":
            yield from self._adaptive(denoise, x, float(sigmas[0]))
            return
        ode = Ode(denoise)
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            if t == 0:
                yield Step(t, x0, x0)
                continue
            start, end = ode.time(s), ode.time(t)
            h, y = end - start, ode.state(x, s)
            k1 = (y - x0) / start
            if self.solver == "euler":
                y = y + h * k1
            elif self.solver == "heun":
                y = y + (h / 2) * (k1 + ode.slope(y + h * k1, end))
            else:
                middle = start + h / 2
                k2 = ode.slope(y + (h / 2) * k1, middle)
                k3 = ode.slope(y + (h / 2) * k2, middle)
                k4 = ode.slope(y + h * k3, end)
                y = y + (h / 6) * (k1 + 2 * k2 + 2 * k3 + k4)
            x = ode.back(y, end)
            yield Step(t, x, x0)

    def _adaptive(self, denoise: Denoiser, x: Tensor, start: float) -> Iterator[Step]:
        """Solve the ODE in `variable` from σ_start to the first of the levels, which may be higher."""
        variable = _FlowTime if denoise.process.ends else _LogSigma
        first, last = variable.of(start), variable.of(float(denoise.levels[0]))
        u = torch.full((len(x),), first, dtype=torch.float64, device=x.device)
        upwards = last > first
        nearer = torch.minimum if upwards else torch.maximum
        h = torch.full_like(u, (last - first) / 50)  # only a first guess: the error control sets later steps
        x0 = denoise(x, start)
        x = variable.state(x, start)
        k1 = variable.slope(x, x0, u)
        active = torch.arange(len(x), device=x.device)
        while len(active):
            part, y = denoise.rows(active), x[active]
            step = nearer(h[active], last - u[active])
            stages = [k1[active]]
            for c, row in zip(_C, _A, strict=True):
                point = y + _column(step, y) * sum(a * k for a, k in zip(row, stages, strict=True) if a)
                at = u[active] + c * step
                stages.append(variable.slope(point, part(*variable.input(point, at)), at))
            # The last stage is evaluated at the new point, so it is also the first stage of the next step.
            error = _column(step, y) * sum(e * k for e, k in zip(_E, stages, strict=True) if e)
            scale = self.atol + self.rtol * torch.maximum(y.abs(), point.abs())
            ratio = (error / scale).square().flatten(1).mean(1).double().sqrt()
            accept = ~(ratio > 1)  # NaN is accepted, so that the driver detects it
            factor = (0.9 * ratio.clamp(min=1e-10) ** -0.2).clamp(0.2, 5.0)
            h = h.index_copy(0, active, step * factor)
            moved = active[accept]
            x = x.index_copy(0, moved, point[accept])
            k1 = k1.index_copy(0, moved, stages[-1][accept])
            u = u.index_copy(0, moved, (u[active] + step)[accept])
            remaining = u[active] < last - 1e-12 if upwards else u[active] > last + 1e-12
            active = active[remaining & ratio.isfinite()]
            x0 = variable.denoised(x, k1, u)
            yield Step(variable.sigma(float(u.min() if upwards else u.max())), variable.back(x, u), x0)
        yield Step(0.0, x0, x0)


class _LogSigma:
    """The adaptive solver's variable u = log σ, with dx/du = x - D."""

    of = staticmethod(math.log)
    sigma = staticmethod(math.exp)

    @staticmethod
    def state(x: Tensor, sigma: float) -> Tensor:
        return x

    @staticmethod
    def back(x: Tensor, u: Tensor) -> Tensor:
        return x

    @staticmethod
    def input(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The state and the noise levels at which D is evaluated."""
        return x, u.exp()

    @staticmethod
    def slope(x: Tensor, x0: Tensor, u: Tensor) -> Tensor:
        return x - x0

    @staticmethod
    def denoised(x: Tensor, slope: Tensor, u: Tensor) -> Tensor:
        """D, from the slope."""
        return x - slope


class _FlowTime:
    """The adaptive solver's variable t of a rectified flow, with dy/dt = (y - D)/t and y = (1-t) x."""

    of = staticmethod(RECTIFIED_FLOW.time)
    sigma = staticmethod(RECTIFIED_FLOW.level)

    @staticmethod
    def state(x: Tensor, sigma: float) -> Tensor:
        return x / (1 + sigma)

    @staticmethod
    def back(y: Tensor, t: Tensor) -> Tensor:
        return y * _column(1 + _flow_levels(t), y)

    @staticmethod
    def input(y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = _flow_levels(t)
        return y * _column(1 + sigma, y), sigma

    @staticmethod
    def slope(y: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        return (y - x0) / _column(t, y)

    @staticmethod
    def denoised(y: Tensor, slope: Tensor, t: Tensor) -> Tensor:
        return y - _column(t, y) * slope


def _flow_levels(t: Tensor) -> Tensor:
    """σ = t/(1-t) for each sample."""
    return torch.where(t < 1, t / (1 - t), SIGMA_INFINITY)


def _column(value: Tensor, x: Tensor) -> Tensor:
    return value.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


# Dormand & Prince 1980: nodes, stages (the last row is also the fifth-order weights), fifth minus fourth order.
_C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
