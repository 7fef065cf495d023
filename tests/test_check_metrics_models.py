"""`samplerbench check` on metrics and models: each broken one is caught by the check meant for it, and no sound one is.

Each broken plugin is one change to a sound twin. `also` names the other checks that its fault may rightly fail.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from samplerbench import cli, registry, testing
from samplerbench.bench.setup import load_model
from samplerbench.metrics import Accumulator, Batch, Context, FeatureStore, Metric
from samplerbench.models import Model, ModelSource
from samplerbench.models.edm import EDMPreconditioned
from samplerbench.models.exact import Exact, ExactModel
from samplerbench.options import Configurable
from samplerbench.sampling import Prediction, UserError, option
from samplerbench.sampling.denoiser import per_sample
from samplerbench.sampling.process import VARIANCE_EXPLODING
from samplerbench.testing.checks import KINDS, CheckFailedError, checks_for, run_check, run_checks


def failures(plugin: Configurable) -> dict[str, str]:
    """The checks that fail, with what they say."""
    return {r.name: r.figure for r in run_checks(plugin) if r.passed is False}


def assert_caught(plugin: Configurable, by: str, says: str, also: set[str]) -> None:
    found = failures(plugin)
    assert by in found, f"{by} lets it pass; these fail: {found}"
    assert says in found[by]
    assert found.keys() <= {by} | also, found


# --- Metrics --------------------------------------------------------------------------------------------------------


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


class HigherIsBetter(SoundMetric):
    """A distance that says that a larger one is better (Nobody 2022)."""

    better = "higher"


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


METRICS = [e.name for e in registry.entries("metric") if e.distribution == registry.OWN]


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


# --- Models ---------------------------------------------------------------------------------------------------------


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


def changed(name: str, change: Callable[[ExactModel], None]) -> ModelSource:
    """A model that differs from the sound one in what `change` does to it."""

    @dataclass(frozen=True)
    class Changed(SoundModel):
        """A mixture whose denoiser is known, and one thing is wrong with it."""

        def change(self, model: ExactModel) -> None:
            change(model)

    Changed.__name__ = Changed.__qualname__ = name
    globals()[name] = Changed
    return Changed()


def predicting(name: str, change: Callable[..., Tensor]) -> ModelSource:
    """A model whose D is change(D as a function of (x, σ, condition), x, σ, condition)."""

    def put(model: ExactModel) -> None:
        sound = model.evaluate

        def evaluate(x: Tensor, sigma: Any, condition: Any) -> Prediction:
            return Prediction(change(lambda *asked: sound(*asked).x0, x, sigma, condition))

        model.evaluate = evaluate  # type: ignore[method-assign]

    return changed(name, put)


def setting(name: str, **attributes: Any) -> ModelSource:
    return changed(name, lambda model: vars(model).update(attributes))


class Unloadable(SoundModel):
    """Raises while it is loaded."""

    def load(self, device: torch.device, dtype: torch.dtype) -> Model:
        raise FileNotFoundError("no weights here")


class GivesTheNetwork(SoundModel):
    """Gives a network for a model."""

    def load(self, device: torch.device, dtype: torch.dtype) -> Any:
        return super().load(device, dtype).network


class AnotherEachTime(SoundModel):
    """Weights that are drawn anew each time."""

    loaded: ClassVar[list[int]] = []

    def load(self, device: torch.device, dtype: torch.dtype) -> Model:
        self.loaded.append(0)
        made = Exact(problem="mixture", shape="1x2x2", seed=len(self.loaded)).load(device, dtype)
        made.identity["weights"] = "0" * 64
        made.identity["source"] = "another"
        return made


def shuffled_rows(model: ExactModel) -> None:
    """Every row gets the first one's label."""
    sound = model.condition
    model.condition = lambda inputs: sound(inputs.rows(torch.zeros(len(inputs), dtype=torch.int64)))  # type: ignore


def never_called(model: ExactModel) -> None:
    called = model.network
    model.evaluate = lambda x, s, c: Prediction(called(x, per_sample(s, x), c.get("labels")).float())  # type: ignore
    model.network = torch.nn.Identity().eval()


def writes_the_state(D: Any, x: Tensor, sigma: Any, condition: Any) -> Tensor:
    return D(x.mul_(1 + 2e-7), sigma, condition)


def tracks_gradients(D: Any, x: Tensor, sigma: Any, condition: Any) -> Tensor:
    with torch.enable_grad():
        return D(x, sigma, condition) + 0 * x


