"""The reverse-time SDE: Euler-Maruyama, reverse diffusion, and predictor-corrector sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step, intervals, is_infinite, option


def _reverse_diffusion(denoise: Denoiser, x: Tensor, x0: Tensor, s: float, t: float) -> tuple[Tensor, float]:
    """Mean and standard deviation of one step of the reverse diffusion sampler (Song et al. 2021, appendix E).

    For y = α x, the forward step from t to s is y ← a y + b z with a = α_s/α_t and b² = α_s² (s²-t²). The reverse step
    is y ← (2 - a) y + b² score + b z. From σ = ∞, where a = 0, it is the exact reverse step x ← D + t z.
    """
    if is_infinite(s):
        return x0, t
    a = denoise.alpha(s) / denoise.alpha(t)
    mean = a * ((2 - a) * x + (1 - (t / s) ** 2) * (x0 - x))
    return mean, a * math.sqrt(s**2 - t**2)


@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """Euler-Maruyama on the reverse-time SDE (Song et al. 2021, eq. 6).

    The SDE for y = α x is dy = d(log α) y + α √(dσ²) z. The time variable is log(σ²+k) with k = (1/α_s² - 1)/s², so the
    diffusion coefficient of a step is v = (s²+k) log((s²+k)/(t²+k)):
    y ← (1 + log(α_t/α_s)) y + α_s² v score + α_s √v z. The last step is x ← D.
    Variance-exploding models, k = 0: x ← x + 2h (D - x) + √(2h) s z with h = log(s/t).
    Variance-preserving models, k = 1: y ← (1 + b/2) y + b score + √b z with b = ∫β dt = log((1+s²)/(1+t²)).
    From t = 1 of a rectified flow, where the interval is infinite: x ← D + t z, the exact step for a constant D.
    """

    from_infinity = True

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            if t == 0:
                x = x0
            elif is_infinite(s):
                x = x0 + t * noise()
            else:
                a = denoise.alpha(s) / denoise.alpha(t)
                k = (denoise.alpha(s) ** -2 - 1) / s**2
                v = (s**2 + k) * math.log((s**2 + k) / (t**2 + k))
                x = a * ((1 - math.log(a)) * x + (v / s**2) * (x0 - x) + math.sqrt(v) * noise())
            yield Step(t, x, x0)


@dataclass(frozen=True)
class ReverseDiffusion(Sampler):
    """The reverse diffusion sampler (Song et al. 2021, appendix E, eq. 46 and 47).

    The reverse SDE is discretised like the forward process. The last step is x ← D.
    Variance-exploding models: x ← x + (s²-t²) score + √(s²-t²) z.
    Variance-preserving models, in coordinates x/√(1+s²) with β = 1 - ᾱ_s/ᾱ_t: x ← (2 - √(1-β)) x + β score + √β z.
    """

    from_infinity = True

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            if t == 0:
                x = x0
            else:
                mean, deviation = _reverse_diffusion(denoise, x, x0, s, t)
                x = mean + deviation * noise()
            yield Step(t, x, x0)


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """Predictor-corrector sampling (Song et al. 2021, algorithms 2-5).

    The predictor steps from s to t. The corrector runs M times at t:  x ← x + ε score + √(2ε) z with
    ε = 2 c (r ‖z‖/‖score‖)². c is α_i in the paper: (α_t/α_u)², where u is the next level of the grid below t. For a
    variance-preserving model (algorithm 5) it is 1 - β_i = (1+u²)/(1+t²), and for a variance-exploding model (algorithm
    4) it is 1. It is close to 1 with a thousand steps, but not with 20.
    The norms are computed for each sample. The authors' code averages them over the batch, so an image depends on the
    other images of its batch. There is no corrector at σ = 0.
    """

    from_infinity = True

    predictor: Literal["ancestral", "reverse-diffusion", "probability-flow"] = option(
        "reverse-diffusion", "method of the predictor step"
    )
    M: int = option(1, "number of Langevin corrector steps at each level", ge=0, le=1_000_000)
    snr: float = option(0.16, "r, the signal-to-noise ratio of a corrector step", gt=0.0)

    def nfe(self, steps: int) -> int:
        return steps + self.M * (steps - 1)

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        below = [*sigmas[2:].tolist(), 0.0]  # the level that follows t
        for (s, t), u in zip(intervals(sigmas), below, strict=True):
            x0 = denoise(x, s)
            if t == 0:
                x = x0
            elif self.predictor == "probability-flow":
                x = x0 + (t / s) * (x - x0)
            elif self.predictor == "ancestral":
                x = x0 + (t / s) ** 2 * (x - x0) + t * math.sqrt(1 - (t / s) ** 2) * noise()
            else:
                mean, deviation = _reverse_diffusion(denoise, x, x0, s, t)
                x = mean + deviation * noise()
            c = (denoise.alpha(t) / denoise.alpha(u)) ** 2
            for _ in range(self.M if t > 0 else 0):
                x0 = denoise(x, t)
                score, z = (x0 - x) / t**2, noise()
                ratio = z.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1)
                step = (2 * c * (self.snr * ratio) ** 2).reshape(-1, *[1] * (x.ndim - 1))
                x = x + step * score + (2 * step).sqrt() * z
            yield Step(t, x, x0)
