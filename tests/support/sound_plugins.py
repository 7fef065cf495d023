"""A sound metric and a sound model, and what a check finds: what the tests of the checks share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from samplerbench.metrics import Accumulator, Batch, Context, FeatureStore, Metric
from samplerbench.models import Model, ModelSource
from samplerbench.models.exact import Exact, ExactModel
from samplerbench.options import Configurable
from samplerbench.sampling import option
from samplerbench.testing.checks import run_checks


def failures(plugin: Configurable) -> dict[str, str]:
    """The checks that fail, with what they say."""
    return {r.name: r.figure for r in run_checks(plugin) if r.passed is False}


def assert_caught(plugin: Configurable, by: str, says: str, also: set[str]) -> None:
    found = failures(plugin)
    assert by in found, f"{by} lets it pass; these fail: {found}"
    assert says in found[by]
    assert found.keys() <= {by} | also, found


class Mean(Accumulator):
    """Σ features and their number."""

    def __init__(self, context: Context) -> None:
        self.context, self.real = context, context.reference.moments.mean
        self.total, self.n = torch.zeros_like(self.real), 0

    def update(self, batch: Batch) -> None:
        self.total = self.total + batch.features.double().sum(dim=0)
        self.n += len(batch.features)

    def state(self) -> dict[str, Tensor]:
        return {"total": self.total, "n": torch.tensor([self.n])}

    def merge(self, state: dict[str, Tensor]) -> None:
        self.total = self.total + state["total"]
        self.n += int(state["n"])

    def result(self) -> dict[str, Any]:
        return {"value": float((self.total / self.n - self.real).square().sum())}


@dataclass(frozen=True)
class SoundMetric(Metric):
    """Squared distance of the mean features, the first term of the FID (Heusel et al. 2017): the sound twin."""

    made: ClassVar[type[Mean]] = Mean

    def start(self, context: Context) -> Accumulator:
        return self.made(context)


class Store(FeatureStore):
    """The same, of features that are all kept."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.real = context.reference.moments.mean

    def result(self) -> dict[str, Any]:
        return {"value": float((self.features().double().mean(dim=0) - self.real).square().sum())}


class SoundStore(SoundMetric):
    """Squared distance of the mean features (Heusel et al. 2017), of features that are kept: the other sound twin."""

    made = Store


@dataclass(frozen=True)
class SoundModel(ModelSource):
    """A mixture whose denoiser is known: the sound twin of the broken ones below."""

    width: float = option(0.3, "typical standard deviation", gt=0.0)

    def load(self, device: torch.device, dtype: torch.dtype) -> Model:
        model = Exact(problem="mixture", shape="1x2x2", width=self.width).load(device, dtype)
        self.change(model)
        return model

    def change(self, model: ExactModel) -> None:
        """What is wrong with it."""


class HigherIsBetter(SoundMetric):
    """A distance that says that a larger one is better (Nobody 2022)."""

    better = "higher"


class Unloadable(SoundModel):
    """Raises while it is loaded."""

    def load(self, device: torch.device, dtype: torch.dtype) -> Model:
        raise FileNotFoundError("no weights here")
