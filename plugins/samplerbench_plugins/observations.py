"""Samples grouped by the observation that they restore: means with standard errors, and stores of all samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from samplerbench.metrics import Accumulator, Batch, Context, Metric
from samplerbench.sampling import Guidance, ModelView, Observation, Sampler, UserError


def mean_over_observations(values: Tensor, image: Tensor) -> dict[str, float]:
    """The mean of all values, and its standard error over the observations (`mean_of_clusters`).

    Args:
        values: values of the samples, (n,) float64, n ≥ 1.
        image: the observation of each sample, (n,) int64.

    Returns:
        `value`, and `standard_error` if there is more than one observation.
    """
    numbers, row = image.unique(return_inverse=True)
    sums = torch.zeros(len(numbers), 2, dtype=torch.float64)
    return mean_of_clusters(sums.index_add(0, row, torch.stack([torch.ones_like(values), values], dim=1)))


def mean_of_clusters(sums: Tensor) -> dict[str, float]:
    """The mean of all values, and its standard error over clusters of values that are not independent of each other.

    For J clusters with sums S_j of c_j values, n in all:  SE² = J/(J - 1) Σ_j (S_j - c_j mean)²/n². If each cluster has
    one value, it is the standard deviation of the values divided by √n.

    Args:
        sums: c_j and S_j, (J, 2) float64. Clusters without a value are left out.

    Returns:
        `value`, and `standard_error` if there is more than one cluster. Empty without values.
    """
    counts, totals = sums[sums[:, 0] > 0].T
    n, clusters = float(counts.sum()), len(counts)
    if not clusters:
        return {}
    mean = float(totals.sum()) / n
    entry = {"value": mean}
    if clusters > 1:
        square = float((totals - counts * mean).square().sum())
        entry["standard_error"] = math.sqrt(clusters / (clusters - 1) * square) / n
    return entry


FEW = "set images of the task to at most half of the number of samples, as in inpaint:images=1"


@dataclass(frozen=True)
class SeveralSamples(Metric):
    """Base of metrics that need several samples of each observation."""

    needs_features: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_truth: ClassVar[bool] = True
    min_images: ClassVar[int] = 2

    def inapplicable(self, sampler: Sampler, guidance: Guidance | None, model: ModelView) -> str | None:
        if model.observation is None or model.observation.task.images:
            return None
        return f"it needs several samples of each observation; {FEW}"


def task_of(metric: Metric, context: Context) -> Observation:
    """The observations of a run for a metric that needs several samples of each of them.

    Args:
        metric: the metric.
        context: context of the metric.

    Raises:
        UserError: if the run has no task, or fewer than two samples of an observation.
    """
    who = f"the metric {metric.label()}"
    if context.model is None or context.model.observation is None:
        raise UserError(f"{who} requires a task.")
    observation = context.model.observation
    images = observation.task.images
    if not images or (context.n and context.n < 2 * images):
        raise UserError(f"{who} needs several samples of each observation; {FEW}.")
    return observation


class SampleStore(Accumulator):
    """Keeps the final states of all samples, with their indices.

    Args:
        metric: the metric, which needs several samples of each observation.
        context: context of the metric.
    """

    def __init__(self, metric: Metric, context: Context) -> None:
        self.metric, self.observation = metric, task_of(metric, context)
        self.parts: list[tuple[Tensor, Tensor]] = []

    def update(self, batch: Batch) -> None:
        self.parts.append((batch.index.cpu(), batch.states.cpu().flatten(1)))

    def state(self) -> dict[str, Tensor]:
        if not self.parts:
            return {}
        index, states = zip(*self.parts, strict=True)
        return {"index": torch.cat(index), "states": torch.cat(states)}

    def merge(self, state: dict[str, Tensor]) -> None:
        if "index" in state:
            self.parts.append((state["index"], state["states"]))

    def groups(self) -> list[tuple[int, Tensor]]:
        """The number of each real image, and the samples of its observation (k, d) float64 in the order of indices."""
        if not self.parts:
            return []
        index, states = (torch.cat(columns) for columns in zip(*self.parts, strict=True))
        order = index.argsort()  # several processes and a resumed run take the samples in another order
        image = self.observation.image(index[order])
        states = states[order].double()
        return [(one, states[image == one]) for one in image.unique().tolist()]
