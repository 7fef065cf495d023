"""The included model of MNIST: what works without MNIST's files, and what says that it needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU
from support.denoising import denoiser
from support.mnist import write_mnist

import samplerbench
from samplerbench import cli
from samplerbench.assets import REFERENCES, asset
from samplerbench.bench import setup
from samplerbench.data import load_data
from samplerbench.data.named import ROOT_VARIABLE
from samplerbench.errors import UserError
from samplerbench.metrics.extractors import load_extractor
from samplerbench.metrics.reference import load_reference, measure
from samplerbench.models import Model


@pytest.fixture(autouse=True)
def no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MNIST's files are not there."""
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "absent"))


@pytest.fixture(scope="module")
def model() -> Model:
    return setup.load_model("mnist", CPU, "fp32")


def test_the_model_is_complete(model: Model) -> None:
    assert (model.shape, model.classes, model.null) == ((1, 28, 28), 10, True)
    assert model.identity["source"] == "mnist"
    assert model.class_counts is not None
    assert sum(model.class_counts) == 60_000
    assert setup.default_n(model, 60_000) == 10_000
    assert (Path(model.classifier_folder) / "config.json").exists()


def test_the_committed_network_with_a_learned_variance_continues_that_model(model: Model) -> None:
    """Its mean stays near that of `mnist`, and the learned variance is inside [β̃, β], but at neither end."""
    learned = samplerbench.load_model("benchmarks/models/mnist-learned-variance", device="cpu")
    assert (learned.learned_variance, learned.data) == (True, "mnist:split=train")
    x0, labels = torch.zeros(4, 1, 28, 28), torch.tensor([0, 3, 5, 9])
    x0[:, :, 8:20, 12:16] = 1
    x = x0 + torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    own, other = (denoiser(each, labels, 4).predict(x, 1.0) for each in (learned, model))
    assert float((own.x0 - other.x0).square().mean()) < 0.05 * float(other.x0.square().mean())
    assert own.variance is not None
    assert 0.1 < float(own.variance.mean()) < 0.9


@pytest.mark.parametrize(("split", "n"), [("train", 60_000), ("test", 10_000)])
def test_fid_is_measured_without_the_files(model: Model, split: str, n: int, tmp_path: Path) -> None:
    """The statistics of both splits belong to the included feature network, and each record says which it is."""
    [record] = samplerbench.evaluate(
        "ddim", steps=1, n=16, model=model, data=f"mnist:split={split}", metrics=["fid", "label-accuracy"], out=tmp_path
    )
    assert record["protocol_fields"]["reference"]["split"] == split
    assert record["protocol_fields"]["reference"]["n"] == n
    assert record["metrics"]["fid"]["value"] > 0
    assert 0 <= record["metrics"]["label-accuracy"]["value"] <= 1


def test_the_training_images_are_the_default_reference(model: Model) -> None:
    extractor = load_extractor("mnist-cnn", CPU)
    found = setup.pick_reference(model, None, extractor)
    assert found.data == load_reference(asset(REFERENCES["mnist-cnn", "mnist"])).data
    assert (found.data["split"], found.data["n"]) == ("train", 60_000)
    assert not setup.has_real_images(model, None)


def test_statistics_are_used_with_their_own_weights_only(model: Model) -> None:
    extractor = load_extractor("mnist-cnn", CPU, str(asset("mnist-features")))
    assert setup.embedded_reference("mnist", extractor) is not None
    extractor.sha256 = "0" * 64
    assert setup.embedded_reference("mnist", extractor) is None
    with pytest.raises(UserError, match=r"mnist \(train\) is not in "):
        setup.pick_reference(model, None, extractor)


@pytest.mark.parametrize("metric", ["kid", "precision", "recall"])
def test_a_metric_of_real_images_says_which_files_it_needs(
    metric: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "--model", "mnist", "-s", "ddim", "--steps", "1", "--n", "32", "--metric", metric]
    with pytest.raises(SystemExit, match="2"):
        cli.main([*arguments, "--out", str(tmp_path / "out")])
    line = capsys.readouterr().err
    assert line.startswith(f"samplerbench: the metric {metric} needs the real images, and only their statistics are ")
    assert "mnist (train) is not in " in line
    assert "$SAMPLERBENCH_DATA" in line
    assert line.count("\n") == 1


def test_other_files_under_the_name_are_refused(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FID would use the included statistics, and KID the files."""
    write_mnist(tmp_path, 12)
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=r"the files of mnist \(train\) are not the data set whose statistics are incl"):
        samplerbench.evaluate("ddim", steps=1, n=8, model=model, metrics=["kid"], labels="none", quiet=True)


def test_with_the_files_all_metrics_work(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path, 12)
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    measure(load_data("mnist"), load_extractor("mnist-cnn", CPU)).save(tmp_path / "statistics.safetensors")
    monkeypatch.setitem(REFERENCES, ("mnist-cnn", "mnist"), str(tmp_path / "statistics.safetensors"))
    assert setup.has_real_images(model, None)
    [record] = samplerbench.evaluate("ddim", steps=1, n=8, model=model, metrics=["kid"], labels="none", quiet=True)
    assert np.isfinite(record["metrics"]["kid"]["value"])


def test_a_folder_of_data_does_not_hide_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "a.png").touch()
    assert setup.load_model("mnist", CPU, "fp32").identity["source"] == "mnist"
    (tmp_path / "mnist" / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="mnist"):
        setup.load_model("mnist", CPU, "fp32")


def test_the_number_of_images_needs_no_files(model: Model) -> None:
    assert setup.count_images(model, "mnist:split=test") == 10_000


def test_the_classifier_guides(model: Model) -> None:
    kwargs: dict[str, Any] = {"model": model, "steps": 1, "n": 2, "labels": "3", "quiet": True}
    plain, guided = (samplerbench.sample("ddim", guidance=g, **kwargs) for g in ("none", "classifier:scale=5"))
    assert not torch.equal(plain, guided)
