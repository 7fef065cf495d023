"""The checks of a metric: each catches the defect it is meant for, and the built-in metrics pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support.sound_plugins import HigherIsBetter, Mean, SoundMetric, SoundStore, Store, assert_caught, failures
from torch import Tensor

from samplerbench import registry
from samplerbench.metrics import Accumulator, Batch, Context, Metric
from samplerbench.testing.checks import checks_for, run_checks


class UnknownLayer(SoundMetric):
    """Asks for a layer that no extractor has (Nobody 2022)."""

    layer = "pool"  # type: ignore[assignment]


class NoImages(SoundMetric):
    """Says it has a value for no image at all (Nobody 2022)."""

    min_images = 0


class GivesATensor(Mean):
    def result(self) -> dict[str, Any]:
        return super().result() | {"mean": self.total / self.n}


class NoValue(Mean):
    def result(self) -> dict[str, Any]:
        return {"distance": super().result()["value"]}


class Infinite(Mean):
    def result(self) -> dict[str, Any]:
        return {"value": float("inf")}


class MeanOfBatchMeans(Mean):
    def update(self, batch: Batch) -> None:
        self.total = self.total + batch.features.double().mean(dim=0)
        self.n += 1


class MergesUnweighted(Mean):
    def merge(self, state: dict[str, Tensor]) -> None:
        if not self.n:
            super().merge(state)
        elif int(state["n"]):
            n = self.n + int(state["n"])
            self.total, self.n = n * (self.total / self.n + state["total"] / state["n"]) / 2, n


class EmptyStateRaises(Mean):
    def merge(self, state: dict[str, Tensor]) -> None:
        if not int(state["n"]):
            raise ZeroDivisionError("no image")
        super().merge(state)


class WeighsByPosition(Mean):
    """Weight 1 + k/100 for image k."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.plain = torch.zeros_like(self.real)

    def take(self, total: Tensor, plain: Tensor, n: int) -> None:
        self.total = self.total + total + self.n / 100 * plain
        self.plain, self.n = self.plain + plain, self.n + n

    def update(self, batch: Batch) -> None:
        features, n = batch.features.double(), len(batch.features)
        weights = 1 + torch.arange(n, dtype=torch.float64)[:, None] / 100
        self.take((features * weights).sum(dim=0), features.sum(dim=0), n)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"plain": self.plain}

    def merge(self, state: dict[str, Tensor]) -> None:
        self.take(state["total"], state["plain"], int(state["n"]))


class StateIsAView(Mean):
    def update(self, batch: Batch) -> None:
        self.total += batch.features.double().sum(dim=0)
        self.n += len(batch.features)


class StateTakesAway(Mean):
    def state(self) -> dict[str, Tensor]:
        given = super().state()
        self.total, self.n = torch.zeros_like(self.real), 0
        return given


class SharedMemory(Mean):
    def state(self) -> dict[str, Tensor]:
        return super().state() | {"first": self.total[:1]}


class NoTensor(Mean):
    def state(self) -> dict[str, Any]:
        return super().state() | {"seen": self.n}


class NeedsTwo(Mean):
    def result(self) -> dict[str, Any]:
        return {"value": super().result()["value"] * (self.n - 1) / (self.n - 1 or float("nan"))}


class KeepsAll(Store):
    def state(self) -> dict[str, Tensor]:
        return {"all": torch.cat([torch.zeros(0, 64), *self.parts])}


class KeepsPairs(Store):
    def state(self) -> dict[str, Tensor]:
        features = self.features() if self.parts else torch.zeros(0, 64)
        return super().state() | {"distances": torch.cdist(features, features)}


