"""Distance of samples to the exact posterior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from samplerbench.metrics import Accumulator, Batch, Context, Metric
from samplerbench.models import ExactPosterior, exact_posterior
from samplerbench.sampling import Observation, UserError, option


@dataclass(frozen=True)
class PosteriorDistance(Metric):
    """Sliced Wasserstein distance to exact draws of p(x₀ | y), on the exact problems (Bonneel et al. 2015).

    W₂ of the samples of one observation and as many exact draws, over random directions, divided by √(tr C/d), the
    average deviation of the posterior with covariance C. `floor` is the same distance between two sets of exact draws.
    `mean_error` is ‖m̂ - m‖/√(tr C), and `covariance_error` ‖Ĉ - C‖/‖C‖ in the Frobenius norm; `mean_floor` and
    `covariance_floor` are those of exact draws. All of them are averages over the observations. The task must have
    several samples of each observation: set its parameter `images`.
    """

    needs_features: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_truth: ClassVar[bool] = True
    min_images: ClassVar[int] = 2

    directions: int = option(128, "number of random directions", ge=1, le=100_000)

    def start(self, context: Context) -> Accumulator:
        who = f"the metric {self.label()}"
        if context.model is None or context.model.observation is None:
            raise UserError(f"{who} requires a task.")
        observation = context.model.observation
        images = observation.task.images
        if not images or (context.n and context.n < 2 * images):
            raise UserError(
                f"{who} needs several samples of each observation: set images of the task to at most half of the "
                "number of samples, as in inpaint:images=1."
            )
        return _Distances(self, exact_posterior(context.model, who), observation)


class _Distances(Accumulator):
    """Keeps all states, their numbers and the observations."""

    def __init__(self, metric: PosteriorDistance, posterior: ExactPosterior, observation: Observation) -> None:
        self.metric, self.posterior, self.observation = metric, posterior, observation
        self.parts: list[tuple[Tensor, Tensor]] = []
        self.observed: dict[int, Tensor] = {}

    def update(self, batch: Batch) -> None:
        if batch.inputs is None:
            raise UserError(f"the metric {self.metric.label()} requires a task.")
        given = batch.inputs.tensors
        self.parts.append((batch.index.cpu(), batch.states.cpu().double().flatten(1)))
        for image, y in zip(given["image"].tolist(), given["observation"].cpu(), strict=True):
            self.observed.setdefault(image, y)

    def state(self) -> dict[str, Tensor]:
        if not self.parts:
            return {}
        images = sorted(self.observed)
        return {
            "index": torch.cat([index for index, _ in self.parts]),
            "states": torch.cat([states for _, states in self.parts]),
            "images": torch.tensor(images),
            "observations": torch.stack([self.observed[i] for i in images]),
        }

    def merge(self, state: dict[str, Tensor]) -> None:
        if "index" not in state:
            return
        self.parts.append((state["index"], state["states"]))
        for image, y in zip(state["images"].tolist(), state["observations"], strict=True):
            self.observed.setdefault(image, y)

    def result(self) -> dict[str, Any]:
        if not self.parts:
            return {}
        index, states = (torch.cat(columns) for columns in zip(*self.parts, strict=True))
        order = index.argsort()  # the processes and the resumed run take the samples in another order
        index, states = index[order], states[order]
        image = self.observation.image(index)
        rows = [self._compare(states[image == one], self.observed[one], one) for one in sorted(self.observed)]
        names = ("value", "floor", "mean_error", "mean_floor", "covariance_error", "covariance_floor")
        return dict(zip(names, torch.tensor(rows, dtype=torch.float64).mean(0).tolist(), strict=True))

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
