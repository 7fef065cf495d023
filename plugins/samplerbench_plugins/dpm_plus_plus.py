"""DPM-Solver++."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step, UserError, intervals, is_infinite, option, runge_kutta
from samplerbench_plugins.exponential import phi


@dataclass(frozen=True)
class DPMPlusPlus(Sampler):
    """DPM-Solver++ with data prediction: 2S, 2M, 3M, SDE and ancestral (Lu et al. 2022b, algorithms 1, 2, eq. 18).

    With h = log(s/t):  x ← (t/s) x + (1 - e^{-h}) D̄, where D̄ approximates D over the step:
    2S  D at the middle of the step in λ = -log σ, with two evaluations per step;
    2M  D + (D - D₁)/(2r), with D₁ of the previous step and r = h₁/h;
    3M  Taylor series in λ with D' and D'' from three evaluations: (1-e^{-h}) D + φ₂ hD' - φ₃ h²D'', where
        φ₂ = 1 - (1-e^{-h})/h and φ₃ = φ₂/h - 1/2. The authors' code, and libraries based on it, use h²D''/2 in place
        of h²D'', which reduces the order to 2.
    SDE  x ← (t/s) e^{-h} x + (1 - e^{-2h}) D̄ + t √(1 - e^{-2h}) z, with D̄ of 2M or 2S, D for order 1, and for order 3
        the integral of 3M with 2h in place of h;
    ancestral  2S from s to t²/s, followed by t √(1 - t²/s²) z: "DPM++ 2S a" of k-diffusion.
    The SDE form of 2S is "DPM++ SDE" of k-diffusion: the state at the middle m has noise as well, and the z of the two
    draws of a step have the correlation of a Brownian motion in σ, √((s-m)/(s-t)).
    The last interval, to σ = 0, is x ← D.

    The first steps of a multistep method have lower order. If sampling starts at a large σ, where D hardly changes, 3M
    still has order 3. If it starts at a σ of the size of the data, 3M has order 2. With start=singlestep the first
    step is 2S, which takes one more evaluation, and the order is 3 from any start.
    From t = 1 of a rectified flow, where h is infinite, 2S is the midpoint rule in t. The other steps are exact there.
    """

    spacing = "logsnr"
    from_infinity = True

    order: Literal[1, 2, 3] = option(2, "order of the method")
    method: Literal["multistep", "singlestep"] = option(
        "multistep", "use earlier evaluations (multistep), or intermediate ones (singlestep)"
    )
    start: Literal["lower-order", "singlestep"] = option(
        "lower-order", "first step for order=3: lower-order, or singlestep with one more evaluation"
    )
    sde: bool = option(False, "solve the reverse SDE instead of the ODE")
    ancestral: bool = option(False, "add the noise of an ancestral step after each step of 2S")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "singlestep" and self.order == 3:
            raise UserError("sampler dpm++: there is no singlestep method of order 3; use method=multistep.")
        if self.sde and (self.ancestral or self._started):
            raise UserError("sampler dpm++: sde=true cannot be combined with ancestral=true or start=singlestep.")
        if self.ancestral and not self._two_stages:
            raise UserError("sampler dpm++: ancestral=true requires method=singlestep and order=2.")

    @property
    def _started(self) -> bool:
        """Whether the first step is a singlestep step."""
        return self.start == "singlestep" and self.order == 3

    @property
    def _two_stages(self) -> bool:
        """Whether each step is a singlestep step of order 2."""
        return self.method == "singlestep" and self.order == 2

    def nfe(self, steps: int) -> int:
        if self._two_stages:
            return 2 * steps - 1
        return steps + (self._started and steps > 1)

    def convergence(self) -> int | None:
        return None if self.sde or self.ancestral else self.order

    def convergence_from_any_start(self) -> int | None:
        return None if self.sde or self.ancestral else 3 if self._started else min(2, self.order)

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        past: list[tuple[float, Tensor]] = []  # (λ, D), latest first
        for i, (s, t) in enumerate(intervals(sigmas)):
            x0 = denoise(x, s)
            if i == 1 and is_infinite(float(sigmas[0])):
                past = []  # D at σ = ∞ has no weight in later steps: its λ is infinite
            past = [(-math.log(s), x0), *past[: self.order - 1]]
            if t == 0:
                x = x0
            elif self.sde and self._two_stages:
                x = _stochastic_singlestep(denoise, x, x0, s, t, noise)
            elif self.ancestral:
                # η = 1: down² = t² - up² with up² = t² (1 - t²/s²)
                x = _singlestep(denoise, x, x0, s, t**2 / s) + t * math.sqrt(1 - (t / s) ** 2) * noise()
            elif self._two_stages or (self._started and i == 0):
                x = _singlestep(denoise, x, x0, s, t)
            elif self.sde:
                h = math.log(s / t)
                gone = -math.expm1(-2 * h)
                mean = (
                    gone * _midpoint(past, h)
                    if len(past) < 3
                    else _taylor([(2 * place, d) for place, d in past], 2 * h)
                )
                x = (t / s) ** 2 * x + mean + t * math.sqrt(gone) * noise()
            elif len(past) < 3:
                x = (t / s) * x + (1 - t / s) * _midpoint(past, math.log(s / t))
            else:
                x = (t / s) * x + _taylor(past, math.log(s / t))
            yield Step(t, x, x0)


def _singlestep(denoise: Denoiser, x: Tensor, x0: Tensor, s: float, t: float) -> Tensor:
    """One step of 2S from s to t: D at the middle in log σ, or the midpoint rule in the time of a flow from σ = ∞."""
    if is_infinite(s):
        return runge_kutta(denoise, x, x0, s, t, 2)
    middle = math.sqrt(s * t)
    guess = (middle / s) * x + (1 - middle / s) * x0
    return (t / s) * x + (1 - t / s) * denoise(guess, middle)


def _stochastic_singlestep(denoise: Denoiser, x: Tensor, x0: Tensor, s: float, t: float, noise: Noise) -> Tensor:
    """One step of 2S for the SDE from s to t, with two correlated draws."""
    if is_infinite(s):
        middle = denoise.process.level((denoise.process.time(s) + denoise.process.time(t)) / 2)
    else:
        middle = math.sqrt(s * t)
    first, second = noise(), noise()
    x2 = _reverse(x, x0, s, middle, first)
    share = (s - middle) / (s - t)
    return _reverse(x, denoise(x2, middle), s, t, math.sqrt(share) * first + math.sqrt(1 - share) * second)


def _reverse(x: Tensor, x0: Tensor, s: float, t: float, z: Tensor) -> Tensor:
    """The reverse step of order 1 from s to t: x ← D + (t²/s²)(x - D) + t √(1 - t²/s²) z."""
    return x0 + (t / s) ** 2 * (x - x0) + t * math.sqrt(1 - (t / s) ** 2) * z


def _midpoint(past: list[tuple[float, Tensor]], h: float) -> Tensor:
    """D at the middle of the step, extrapolated from the last two evaluations. With one evaluation, D itself."""
    now, x0 = past[0]
    if len(past) == 1:
        return x0
    before, x1 = past[1]
    return x0 + (h / (2 * (now - before))) * (x0 - x1)


def _taylor(past: list[tuple[float, Tensor]], h: float) -> Tensor:
    """∫ e^{-(h-τ)} D(τ) dτ over the step, with the parabola through the last three evaluations of D."""
    (l0, d0), (l1, d1), (l2, d2) = past
    a, b = l0 - l1, l1 - l2
    late, early = (d0 - d1) / a, (d1 - d2) / b
    bend = (late - early) / (a + b)  # D''/2
    slope = late + a * bend
    return h * phi(1, -h) * d0 + h**2 * phi(2, -h) * slope + 2 * h**3 * phi(3, -h) * bend