class KeepsSilently(Mean):
    """Keeps every feature, and is no FeatureStore."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.kept = torch.zeros(0, len(self.real))

    def update(self, batch: Batch) -> None:
        super().update(batch)
        self.kept = torch.cat([self.kept, batch.features])

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"kept": self.kept}

    def merge(self, state: dict[str, Tensor]) -> None:
        super().merge(state)
        self.kept = torch.cat([self.kept, state["kept"]])


class OneForAll(Mean):
    """Its sum is the class's, and a fresh one begins it anew."""

    shared: ClassVar[dict[str, Tensor]] = {}

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.shared["total"] = self.total

    def update(self, batch: Batch) -> None:
        self.shared["total"] = self.shared["total"] + batch.features.double().sum(dim=0)
        self.total, self.n = self.shared["total"], self.n + len(batch.features)


class NeedsLabels(Mean):
    def update(self, batch: Batch) -> None:
        assert len({*batch.labels.tolist()}) > 0  # type: ignore[union-attr]
        super().update(batch)


class NeedsReal(Mean):
    def result(self) -> dict[str, Any]:
        self.context.real("fid")  # type: ignore[misc]
        return super().result()


class WritesFeatures(Mean):
    def update(self, batch: Batch) -> None:
        batch.features.mul_(2)
        self.total = self.total + batch.features.double().sum(dim=0) / 2
        self.n += len(batch.features)


class WritesReal(Mean):
    def result(self) -> dict[str, Any]:
        self.context.real_features("kid").sub_(1.0)
        return super().result()


class GlobalNoise(Mean):
    def result(self) -> dict[str, Any]:
        return {"value": super().result()["value"] + 0 * float(torch.rand(()))}


def made_of(accumulator: type[Accumulator]) -> Metric:
    """A metric that differs from the sound one in its accumulator."""

    @dataclass(frozen=True)
    class Made(SoundMetric):
        """Squared distance of the mean features, and one thing is wrong (Nobody 2022)."""

        made: ClassVar[Any] = accumulator

    Made.__name__ = Made.__qualname__ = f"With{accumulator.__name__}"
    globals()[Made.__name__] = Made  # where pickle looks for it
    return Made()


# These find no number where they look for one, so no check that compares numbers has any.
EVERY_VALUE = {"result", "better", "batch-cut", "merge", "order", "snapshot", "checkpoint", "min-images"}
EVERY_VALUE |= {"no-state", "lacking", "no-writes", "random-state"}
AFTER_A_MERGE = {"merge", "order", "snapshot", "checkpoint"}

BROKEN_METRICS: list[tuple[Metric, str, str, set[str]]] = [
    (HigherIsBetter(), "better", "it says that higher is better: real images", set()),
    (UnknownLayer(), "declared", 'layer is "pool"; it is one of fid, kid, isc, prc', EVERY_VALUE | {"memory"}),
    (NoImages(), "declared", "min_images is 0; it is a number of images, at least 1", {"min-images"}),
    (made_of(GivesATensor), "result", "cannot be written as JSON", set()),
    (made_of(NoValue), "result", 'the result has no "value": it has distance', EVERY_VALUE),
    (made_of(Infinite), "result", "the value is inf", EVERY_VALUE),
    (made_of(MeanOfBatchMeans), "batch-cut", "another cut into batches changes the value by", AFTER_A_MERGE),
    (made_of(MergesUnweighted), "merge", "merging changes the value by", AFTER_A_MERGE),
    (made_of(EmptyStateRaises), "merge", "raised ZeroDivisionError: no image", {"checkpoint"}),
    (made_of(WeighsByPosition), "order", "another order changes the value by", set()),
    (made_of(StateIsAView), "snapshot", "total changed when more images came", set()),
    (made_of(StateTakesAway), "snapshot", "taking the state changes the value by", set()),
    (made_of(SharedMemory), "checkpoint", "share memory", set()),
    (made_of(NoTensor), "checkpoint", "the state's seen is no tensor under a name", {"memory", "snapshot"}),
    (made_of(NeedsTwo), "min-images", "the value is nan", set()),
    (made_of(KeepsSilently), "memory", "the state grows by 256 bytes an image; an accumulator that keeps", set()),
    (made_of(KeepsPairs), "memory", "twice the images are 3.0 times the state", set()),
    (made_of(OneForAll), "no-state", "in turns with another the value is", AFTER_A_MERGE),
    (made_of(NeedsLabels), "lacking", "without labels it raises AttributeError", set()),
    (made_of(NeedsReal), "lacking", "without real images it raises TypeError", set()),
    (made_of(WritesFeatures), "no-writes", "it writes into features", {"order", "snapshot", "no-state"}),
    (made_of(WritesReal), "no-writes", "it writes into the real images' kid", set()),
    (made_of(GlobalNoise), "random-state", "torch's global generator", set()),
]