def rises_between_levels(D: Any, x: Tensor, sigma: Any, condition: Any) -> Tensor:
    off = not isinstance(sigma, Tensor) and sigma not in ITS_LEVELS
    return D(x, sigma, condition) * (float("nan") if off else 1)


def leaving(low: float, high: float) -> Callable[..., Tensor]:
    """D = x between two levels."""

    def change(D: Any, x: Tensor, sigma: Any, condition: Any) -> Tensor:
        level = per_sample(sigma, x).reshape(-1, 1, 1, 1)
        return torch.where((level > low) & (level < high), x, D(x, sigma, condition))

    return change


def two_evaluations(D: Any, x: Tensor, sigma: Any, condition: Any) -> Tensor:
    return (D(x, sigma, condition) + D(x, sigma, condition)) / 2


def one_level_for_all(D: Any, x: Tensor, sigma: Any, condition: Any) -> Tensor:
    return D(x, float(sigma.max()) if isinstance(sigma, Tensor) else sigma, condition)


LEVELS = SoundModel().load(torch.device("cpu"), torch.float32).levels
ITS_LEVELS = set(LEVELS.tolist())
NEEDS_A_MODEL = {c.name for c in checks_for(SoundModel())} - {"documented", "picklable", "loads"}
OF_D = {"clean", "denoises", "top", "posterior-mean"}

BROKEN_MODELS: list[tuple[ModelSource, str, str, set[str]]] = [
    (Unloadable(), "loads", "raised FileNotFoundError: no weights here", set()),
    (GivesTheNetwork(), "loads", "load() gives a MixtureDenoiser, not a samplerbench.models.Model", set()),
    (
        changed("Training", lambda m: m.network.add_module("drop", torch.nn.Dropout(0.1))),
        "loads",
        "drop: in training mode; call .eval() on the network",
        set(),
    ),
    (setting("FlatShape", shape=4), "loads", "shape is 4; it is (C, H, W)", NEEDS_A_MODEL),
    (setting("SingleLevels", levels=LEVELS.float()), "levels", "levels is torch.float32", set()),
    (
        setting("Falling", levels=LEVELS.flip(0)),
        "levels",
        "levels does not increase at 0",
        OF_D | {"prior", "denoises"},
    ),
    (setting("Zero", levels=torch.cat([torch.zeros(1).double(), LEVELS])), "levels", "not above 0", NEEDS_A_MODEL),
    (setting("Nameless", identity={"source": "", "weights": "0" * 64}), "identity", 'no "source"', set()),
    (setting("Hashless", identity={"source": "x", "weights": "latest"}), "identity", "'latest'; it is a", set()),
    (AnotherEachTime(), "reload", "loaded again its D differs by", set()),
    (predicting("Flat", lambda D, *a: D(*a).flatten(1)), "shape", "D of (1, 1, 2, 2) is (1, 4)", NEEDS_A_MODEL),
    (predicting("Doubles", lambda D, *a: D(*a).double()), "shape", "state is torch.float64", set()),
    (predicting("OnlyItsLevels", rises_between_levels), "finite", "is not finite", {"posterior-mean"}),
    (
        predicting("BatchMean", lambda D, *a: D(*a) + 0.05 * D(*a).mean(dim=0)),
        "batch-split",
        "with the batch it is in",
        NEEDS_A_MODEL,
    ),
    (predicting("OneLevelForAll", one_level_for_all), "sigma", "where σ is given as a tensor, or to each row", set()),
    (
        predicting("Noisy", lambda D, *a: D(*a) + 1e-6 * torch.randn_like(a[0])),
        "deterministic",
        "asked twice",
        {"reload"},
    ),
    (
        predicting("WritesTheState", writes_the_state),
        "no-writes",
        "it writes into the state",
        {"reload", "deterministic"},
    ),
    (predicting("TracksGradients", tracks_gradients), "gradients", "D tracks gradients where they are off", set()),
    (predicting("AsksTwice", two_evaluations), "nfe", "2 evaluations an image are counted for one D", set()),
    (changed("NeverCalled", never_called), "nfe", "0 evaluations an image are counted for one D", set()),
    (setting("NotPreserving", prior=lambda z, sigma: sigma * z), "prior", "σ² + 1 (the process is", set()),
    (
        setting("SaysExploding", process=VARIANCE_EXPLODING, prior=lambda z, s: (1 + s**2) ** 0.5 * z),
        "prior",
        "",
        set(),
    ),
    (setting("Bent", prior=lambda z, s: s * z.tanh()), "prior", "not linear in z", set()),
    (predicting("IgnoresX", lambda D, x, s, c: D(0 * x, 100.0, c) + 0 * x), "clean", "σ from the real image", OF_D),
    (
        predicting("StopsHalfWay", leaving(0.7, 50)),
        "denoises",
        "from the real image, the state or the mean",
        {"posterior-mean", "sigma", "labels", "null"},
    ),
    (
        predicting("KeepsNoise", leaving(50, 1e9)),
        "top",
        "varies by",
        {"sigma", "labels", "null"},
    ),
    (predicting("WrongLevel", lambda D, x, s, c: D(x, 1.15 * s, c)), "posterior-mean", "x₀ - D goes with x", set()),
    (predicting("LabelBlind", lambda D, x, s, c: D(x, s, {})), "labels", "the labels change nothing", {"null"}),
    (changed("FirstLabel", shuffled_rows), "labels", "a label changes the D of another row", NEEDS_A_MODEL),
    (setting("AnyLabel", check_inputs=lambda inputs: None), "labels", "the label 2 is not refused", set()),
    (
        setting("NullIsZero", null_condition=lambda inputs: {"labels": torch.zeros(len(inputs), dtype=torch.int64)}),
        "posterior-mean",
        "x₀ - D goes with x",
        set(),
    ),
    (
        predicting("Unlabelled", lambda D, x, s, c: D(x, s, {} if len(x) > 3 else c)),
        "null",
        "both at once differ from each alone by",
        {"batch-split", "sigma", "denoises", "posterior-mean", "labels"},
    ),
    (setting("Halves", decode=lambda x: x[..., ::2, ::2]), "images", "are decoded to (4, 1, 1, 1)", set()),
    (
        setting("RealStranger", real=lambda n: (torch.zeros(n, 3, 2, 2), None)),
        "images",
        "4 real images are (4, 3, 2, 2)",
        OF_D | {"prior"},
    ),
]


