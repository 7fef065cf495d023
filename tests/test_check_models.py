"""The checks of a model: each catches the defect it is meant for, and the built-in models pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support.sound_plugins import SoundModel, Unloadable, assert_caught, failures
from torch import Tensor

from samplerbench import registry
from samplerbench.bench.setup import load_model
from samplerbench.models import Model, ModelSource
from samplerbench.models.edm import EDMPreconditioned
from samplerbench.models.exact import Exact, ExactModel
from samplerbench.sampling import Prediction
from samplerbench.sampling.denoiser import per_sample
from samplerbench.sampling.process import VARIANCE_EXPLODING
from samplerbench.testing.checks import checks_for, run_checks


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
    shared = {"documented", "picklable", "memorisation"}  # the last one warns: see test_memorisation.py
    assert {by for _, by, *_ in BROKEN_MODELS} == {c.name for c in checks_for(SoundModel())} - shared


MODELS = [e.name for e in registry.entries("model") if e.distribution == registry.OWN]


@pytest.mark.parametrize(
    "spec",
    [
        *(pytest.param(name, marks=[] if name == "digits" else [pytest.mark.slow]) for name in MODELS),
        *("exact:mixture", "exact:points", "exact:mixture,shape=1x2x2,classes=1"),
    ],
)
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
    # It does not say what it was trained on.
    of_its_data = {"clean", "denoises", "posterior-mean", "images", "memorisation"}
    assert {name for name, passed in found.items() if passed is None} == of_its_data
    assert {name for name, passed in found.items() if passed} == found.keys() - of_its_data


def test_all_that_is_built_in_is_checked() -> None:
    assert {"fid", "fid-inf", "kid", "inception-score", "precision", "recall", "label-accuracy", "gap"} <= {
        e.name for e in registry.entries("metric")
    }
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
