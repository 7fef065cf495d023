"""Several samples of each observation: how much they differ, and whether the truth lies among them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from samplerbench.metrics import Accumulator, Context
from samplerbench.sampling import option
from samplerbench_plugins.observations import SampleStore, SeveralSamples, mean_over_observations

ROUNDING = 1e-5
"""A value this close to the interval is inside of it. A pixel that is known exactly has an interval of zero width."""


@dataclass(frozen=True)
class Spread(SeveralSamples):
    """Standard deviation of each pixel over the samples of one observation (this work), the mean over pixels.

    The unit is that of images in [-1, 1]. The states are measured before they are quantised. The value is neither
    better lower nor better higher: it is to be compared with that of the posterior, which `exact` samples on the exact
    problems. The entry `error` is the root mean square of x₀ - x̄, with the truth x₀ and the mean x̄ of the K samples.
    For draws of the posterior it is √(1 + 1/K) times the root mean square of the deviation. The standard error is over
    the observations. The task must have several samples of each observation: set its parameter `images`.
    """

    prefers_real_images: ClassVar[bool] = False

    def start(self, context: Context) -> Accumulator:
        return _Spread(self, context)


class _Spread(SampleStore):
    def result(self) -> dict[str, Any]:
        if not (groups := self.groups()):
            return {}
        truth = self.observation.images.cpu().double().flatten(1)
        rows = [[s.std(0).mean(), (s.mean(0) - truth[image]).square().mean()] for image, s in groups]
        spreads, errors = torch.tensor(rows, dtype=torch.float64).T
        number = torch.tensor([image for image, _ in groups])
        return mean_over_observations(spreads, number) | {"error": math.sqrt(float(errors.mean()))}


@dataclass(frozen=True)
class Coverage(SeveralSamples):
    """How often the truth lies in the central interval of the samples of its observation, for each pixel (this work).

    With K samples of an observation, sorted for each pixel, the interval is from the a-th smallest to the a-th largest
    one, where a = max(1, ⌊(K + 1)(1 - level)/2⌋). The truth and draws of the posterior are
    exchangeable. So the truth has each rank with probability 1/(K + 1), and is in the interval with the probability
    `expected` = 1 - 2a/(K + 1), which is `level` for K = 19 and level = 0.9. A lower value means that the samples
    differ too little from each other or are in the wrong place; a higher one, that they differ too much.

    The value is the mean over pixels and observations. The standard error is over the observations, because the pixels
    of one image are not independent. The states are measured before they are quantised. The task must have several
    samples of each observation: set its parameter `images`.
    """

    better: ClassVar[Literal["lower", "higher"]] = "higher"

    level: float = option(0.9, "nominal probability of the interval", gt=0.0, lt=1.0)

    def start(self, context: Context) -> Accumulator:
        return _Coverage(self, context)

    def rank(self, samples: int) -> int:
        """a, the rank of the lower end of the interval of so many samples."""
        # Rounding of 1 - level must not make an interval one rank wider.
        return max(1, math.floor((samples + 1) * (1 - self.level) / 2 + 1e-9))


class _Coverage(SampleStore):
    metric: Coverage

    def result(self) -> dict[str, Any]:
        if not (groups := self.groups()):
            return {}
        truth = self.observation.images.cpu().double().flatten(1)
        shares, expected = [], []
        for image, states in groups:
            samples, rank = len(states), self.metric.rank(len(states))
            low, high = (states.kthvalue(k, dim=0).values for k in (rank, samples + 1 - rank))
            inside = (truth[image] >= low - ROUNDING) & (truth[image] <= high + ROUNDING)
            shares.append(float(inside.double().mean()))
            expected.append(1 - 2 * rank / (samples + 1))
        entry = mean_over_observations(torch.tensor(shares, dtype=torch.float64), torch.arange(len(shares)))
        return entry | {"expected": sum(expected) / len(expected)}
