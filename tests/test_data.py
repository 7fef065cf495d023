"""Image sets by name and by folder."""

import hashlib
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from support.mnist import write_mnist

from samplerbench.data import load_data
from samplerbench.errors import UserError


def write(file: Path, size: tuple[int, int] = (4, 3), mode: str = "RGB", seed: int = 0) -> np.ndarray:
    """A PNG of random pixels, (width, height) large."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) + ((3,) if mode == "RGB" else ())
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return pixels


def refusal(source: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load_data(str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_digits_are_the_1797_real_ones() -> None:
    data, bunch = load_data("digits"), load_digits()
    assert (len(data), data.shape, data.classes, data.images.dtype) == (1797, (1, 8, 8), 10, torch.uint8)
    expected = [[round(v * 255 / 16) for v in row] for row in bunch.data]
    assert data.images.flatten(1).tolist() == expected
    assert data.labels is not None
    assert data.labels.tolist() == bunch.target.tolist()
    assert data.class_counts() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_use_the_whole_range() -> None:
    levels = load_data("digits").images.unique().tolist()
    assert len(levels) == 17
    assert (levels[0], levels[-1]) == (0, 255)


def test_the_hash_is_of_shape_pixels_and_labels() -> None:
    data = load_data("digits")
    assert data.labels is not None
    digest = hashlib.sha256(b"(1797, 1, 8, 8)" + data.images.numpy().tobytes() + data.labels.numpy().tobytes())
    assert data.sha256 == digest.hexdigest()
    half = data.subset(torch.arange(900), "first half")
    assert (len(half), half.split, half.classes) == (900, "first half", 10)
    assert half.sha256 != data.sha256


def test_sub_folders_are_classes_in_alphabetical_order(tmp_path: Path) -> None:
    cat = write(tmp_path / "cat" / "1.png", seed=1)
    dogs = [write(tmp_path / "dog" / name, seed=k) for k, name in enumerate(["0.png", "deeper/9.PNG"], start=2)]
    data = load_data(str(tmp_path))
    assert (data.name, data.shape, data.classes) == (tmp_path.name, (3, 3, 4), 2)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 1]
    assert np.array_equal(data.images.permute(0, 2, 3, 1), np.stack([cat, *dogs]))
    assert data.class_counts() == [1, 2]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    pixels = [write(tmp_path / f"{k}.png", mode="L", seed=k) for k in range(3)]
    (tmp_path / "notes.txt").write_text("no image")
    data = load_data(str(tmp_path))
    assert (data.shape, data.labels, data.classes) == ((1, 3, 4), None, None)
    assert np.array_equal(data.images[:, 0], np.stack(pixels))
    with pytest.raises(UserError, match="has no labels"):
        data.class_counts()


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_a_corrupt_image_is_named(tmp_path: Path, content: bytes | None) -> None:
    write(tmp_path / "0.png")
    file = tmp_path / "1.png"
    write(file, size=(40, 30))
    file.write_bytes(file.read_bytes()[:200] if content is None else content)
    assert refusal(tmp_path).startswith(f"the image {file} cannot be read (")


def test_an_image_of_another_size_is_named_with_both_sizes(tmp_path: Path) -> None:
    write(tmp_path / "a" / "0.png", size=(4, 3))
    write(tmp_path / "b" / "1.png", size=(5, 3))
    message = refusal(tmp_path)
    assert f"the image {tmp_path}/b/1.png is 5x3 RGB, but {tmp_path}/a/0.png is 4x3 RGB" in message


def test_grey_among_colour_is_named(tmp_path: Path) -> None:
    write(tmp_path / "0.png")
    write(tmp_path / "1.png", mode="L")
    assert "1.png is 4x3 grey, but" in refusal(tmp_path)


def test_classes_beside_loose_images_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "0.png")
    write(tmp_path / "cat" / "1.png")
    assert "both at its top and in class sub-folders" in refusal(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"the folder {tmp_path} has no images (")


def test_an_unknown_name_gets_a_suggestion(tmp_path: Path) -> None:
    assert refusal("digit").endswith('Did you mean "digits"?')
    assert refusal(tmp_path / "absent").startswith(f'no data set "{tmp_path}/absent"')
    file = tmp_path / "file.txt"
    file.write_text("x")
    assert "is not a data set: use a folder or zip of images" in refusal(file)


# --- Zips and arrays -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_zip_is_the_folder_that_was_zipped(tmp_path: Path, wrapped: bool) -> None:
    for k, name in enumerate(["cat/1.png", "dog/0.png", "dog/9.png"]):
        write(tmp_path / "set" / name, seed=k)
    (tmp_path / "set" / "read me.txt").write_text("no image")
    archive = shutil.make_archive(
        str(tmp_path / "pets"), "zip", tmp_path if wrapped else tmp_path / "set", "set" if wrapped else "."
    )
    zipped, folder = load_data(archive), load_data(str(tmp_path / "set"))
    assert (zipped.name, zipped.sha256, zipped.classes) == ("pets", folder.sha256, 2)


def test_a_broken_image_in_a_zip_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        archive.writestr("cat/1.png", b"not an image")
    assert refusal(tmp_path / "pets.zip").startswith(f"the image {tmp_path}/pets.zip/cat/1.png cannot be read (")


def test_a_file_that_is_no_zip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pets.zip").write_text("x")
    assert refusal(tmp_path / "pets.zip").startswith(f"the archive {tmp_path}/pets.zip cannot be read (")


def test_an_npz_holds_images_and_labels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.array([0, 2, 1, 1, 0]))
    data = load_data(str(tmp_path / "a.npz"))
    assert np.array_equal(data.images.permute(0, 2, 3, 1), pixels)
    assert (data.classes, data.labels is not None and data.labels.tolist()) == (3, [0, 2, 1, 1, 0])
    np.savez(tmp_path / "b.npz", pixels[..., 0])  # numpy calls it arr_0, as guided-diffusion's sample files do
    assert np.array_equal(load_data(str(tmp_path / "b.npz")).images[:, 0], pixels[..., 0])


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"mu": np.zeros(3)}, "holds no images (an array called images or arr_0), only mu."),
        ({"images": np.zeros((2, 4, 4, 3))}, "the images are float64 of shape (2, 4, 4, 3); give uint8"),
        ({"images": np.zeros((2, 4, 4, 4), np.uint8)}, "give uint8 (n, H, W) or (n, H, W, 1 or 3)"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, "not one integer per image"),
    ],
)
def test_an_npz_of_something_else_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], reason: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    assert reason in refusal(tmp_path / "a.npz")


# --- Names ---------------------------------------------------------------------------------------------------------


def test_mnist_is_read_from_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_mnist(tmp_path)
    named = load_data(f"mnist:root={tmp_path}")
    assert (named.name, named.split, named.shape) == ("mnist", "train", (1, 28, 28))
    assert np.array_equal(named.images[:, 0], pixels)
    monkeypatch.setenv("SAMPLERBENCH_DATA", str(tmp_path))
    again, test = load_data("mnist"), load_data("mnist:split=test")
    assert again.sha256 == named.sha256
    assert (test.split, test.labels is not None and test.labels.tolist()) == ("test", [3] * 7)
    assert load_data(test.source).sha256 == test.sha256
    assert load_data(again.source).sha256 == again.sha256


def test_a_set_that_is_not_there_is_not_downloaded_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLERBENCH_DATA", str(tmp_path))
    for name in ("mnist", "cifar10", "svhn:split=test"):
        message = refusal(name)
        assert f"is not in {tmp_path}; name the folder" in message
        assert "download=true" in message
    assert not list(tmp_path.iterdir())
    assert "split=training" in refusal("mnist:split=training")


def test_the_real_mnist() -> None:
    root = Path(__file__).parents[2] / "shared" / "data"
    if not (root / "MNIST").is_dir():
        pytest.skip("the real MNIST files are not at hand")
    data = load_data(f"mnist:root={root}")
    assert data.class_counts() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_a_hub_data_set_without_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal("hf:owner/name")


def test_a_hub_data_set_is_read_through_the_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional library datasets is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"img": [Image.fromarray(p) for p in pixels], "kind": [0, 1, 1, 0]}
    folder = tmp_path / "owner"
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "train.parquet"))
    data = load_data(f"hf:{folder}")
    assert np.array_equal(data.images.permute(0, 2, 3, 1), pixels)
    assert (data.classes, data.labels is not None and data.labels.tolist()) == (3, [0, 1, 1, 0])
    assert 'no column "imh"' in refusal(f"hf:{folder},images=imh")
