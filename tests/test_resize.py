"""Folders, archives and hub data of mixed sizes are resized by a stated rule, which the protocol records."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import samplerbench
from samplerbench.data import load_data
from samplerbench.data.resize import ResizedSource
from samplerbench.errors import UserError


class Rule(ResizedSource):
    """The rule alone."""

    def load(self) -> Any:
        raise NotImplementedError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six grey images of three sizes in two classes."""
    draws = np.random.default_rng(0)
    for i, (width, height) in enumerate([(16, 16), (30, 20), (9, 21)] * 2):
        file = tmp_path / "faces" / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (height, width), dtype=np.uint8)).save(file)
    return tmp_path / "faces"


def refusal(source: str) -> str:
    with pytest.raises(UserError) as error:
        load_data(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_images_of_several_sizes_have_one_size_and_a_recorded_rule(folder: Path) -> None:
    found = load_data(f"{folder}:resize=8")
    assert (found.shape, len(found), found.classes) == ((1, 8, 8), 6, 2)
    assert found.resized == "resize=8,crop=center,filter=bicubic"
    assert found.identity["resized"] == found.resized
    assert load_data(found.source).sha256 == found.sha256
    with Image.open(folder / "class0" / "0.png") as image:  # a square image has no margin to crop
        expected = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(found.images[0, 0], expected)


def test_the_centre_is_kept_or_the_whole_image_distorted() -> None:
    ramp = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) * 6, (20, 1)))  # 40 wide, 20 high, darker to the left
    kept = np.asarray(Rule(resize=10).resized(ramp), np.int64)
    whole = np.asarray(Rule(resize=10, crop="none").resized(ramp), np.int64)
    assert kept.shape == whole.shape == (10, 10)
    # The centre spans the levels 60 to 174 of 0 to 234, and the distorted image all of them.
    assert (kept.min(), kept.max()) == pytest.approx((63, 171), abs=4)
    assert (whole.min(), whole.max()) == pytest.approx((9, 225), abs=6)


@pytest.mark.parametrize("size", [(7, 100), (100, 7), (7, 7), (3, 5), (1, 1), (1000, 999)])
def test_every_size_gives_the_side(size: tuple[int, int]) -> None:
    assert Rule(resize=7).resized(Image.new("RGB", size)).size == (7, 7)


@pytest.mark.parametrize("name", ["bicubic", "lanczos", "bilinear", "box"])
def test_the_filters_are_pillows(name: Any) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    expected = image.resize((8, 8), getattr(Image.Resampling, name.upper()))
    assert np.array_equal(np.asarray(Rule(resize=8, filter=name).resized(image)), np.asarray(expected))


def test_an_archive_is_resized_like_its_folder(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for file in folder.rglob("*.png"):
            archive.write(file, file.relative_to(folder))
    rule = "resize=8,crop=none,filter=lanczos"
    zipped = load_data(f"{tmp_path / 'faces.zip'}:{rule}")
    assert zipped.sha256 == load_data(f"{folder}:{rule}").sha256
    assert zipped.resized == rule


def test_the_protocol_and_the_table_say_how_images_were_resized(folder: Path, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"steps": 1, "n": 12, "quiet": True, "metrics": "fid"}
    first, other = (
        samplerbench.evaluate("ddim", data=f"{folder}:{rule}", **kwargs)[0]
        for rule in ("resize=8", "resize=8,crop=none")
    )
    assert first["protocol_fields"]["reference"]["resized"] == "resize=8,crop=center,filter=bicubic"
    assert first["metrics"]["fid"]["reference"] == "faces (all, 6, resize=8,crop=center,filter=bicubic)"
    assert first["protocol"] != other["protocol"]


def test_a_rule_that_changes_no_pixel_is_another_protocol(tmp_path: Path) -> None:
    """The pixels of a data set whose images have the side already are the same, and its label tells them apart."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "a.png")
    plain, resized = load_data(str(tmp_path)), load_data(f"{tmp_path}:resize=8")
    assert torch.equal(plain.images, resized.images)
    assert "resized" not in plain.identity
    assert plain.identity != resized.identity


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("", "all images of a data set must have the same size and number of channels. To resize them, add a rule"),
        (":resize=0,crop=none", "crop=none applies to resize=SIDE; add resize=SIDE."),
        (":resize=x", "resize=x: "),
        (":resize=-1", "resize=-1: "),
        (":resize=99999", "resize=99999: "),
        (":size=8", 'has no parameter "size". Did you mean "resize"?'),
        (":resize=8,crop=top", "crop=top: "),
        (":resize=8,filter=best", "filter=best: "),
        (":resize=8,resize=9", ":resize=SIDE,crop=center,filter=bicubic."),
        (":resize=8,crop", ":resize=SIDE,crop=center,filter=bicubic."),
        (":path=x", 'has no parameter "path"'),
        (":resize", ":resize=SIDE,crop=center,filter=bicubic."),
    ],
)
def test_a_wrong_rule_is_one_line(folder: Path, rule: str, says: str) -> None:
    assert says in refusal(f"{folder}{rule}")


def test_only_folders_and_archives_are_resized(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8), np.uint8))
    assert refusal(f"{tmp_path / 'a.npz'}:resize=8").endswith(
        "only a folder or a zip archive of images can be resized."
    )
    assert "no data set" in refusal(f"{tmp_path / 'absent'}:resize=8")


def test_a_folder_whose_name_looks_like_a_rule_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a:resize=8"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has no colons in names")
    Image.new("L", (5, 5)).save(folder / "a.png")
    assert load_data(str(folder)).shape == (1, 5, 5)


def test_hub_data_is_resized(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional library datasets is not installed")
    features = datasets.Features({"image": datasets.Image()})
    images = [Image.new("L", size, 9) for size in ((8, 9), (20, 10))]
    datasets.Dataset.from_dict({"image": images}, features).to_parquet(str(tmp_path / "train.parquet"))
    found = load_data(f"hf:{tmp_path},resize=4,crop=none")
    assert (found.shape, found.resized) == ((1, 4, 4), "resize=4,crop=none,filter=bicubic")
