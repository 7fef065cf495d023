"""Distance of samples to the exact posterior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplerbench.metrics import Accumulator, Context
from samplerbench.models import exact_posterior
from samplerbench.sampling import Inputs, option
from samplerbench_plugins.observations import SampleStore, SeveralSamples, mean_over_observations, task_of


@dataclass(frozen=True)
class PosteriorDistance(SeveralSamples):
    """Sliced Wasserstein distance to exact draws of p(x₀ | y), on the exact problems (Bonneel et al. 2015).

    W₂ of the samples of one observation and as many exact draws, over random directions, divided by √(tr C/d), the
    average deviation of the posterior with covariance C. `floor` is the same distance between two sets of exact draws.
    `mean_error` is ‖m̂ - m‖/√(tr C), and `covariance_error` ‖Ĉ - C‖/‖C‖ in the Frobenius norm; `mean_floor` and
    `covariance_floor` are those of exact draws. All of them are averages over the observations. `standard_error` is
    that of the value over the observations, and `mean_error_standard_error` that of the error of the mean. The task
    must have several samples of each observation: set its parameter `images`.
    """

    directions: int = option(128, "number of random directions", ge=1, le=100_000)

    def start(self, context: Context) -> Accumulator:
        task_of(self, context)
        return _Distances(self, context)


class _Distances(SampleStore):
    metric: PosteriorDistance

    def __init__(self, metric: PosteriorDistance, context: Context) -> None:
        super().__init__(metric, context)
        assert context.model is not None
        self.posterior = exact_posterior(context.model, f"the metric {metric.label()}")

    def result(self) -> dict[str, Any]:
        if not (groups := self.groups()):
            return {}
        number = torch.tensor([image for image, _ in groups])
        y = self.observation.extend(number, Inputs(len(number))).tensors["observation"]
        rows = [self._compare(states, one, image) for (image, states), one in zip(groups, y, strict=True)]
        values = torch.tensor(rows, dtype=torch.float64).T
        names = ("floor", "mean_error", "mean_floor", "covariance_error", "covariance_floor")
        entry = mean_over_observations(values[0], number) | dict(zip(names, values[1:].mean(1).tolist(), strict=True))
        for name, column in (("mean_error", values[2]), ("covariance_error", values[4])):
            if (error := mean_over_observations(column, number).get("standard_error")) is not None:
                entry[f"{name}_standard_error"] = error
        return entry

    def _compare(self, states: Tensor, y: Tensor, number: int) -> list[float]:
        """Compare the samples (n, d) of one observation with exact draws."""
        device = self.posterior.matrix.device
        moments = self.posterior.moments(y.to(device))
        mean, covariance = moments.mean.cpu(), moments.covariance.cpu()
        first, second = (self.posterior.draws(y.to(device), len(states), 2 * number + k).cpu() for k in (0, 1))
        size = float(covariance.trace())
        generator = torch.Generator().manual_seed(0)
        axes = torch.randn(len(mean), self.metric.directions, generator=generator, dtype=torch.float64)
        axes = axes / axes.norm(dim=0)

        def distance(a: Tensor, b: Tensor) -> float:
            sorted_a, sorted_b = ((t @ axes).sort(dim=0).values for t in (a, b))
            return float((sorted_a - sorted_b).square().mean().sqrt()) / (size / len(mean)) ** 0.5

        def errors(a: Tensor) -> tuple[float, float]:
            off = float((a.mean(0) - mean).norm()) / size**0.5
            return off, float((a.T.cov() - covariance).norm() / covariance.norm())

        (m, c), (m_floor, c_floor) = errors(states), errors(second)
        return [distance(states, first), distance(second, first), m, m_floor, c, c_floor]
