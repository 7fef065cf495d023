"""What a metric needs is checked before anything is sampled, and the error names the metric."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from samplerbench import registry
from samplerbench.bench import engine, prepare, request, setup
from samplerbench.bench.labels import balanced_labels
from samplerbench.cli.app import main
from samplerbench.errors import UserError
from samplerbench.metrics import Accumulator, Context, Metric
from samplerbench.metrics.metric import check_requirements
from samplerbench.results.store import Store

ENOUGH: dict[str, Any] = {
    "n": 2000,
    "dimension": 64,
    "has_labels": True,
    "labels": balanced_labels(2000, [1] * 10),
    "has_real_images": True,
    "real_images": 1797,
}
BUILT_IN = ("fid", "fid-inf", "kid", "inception-score", "precision", "recall", "label-accuracy", "gap")


@pytest.mark.parametrize("name", BUILT_IN)
def test_nothing_is_lacking_in_an_ordinary_run_nor_where_nothing_is_known(name: str) -> None:
    metric = registry.parse("metric", name)
    check_requirements(metric, **ENOUGH)
    check_requirements(metric)


@pytest.mark.parametrize(
    ("spec", "lacking", "reason"),
    [
        ("fid", {"n": 1}, "n=1: the metric fid needs at least 2 images"),
        ("inception-score", {"n": 10}, "n=10: the metric inception-score needs at least 20 images"),
        ("inception-score:splits=4", {"n": 7}, "n=7: the metric inception-score needs at least 8 images"),
        ("precision:k=9", {"n": 10}, "n=10: the metric precision needs at least 11 images"),
        ("precision:k=9", {"real_images": 9}, "the metric precision needs at least 10 real images; there are 9"),
        ("recall", {"real_images": 3}, "the metric recall needs at least 4 real images; there are 3"),
        ("kid", {"real_images": 1}, "the metric kid needs at least 2 real images; there are 1"),
        *(
            (name, {"has_real_images": False}, f"the metric {name} needs the real images, and there are only their")
            for name in ("kid", "precision", "recall")
        ),
        ("label-accuracy", {"has_labels": False}, 'the metric label-accuracy needs labels: use labels="balanced"'),
        (
            "fid-inf",
            {"n": 1535},
            "the metric fid-inf needs at least 24 images per feature, 1536 for these 64",
        ),
        (
            "kid",
            {"labels": balanced_labels(12, [1] * 10)},
            'under labels="balanced", the metric kid needs at least 2 images of each class, and 8 of 12 images are',
        ),
    ],
)
def test_what_is_lacking_is_named(spec: str, lacking: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        check_requirements(registry.parse("metric", spec), **(ENOUGH | lacking))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_few_classes_with_one_image_are_no_reason_to_refuse() -> None:
    labels = torch.cat([torch.arange(5), torch.full((50,), 7)])
    check_requirements(registry.parse("metric", "kid"), labels=labels)
    with pytest.raises(UserError, match="6 of 55 images are the only one"):
        check_requirements(registry.parse("metric", "kid"), labels=torch.cat([torch.arange(6), torch.full((49,), 7)]))


@dataclass(frozen=True)
class Plain(Metric):
    """A metric of a plugin that declares nothing."""

    min_images: ClassVar[int] = 3

    def start(self, context: Context) -> Accumulator:
        raise NotImplementedError


def test_a_plugin_that_declares_nothing_needs_its_fewest_images_only() -> None:
    check_requirements(Plain(), **(ENOUGH | {"has_real_images": False, "has_labels": False}))
    with pytest.raises(UserError, match="needs at least 3 images"):
        check_requirements(Plain(), n=2)


# --- In a run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def statistics(tmp_path: Path) -> dict[str, str]:
    """Statistics of the digits' features without the images, in both formats."""
    features = np.random.default_rng(0).normal(size=(200, 64))
    np.savez(tmp_path / "real.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    with pytest.raises(SystemExit, match="0"):
        main(["stats", "digits", "--features", "digits-cnn", "--out", str(tmp_path / "real.safetensors")])
    return {kind: str(tmp_path / f"real.{kind}") for kind in ("npz", "safetensors")}


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("metric", ["kid", "recall"])
def test_a_metric_of_real_images_is_refused_beside_statistics_before_a_cell_is_sampled(
    statistics: dict[str, str],
    kind: str,
    metric: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "run_cell", lambda *_: pytest.fail("a cell was run"))
    monkeypatch.setattr(setup, "load_extractor", lambda *_: pytest.fail("the extractor was loaded"))
    arguments = ["run", "-s", "ddim", "--steps", "2", "--n", "80", "--metric", "fid", "--metric", metric]
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--data", statistics[kind], "--out", str(tmp_path / "out")])
    assert f"the metric {metric} needs the real images" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--n", "10", "--metric", "inception-score"], "--n 10: the metric inception-score needs at least 20 images"),
        (["--n", "200", "--metric", "fid-inf"], "1536 for these 64 features"),
        (["--n", "15", "--metric", "kid"], "are the only one of their class"),
        (["--n", "40", "--metric", "label-accuracy", "--labels", "none"], "the metric label-accuracy needs labels"),
    ],
)
def test_a_run_that_lacks_something_ends_before_a_cell_is_sampled(
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The dry run ends with the same words."""
    monkeypatch.setattr(engine, "run_cell", lambda *_: pytest.fail("a cell was run"))
    said = []
    for more in ([], ["--dry-run"]):
        with pytest.raises(SystemExit, match="2"):
            main(["run", "-s", "ddim", "--steps", "2", *arguments, *more, "--out", str(tmp_path)])
        said.append(capsys.readouterr().err)
    assert reason in said[0]
    assert said[1] == said[0]


@pytest.fixture
def odd_data(tmp_path: Path, statistics: dict[str, str]) -> dict[str, str]:
    """Data that an 8x8 grey model with 64 features cannot be measured against, by what is wrong with it."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "colour.npz", images=pixels)
    np.savez(tmp_path / "few.npz", images=pixels[:2, :8, :8, 0])
    np.savez(tmp_path / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    names = ("colour", "few", "wide", "other", "nothere")
    return {name: str(tmp_path / f"{name}.npz") for name in names} | {"statistics": statistics["safetensors"]}


@pytest.mark.parametrize(
    ("data", "metric", "reason"),
    [
        ("statistics", "kid", "the metric kid needs the real images"),
        ("colour", "fid", "are 16x16 RGB, and the model makes 8x8 grey images"),
        ("few", "recall", "the metric recall needs at least 4 real images; there are 2"),
        ("wide", "fid", "statistics of 7 features, but digits-cnn has 64"),
        ("other", "fid", "holds no images"),
        ("nothere", "fid", "no data set"),
    ],
)
def test_a_dry_run_refuses_the_data_that_the_run_refuses(
    odd_data: dict[str, str],
    data: str,
    metric: str,
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "run_cell", lambda *_: pytest.fail("a cell was run"))
    base = ["run", "-s", "ddim", "--steps", "2", "--n", "80", "--metric", metric, "--data", odd_data[data]]
    base += ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        main(base)
    refused = capsys.readouterr().err
    assert reason in refused
    monkeypatch.setattr(setup, "load_extractor", lambda *_: pytest.fail("the extractor was loaded"))
    with pytest.raises(SystemExit, match="2"):
        main([*base, "--dry-run"])
    assert capsys.readouterr().err == refused


def test_a_dry_run_counts_the_images_that_the_run_takes(
    statistics: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for data, n in (("digits", 1797), (statistics["safetensors"], 1797), (statistics["npz"], 50_000)):
        asked = request.Request([request.Grid(["ddim"], [2])], data=data)
        prepared = prepare.prepare(asked, "cpu")
        assert prepare.check_measurement(prepared) == prepare.measure_reference(prepared).n == n


def test_statistics_with_images_beside_them_do(tmp_path: Path) -> None:
    """guided-diffusion's files hold both."""
    features = np.random.default_rng(0).normal(size=(200, 64))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "both.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False), arr_0=pixels)
    asked = request.Request(
        [request.Grid(["ddim"], [2])], n=40, metrics=("fid", "kid"), data=str(tmp_path / "both.npz")
    )
    prepared = prepare.prepare(asked, "cpu")
    measured = prepare.measure_reference(prepared)
    assert measured.real is not None
    assert measured.real("kid").shape == (30, 64)
    prepare.make_session(prepared, measured, 0, Store(tmp_path / "out"))