@pytest.mark.parametrize(("metric", "by", "says", "also"), BROKEN_METRICS, ids=[m.label() for m, *_ in BROKEN_METRICS])
def test_a_broken_metric_is_caught_by_the_check_meant_for_it(
    metric: Metric, by: str, says: str, also: set[str]
) -> None:
    assert_caught(metric, by, says, also)


@pytest.mark.parametrize("metric", [SoundMetric(), SoundStore()])
def test_the_sound_metric_passes(metric: Metric) -> None:
    assert failures(metric) == {}


def test_every_check_of_a_metric_has_teeth() -> None:
    shared = {"documented", "picklable"}  # of all kinds; see test_check_teeth
    assert {by for _, by, *_ in BROKEN_METRICS} == {c.name for c in checks_for(SoundMetric())} - shared


def test_a_metric_without_a_value_for_these_images_is_not_at_fault() -> None:
    class Nothing(Mean):
        def result(self) -> dict[str, Any]:
            return {}

    found = {r.name: r for r in run_checks(made_of(Nothing))}
    assert all(found[name].passed is None for name in ("result", "better", "merge", "checkpoint", "min-images"))
    assert found["result"].figure == "it has no value for these images: the result is {}"
    assert not [r for r in found.values() if r.passed is False]


def test_a_metric_that_needs_more_images_than_there_are_is_not_measured() -> None:
    found = {r.name: r for r in run_checks(registry.parse("metric", "inception-score:splits=800"))}
    assert found["min-images"].passed is None
    assert found["min-images"].figure == "it needs 1600 images, and at most 700 are measured here"


ELSEWHERE = ("lpips", "lpips-gap", "coverage", "posterior", "spread")
"""lpips-gap and lpips need weights and larger images than the digits; tests/test_image_gap.py and
tests/test_restoration_metrics.py test them. The others need several samples of an observation;
tests/test_inverse_runs.py and tests/test_restoration_metrics.py test them."""
METRICS = [e.name for e in registry.entries("metric") if e.distribution == registry.OWN and e.name not in ELSEWHERE]


@pytest.mark.parametrize(
    "spec", [*METRICS, "precision:k=10", "recall:k=10", "gap:images=7", "inception-score:splits=1"]
)
def test_the_built_in_metrics_pass(spec: str) -> None:
    assert failures(registry.parse("metric", spec)) == {}


def test_the_example_metric_passes() -> None:
    folder = Path(__file__).resolve().parents[1] / "plugins/examples/samplerbench-sliced-wasserstein"
    metric = registry.parse("metric", f"{folder}/samplerbench_sliced_wasserstein.py:SlicedWasserstein")
    assert failures(metric) == {}


def test_what_the_checks_measure_of_a_metric() -> None:
    found = {r.name: r.figure for r in run_checks(registry.parse("metric", "label-accuracy"))}
    assert found["declared"] == "higher is better; layer isc; at least 1 image"
    assert found["memory"] == "16 bytes for 60 images and for 120"
    assert found["lacking"] == "needs labels"
    gap = {r.name: r.figure for r in run_checks(registry.parse("metric", "gap"))}
    assert gap["lacking"] == "needs a solver, determinism"
    assert gap["better"].startswith("real images 0.00010")  # an error of 0.01, squared