@pytest.mark.parametrize(("model", "by", "says", "also"), BROKEN_MODELS, ids=[m.label() for m, *_ in BROKEN_MODELS])
def test_a_broken_model_is_caught_by_the_check_meant_for_it(
    model: ModelSource, by: str, says: str, also: set[str]
) -> None:
    assert_caught(model, by, says, also)


def test_the_sound_model_passes() -> None:
    assert failures(SoundModel()) == {}


def test_every_check_of_a_model_has_teeth() -> None:
    shared = {"documented", "picklable"}
    assert {by for _, by, *_ in BROKEN_MODELS} == {c.name for c in checks_for(SoundModel())} - shared


MODELS = [e.name for e in registry.entries("model") if e.distribution == registry.OWN]


@pytest.mark.parametrize("spec", [*MODELS, "exact:mixture", "exact:points", "exact:mixture,shape=1x2x2,classes=1"])
def test_the_built_in_models_pass(spec: str) -> None:
    assert failures(registry.parse("model", spec)) == {}


def test_an_adapter_of_a_network_with_labels_passes(tmp_path: Path) -> None:
    """EDM's preconditioning around a random network: what a checkpoint's adapter owes, whatever the weights."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        num_class_embeds=4,
    )
    EDMPreconditioned.around(network.eval(), sigma_data=0.7, null_label=3).save_pretrained(tmp_path)

    @dataclass(frozen=True)
    class Folder(ModelSource):
        """The model in a folder."""

        def load(self, device: torch.device, dtype: torch.dtype) -> Model:
            return load_model(str(tmp_path), device, "fp32")

    globals()["Folder"] = Folder
    Folder.__qualname__ = "Folder"
    found = {r.name: r.passed for r in run_checks(Folder())}
    of_its_data = {"clean", "denoises", "posterior-mean", "images"}  # it does not say what it was trained on
    assert {name for name, passed in found.items() if passed is None} == of_its_data
    assert {name for name, passed in found.items() if passed} == found.keys() - of_its_data


def test_all_that_is_built_in_is_checked() -> None:
    assert {"fid", "fid-inf", "kid", "inception-score", "precision", "recall", "label-accuracy", "gap"} <= set(METRICS)
    assert {"digits", "exact"} <= set(MODELS)


def test_what_the_checks_measure_of_a_model() -> None:
    found = {r.name: (r.passed, r.figure) for r in run_checks(registry.parse("model", "exact:gaussian"))}
    assert found["levels"] == (True, "1000, σ from 0.01 to 157.4")
    assert found["nfe"] == (True, "1 for each D")
    assert found["prior"] == (True, "σ² + 0.0925 at σ = 1")  # a Gaussian's runs start from its exact marginal
    assert found["labels"] == (None, "it has no labels")
    (clean,) = [c for c in checks_for(registry.parse("model", "exact:points")) if c.name == "clean"]
    assert clean() == "0 from it at σ = 0.01; 0.00 σ at most"


def test_a_model_that_does_not_load_is_one_failure() -> None:
    found = {r.name: r.passed for r in run_checks(Unloadable())}
    assert [name for name, passed in found.items() if passed is False] == ["loads"]
    assert all(found[name] is None for name in NEEDS_A_MODEL)


# --- In a plugin's own tests ----------------------------------------------------------------------------------------


@testing.parametrize_with_checks(["fid", SoundMetric()], kind="metric")
def test_the_checks_of_a_metric_as_a_parametrisation(check: Callable[[], str]) -> None:
    assert check()


def test_check_functions_raise_all_failures() -> None:
    assert [r.name for r in testing.check_metric("fid")] == [c.name for c in checks_for(SoundMetric())]
    assert all(r.passed is not False for r in testing.check_model(SoundModel()))
    with pytest.raises(CheckFailedError, match=r"HigherIsBetter fails 1 of 16 checks: better: "):
        testing.check_metric(HigherIsBetter())
    with pytest.raises(CheckFailedError, match=r"Unloadable fails 1 of 22 checks: loads: "):
        testing.check_model(Unloadable())


# --- The command ----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


BROKEN = '''
    from dataclasses import dataclass

    from samplerbench.metrics import Accumulator, Metric
    from samplerbench.models import ModelSource
    from samplerbench.sampling import Generator, Guidance, Sampler, Spacing, Step, option


    @dataclass(frozen=True)
    class Fine{base}({base}):
        """One line that says what it is (this work)."""

        def start(self, context): ...
        def load(self, device, dtype): ...
        def predict(self, denoise, x, sigma): ...
        def images(self, index, inputs, seed): ...
        def grid(self, levels, steps): ...
        def steps(self, denoise, x, sigmas, noise): yield Step(0.0, x)


    @dataclass(frozen=True)
    class Silent(Fine{base}):
        size: int = option(3, "how large", ge=1)


    @dataclass(frozen=True)
    class Default(Fine{base}):
        """Its default is out of its own bounds (this work)."""

        eta: float = option(2.0, "how much", ge=0.0, le=1.0)


    @dataclass(frozen=True)
    class Raising(Fine{base}):
        """It cannot be made (this work)."""

        def __post_init__(self):
            raise RuntimeError("no licence")


    class Nothing:
        """No plugin."""
'''
BASES = {
    "sampler": "Sampler",
    "guidance": "Guidance",
    "spacing": "Spacing",
    "generator": "Generator",
    "metric": "Metric",
    "model": "ModelSource",
}
TAKEN = {
    "sampler": "ddim",
    "guidance": "cfg",
    "spacing": "karras",
    "generator": "autoencoder-prior",
    "metric": "fid",
    "model": "exact",
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installed distributions whose plugins are broken in every way, one distribution of each kind."""
    site = tmp_path_factory.mktemp("broken")
    for kind, base in BASES.items():
        module = f"broken_{kind}"
        (site / f"{module}.py").write_text(textwrap.dedent(BROKEN.replace("{base}", base)), "utf-8")
        info = site / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: broken-{kind}\nVersion: 1.0\n", "utf-8")
        points = {f"{kind}-{name.lower()}": f"{module}:{name}" for name in ("Silent", "Default", "Raising", "Nothing")}
        points |= {TAKEN[kind]: f"{module}:Fine{base}", f"{kind}-sick": f"sick_{kind}:Sick"}
        lines = [f"[{registry.group_of(kind)}]", *(f"{name} = {value}" for name, value in points.items()), ""]
        (info / "entry_points.txt").write_text("\n".join(lines), "utf-8")
        (site / f"sick_{kind}.py").write_text("import no_such_module\n", "utf-8")
    return site


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "{kind}-sick",
            "the {kind} {kind}-sick of broken-{kind} 1.0 cannot be imported: ModuleNotFoundError: No module",
        ),
        ("{taken}", 'the {kind} name "{taken}" is registered twice, by broken-{kind} 1.0 '),
        ("{kind}-nothing", "the {kind} {kind}-nothing of broken-{kind} 1.0 is not a samplerbench."),
        ("{kind}-default", "{kind} {kind}-default: eta=2: input should be less than or equal to 1."),
        ("{kind}-raising", "the {kind} {kind}-raising cannot be created: RuntimeError: no licence"),
    ],
    ids=["import-error", "collision", "wrong-base", "bad-default", "raises"],
)
@pytest.mark.parametrize("kind", ["sampler", "metric", "model"])  # each command takes a tenth of a second
def test_a_broken_plugin_is_one_clear_line(
    broken: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    name: str,
    says: str,
) -> None:
    monkeypatch.syspath_prepend(broken)
    monkeypatch.setenv("SAMPLERBENCH_DEBUG", "")
    words = {"kind": kind, "taken": TAKEN[kind]}
    assert command("check", name.format(**words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("samplerbench: " + says.format(**words))
    assert err.count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_docstring_is_a_failed_check_of_any_kind(
    broken: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.syspath_prepend(broken)
    (documented,) = [c for c in checks_for(registry.parse(kind, f"{kind}-silent")) if c.name == "documented"]
    result = run_check(documented)
    assert (result.passed, result.figure) == (False, "the class has no docstring")


def test_every_other_command_works_beside_broken_plugins(
    broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(broken)
    assert command("check", "recall", "trailing", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert {(r["kind"], r["spec"]) for r in told} == {("metric", "recall"), ("spacing", "trailing")}
    assert command("show", "label-accuracy") == 0
    assert "Ravuri" in capsys.readouterr().out


def test_check_prints_what_it_measured_of_a_metric_and_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("check", "label-accuracy", "exact:mixture,shape=1x2x2") == 0
    out = capsys.readouterr().out
    assert [line.strip() for line in out.splitlines() if line.startswith(KINDS)] == [
        "metric label-accuracy", "model exact/mixture:shape=1x2x2",
    ]  # fmt: skip
    assert "real images 1, noise 0.1" in out
    assert "1 for each D, 2 for both" in out
    assert "FAILED" not in out


def test_a_file_s_class_is_checked_as_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = """
        from dataclasses import dataclass

        from samplerbench.metrics import FeatureStore, Metric


        @dataclass(frozen=True)
        class Grey(Metric):
            '''The mean of all pixels (this work), with the wrong direction: noise is lighter than digits.'''

            better = "higher"

            def start(self, context):
                return Pixels()


        class Pixels(FeatureStore):
            def update(self, batch):
                self.parts.append(batch.images.double().mean(dim=(1, 2, 3)))

            def result(self):
                return {"value": float(self.features().mean())}
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grey.py").write_text(textwrap.dedent(source), "utf-8")
    assert command("check", "./grey.py:Grey", "--json") == 1
    told = {r["check"]: r for r in json.loads(capsys.readouterr().out)}
    assert {r["kind"] for r in told.values()} == {"metric"}
    assert [name for name, r in told.items() if r["passed"] is False] == ["better"]
    assert told["memory"]["figure"] == "keeps what it sees: 8 bytes an image"


def test_a_name_of_several_kinds_is_checked_as_each_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "twins-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: twins\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text(
        f"[samplerbench.metrics]\ntwin = {__name__}:TwinMetric\n[samplerbench.models]\ntwin = {__name__}:TwinModel\n",
        "utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert command("check", "twin", "--json") == 0
    assert {r["kind"] for r in json.loads(capsys.readouterr().out)} == {"metric", "model"}
    assert command("check", "twin", "--kind", "metric", "--json") == 0
    assert {r["kind"] for r in json.loads(capsys.readouterr().out)} == {"metric"}
    assert command("check", "twin", "--kind", "sampler") == 2
    assert 'no sampler is called "twin".' in capsys.readouterr().err


class TwinMetric(SoundMetric):
    """Squared distance of the mean features (Heusel et al. 2017); a model has its name too."""


class TwinModel(SoundModel):
    """A mixture whose denoiser is known; a metric has its name too."""


def test_a_data_set_has_no_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("check", "cifar10") == 2
    assert "cifar10 is a data set, which has no checks; the kinds with checks are sampler," in capsys.readouterr().err
    with pytest.raises(UserError, match="a data set has no checks"):
        checks_for(registry.parse("data set", "digits"))
