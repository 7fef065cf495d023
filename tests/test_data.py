"""Image sets by name and by folder."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

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
    assert refusal("digit").endswith('neither a folder nor one of digits. Did you mean "digits"?')
    assert refusal(tmp_path / "absent").startswith(f'no data set "{tmp_path}/absent"')
    assert refusal(write_file(tmp_path / "file.txt")).startswith('no data set "')


def write_file(file: Path) -> Path:
    file.write_text("x")
    return file
