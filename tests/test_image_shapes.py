"""Real images of another size or kind than the model's are refused; grey ones count as RGB of three equal channels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samplerbench.bench import setup
from samplerbench.cli.app import main
from samplerbench.data import load_data
from samplerbench.errors import UserError
from samplerbench.metrics.extractors import load_extractor
from samplerbench.metrics.reference import load_reference, measure, measure_once
from samplerbench.models.model import Model

CPU = torch.device("cpu")
COLOURED = "the images of {} are {}, and the model makes 8x8 grey images: they cannot be compared"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLERBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model() -> Model:
    return setup.load_model("digits", CPU, "fp32")


def folder(path: Path, channels: int = 1, height: int = 8, width: int = 8, equal: bool = False, n: int = 70) -> str:
    """A folder of n random PNGs; with `equal`, RGB files whose channels are equal."""
    path.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (n, height, width, 1 if equal else channels), dtype=np.uint8)
    for i, image in enumerate(np.repeat(pixels, channels, axis=3) if equal else pixels):
        Image.fromarray(image[:, :, 0] if channels == 1 else image).save(path / f"{i}.png")
    return str(path)


def run(tmp_path: Path, *more: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["run", "-s", "ddim", "--steps", "2", "--n", "70", "--json", "--out", str(tmp_path / "out"), *more])
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("channels", "height", "width", "shown"),
    [(3, 16, 16, "16x16 RGB"), (1, 16, 16, "16x16 grey"), (3, 8, 8, "8x8 RGB"), (1, 8, 9, "9x8 grey")],
)
def test_images_of_another_shape_are_refused_in_one_line(
    channels: int, height: int, width: int, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder(tmp_path / "real", channels, height, width)
    assert run(tmp_path, "--data", source) == 2
    told = capsys.readouterr().err
    assert COLOURED.format("real", shown) in told
    assert told.count("\n") == 1


def test_statistics_remember_the_shape_of_their_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, file = folder(tmp_path / "real", 3, 16, 16), tmp_path / "real.safetensors"
    for _ in range(2):  # measured, and from the cache
        with pytest.raises(SystemExit, match="0"):
            main(["stats", source, "--features", "digits-cnn", "--out", str(file)])
        assert load_reference(file).shape == (3, 16, 16)
    capsys.readouterr()
    assert run(tmp_path, "--data", str(file)) == 2
    assert COLOURED.format(file, "16x16 RGB") in capsys.readouterr().err


def test_statistics_without_a_shape_are_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files written before the shape was recorded, and published ones."""
    reference = measure(load_data("digits"), load_extractor("digits-cnn", CPU))
    assert reference.shape == (1, 8, 8)
    replace(reference, shape=None).save(tmp_path / "old.safetensors")
    assert load_reference(tmp_path / "old.safetensors").shape is None
    assert run(tmp_path, "--data", str(tmp_path / "old.safetensors")) == 0


def test_the_embedded_statistics_are_those_of_8x8_images(model: Model) -> None:
    extractor = load_extractor("digits-cnn", CPU)
    assert setup.pick_reference(model, "digits", extractor).data["name"] == "digits"
    larger = replace(model, shape=(1, 28, 28))
    with pytest.raises(UserError, match="the images of digits are 8x8 grey, and the model makes 28x28 grey images"):
        setup.pick_reference(larger, "digits", extractor)


def test_reference_batches_are_checked_by_their_images(tmp_path: Path, model: Model) -> None:
    features = np.random.default_rng(0).normal(size=(200, 64))
    pixels = np.zeros((4, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "batch.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False), arr_0=pixels)
    with pytest.raises(UserError, match="are 16x16 RGB, and the model makes 8x8 grey"):
        setup.pick_reference(model, str(tmp_path / "batch.npz"), load_extractor("digits-cnn", CPU))


def test_grey_images_in_rgb_files_are_grey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Features see three equal channels either way, so the numbers are equal to the last bit."""
    values = []
    for name, channels in (("grey", 1), ("rgb", 3)):
        assert run(tmp_path, "--data", folder(tmp_path / name, channels, equal=True)) == 0
        values.append(json.loads(capsys.readouterr().out)[0]["metrics"]["fid"]["value"])
    assert values[0] == values[1]
    assert load_data(str(tmp_path / "rgb")).shape_as_seen == (1, 8, 8)


def test_a_model_of_rgb_images_is_compared_with_grey_ones_as_they_are(model: Model) -> None:
    rgb = replace(model, shape=(3, 8, 8))
    setup.check_shape(rgb, (1, 8, 8), "grey")
    setup.check_shape(rgb, (3, 8, 8), "rgb")
    setup.check_shape(rgb, None, "unknown")
    with pytest.raises(UserError, match="the images of grey are 9x8 grey, and the model makes 8x8 RGB images"):
        setup.check_shape(rgb, (1, 8, 9), "grey")


def test_the_shape_of_a_reference_is_no_part_of_the_protocol(tmp_path: Path) -> None:
    reference = measure_once(load_data(folder(tmp_path / "real")), load_extractor("digits-cnn", CPU))
    assert set(reference.data) == {"name", "split", "n", "sha256"}


def test_a_cached_reference_of_before_has_the_shape_of_its_images(tmp_path: Path) -> None:
    images, extractor = load_data(folder(tmp_path / "real")), load_extractor("digits-cnn", CPU)
    measured = measure_once(images, extractor)
    (file,) = (tmp_path / "cache").glob("reference-*")
    replace(measured, shape=None).save(file)
    assert load_reference(file).shape is None
    assert measure_once(images, extractor).shape == (1, 8, 8)
