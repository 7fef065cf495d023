"""DDPM ancestral sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step, UserError, intervals, option


@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling of denoising diffusion probabilistic models (Ho et al. 2020, algorithm 2).

    From level s to t:  x ← D + (t²/s²)(x - D) + √v z, the mean of q(x_t | x_s, x₀ = D) plus noise of variance v:
    small    v = t²(1 - t²/s²), the variance of the posterior (β̃, eq. 7);
    large    v = (α_s/α_t)² (s²-t²), the variance of the forward step (β, section 3.2), in coordinates y = α x;
    learned  log v interpolated between the two by the network's output (Nichol & Dhariwal 2021, eq. 15).
    The last step (t = 0) adds no noise. The default spacing is that of the paper's code and of the DDIM tables.
    """

    spacing = "leading"
    from_infinity = True

    variance: Literal["small", "large", "learned"] = option("small", "variance of the reverse step")

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            prediction = denoise.predict(x, s)
            x0 = prediction.x0
            x = x0 + (t / s) ** 2 * (x - x0)
            if t > 0:
                small = t**2 * (1 - (t / s) ** 2)
                large = (denoise.alpha(s) / denoise.alpha(t)) ** 2 * (s**2 - t**2)
                if self.variance == "learned":
                    if prediction.variance is None:
                        raise UserError(
                            "sampler ddpm: the model learned no variance; use variance=small or variance=large."
                        )
                    fraction = prediction.variance
                    deviation = (0.5 * (math.log(small) + fraction * math.log(large / small))).exp()
                    x = x + deviation * noise()
                else:
                    x = x + math.sqrt(small if self.variance == "small" else large) * noise()
            yield Step(t, x, x0)
