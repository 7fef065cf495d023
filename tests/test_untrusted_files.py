"""Archives, arrays, images, configurations, JSON and TOML of strangers: what is damaged or lies is one clear line."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from samplerbench import limits
from samplerbench.bench import setup
from samplerbench.bench.suite import load_suite
from samplerbench.data import ImageSet, load_data
from samplerbench.data import files as data_files
from samplerbench.errors import UserError
from samplerbench.metrics.extractors import load_extractor
from samplerbench.models.prompts import read_prompts
from samplerbench.models.schedule import alphas_cumprod, noise_levels, read_schedule
from samplerbench.training.features import FeaturesTask
from samplerbench.training.loop import TrainSettings, fit
from samplerbench.untrusted import MAX_DEPTH, parse_json, parse_toml, read_json

DEEP = 200_000
LONG = "9" * 5_000


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def png(side: int = 2, mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


# --- Archives -------------------------------------------------------------------------------------------------------


def archive(folder: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    file = folder / "images.zip"
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as made:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            made.writestr(info, content)
    return file


def patched(file: Path, local: dict[int, bytes], central: dict[int, bytes]) -> Path:
    """The archive with bytes replaced, at offsets from the first local and the first central header."""
    content = bytearray(file.read_bytes())
    for signature, changes in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        at = content.index(signature)
        for offset, value in changes.items():
            content[at + offset : at + offset + len(value)] = value
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    "name", ["../evil.png", "a/../../evil.png", "/etc/evil.png", "..\\evil.png", "C:\\evil.png", "C:/evil.png"]
)
def test_a_member_whose_name_leads_out_of_the_archive_is_refused(tmp_path: Path, name: str) -> None:
    file = archive(tmp_path, [("a.png", png()), (name, png())])
    assert "its name points outside the archive" in refusal(lambda: load_data(str(file)))


@pytest.mark.parametrize("twin", ["a/1.png", "a//1.png", "a/./1.png", "a\\1.png"])
def test_two_members_of_one_name_are_refused(tmp_path: Path, twin: str) -> None:
    file = archive(tmp_path, [("a/1.png", png()), (twin, png())])
    assert "two members have this name" in refusal(lambda: load_data(str(file)))


def test_what_is_no_image_in_an_archive_is_passed_over(tmp_path: Path) -> None:
    """Folders, a name of nothing but dots, and an empty one too: their names have no first part."""
    members = [("a/", b""), ("/", b""), ("./", b""), (".", b""), ("notes.txt", b"x"), ("__MACOSX/a/._1.png", b"x")]
    data = load_data(str(archive(tmp_path, [*members, ("a/1.png", png()), ("b/1.png", png())])))
    assert (len(data), data.classes) == (2, 2)


def test_an_archive_of_windows_has_the_same_classes(tmp_path: Path) -> None:
    data = load_data(str(archive(tmp_path, [("a\\1.png", png()), ("b\\1.png", png())])))
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1]


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    file = patched(archive(tmp_path, [("a.png", png())]), {6: b"\x01\x00"}, {8: b"\x01\x00"})
    assert "a.png: it is encrypted" in refusal(lambda: load_data(str(file)))


@pytest.mark.parametrize("method", [1, 9, 97, 99])
def test_an_unknown_compression_is_refused(tmp_path: Path, method: int) -> None:
    value = struct.pack("<H", method)
    file = patched(archive(tmp_path, [("a.png", png())]), {8: value}, {10: value})
    assert "a.png cannot be read (That compression method is not supported)" in refusal(lambda: load_data(str(file)))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_is_refused(tmp_path: Path, method: int) -> None:
    file = archive(tmp_path, [("a.png", os.urandom(500))], method)
    content = bytearray(file.read_bytes())
    content[60:200] = bytes(140)
    file.write_bytes(content)
    assert "a.png cannot be read (" in refusal(lambda: load_data(str(file)))


def test_a_member_that_unpacks_to_more_than_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "MAX_FILE_BYTES", 1000)
    file = archive(tmp_path, [("a.png", bytes(10_000))], zipfile.ZIP_DEFLATED)
    assert "it has 10,000 bytes unpacked; at most 1,000 are read" in refusal(lambda: load_data(str(file)))
    # The header says 10 bytes. zipfile stops there, and the checksum is not that of 10 bytes.
    lying = patched(file, {22: struct.pack("<I", 10)}, {24: struct.pack("<I", 10)})
    assert "a.png cannot be read (" in refusal(lambda: load_data(str(lying)))


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x05\x06" + bytes(18), b"x" * 100])
def test_an_archive_of_nothing_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "images.zip").write_bytes(content)
    assert refusal(lambda: load_data(str(tmp_path / "images.zip"))).startswith(f"the archive {tmp_path}/images.zip ")


# --- Images ---------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header says so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("width", "height"), [(8193, 8192), (10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2)])
def test_an_image_bomb_is_refused_by_its_header(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "a.png").write_bytes(bomb(width, height))
    line = refusal(lambda: load_data(str(tmp_path)))
    assert f"{limits.MAX_PIXELS:,}" in line
    assert "a.png cannot be read (it has " in line


def test_a_file_is_decoded_as_an_image_whatever_its_name_says(tmp_path: Path) -> None:
    """Pillow would hand PostScript to Ghostscript, a program that runs it."""
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    assert "unsupported image format" in refusal(lambda: load_data(str(tmp_path)))


@pytest.mark.parametrize("suffix", sorted(data_files.IMAGE_SUFFIXES))
def test_every_suffix_that_is_accepted_has_its_format(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / f"a{suffix}")
    assert load_data(str(tmp_path)).shape == (3, 4, 4)


def test_a_damaged_image_is_one_line_at_whichever_byte_it_ends(tmp_path: Path) -> None:
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        Image.new("RGB", (9, 9), (1, 2, 3)).save(buffer, kind)
        content = buffer.getvalue()
        for end in range(0, len(content) - 1, max(1, len(content) // 12)):
            (tmp_path / "a.png").write_bytes(content[:end])
            try:
                load_data(str(tmp_path))
            except UserError as error:
                assert "a.png cannot be read (" in str(error)  # noqa: PT017 - whether it is refused is up to Pillow


def test_a_set_whose_images_disappear_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png())
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert "a.png cannot be read (Permission denied)" in refusal(lambda: load_data(str(tmp_path)))


# --- Arrays ---------------------------------------------------------------------------------------------------------


def npz(folder: Path, **arrays: np.ndarray | bytes) -> str:
    """An npz of arrays, or of the bytes of an npy file."""
    file = folder / "images.npz"
    with zipfile.ZipFile(file, "w") as made:
        for name, content in arrays.items():
            buffer = io.BytesIO()
            if isinstance(content, np.ndarray):
                np.save(buffer, content)
            made.writestr(f"{name}.npy", content if isinstance(content, bytes) else buffer.getvalue())
    return str(file)


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


IMAGES = np.zeros((3, 2, 2), np.uint8)


@pytest.mark.parametrize(
    "shape", ["(1000000000000, 8, 8)", "(4611686018427387904, 8, 8)", "(30, 2, 3)", f"({'9' * 30}, 2, 2)"]
)
def test_a_header_that_declares_more_than_there_is_takes_no_memory(tmp_path: Path, shape: str) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    line = refusal(lambda: load_data(npz(tmp_path, images=npy(header, bytes(12)))))
    assert "the array images declares the shape (" in line
    assert "but has at most 141" in line


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        npy("{'descr': '|u1'}"),
        npy("{'descr': 'x', 'fortran_order': False, 'shape': (1,)}"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"),
        npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 2, 2)}"),
        npy("{'descr': '|u1', 'fortran_order': False, 'shape': 'x'}"),
        npy("(" * 100),
        npy("__import__('os').abort()"),
        npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2, 2)}", bytes(4), b"\x09\x00"),
        npy("{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (1, 2, 2)}", bytes(4)),
        npy("{'descr': '|V0', 'fortran_order': False, 'shape': (1, 2, 2)}"),
    ],
)
def test_a_header_of_nothing_known_is_one_line(tmp_path: Path, content: bytes) -> None:
    refusal(lambda: load_data(npz(tmp_path, images=content)))
    refusal(lambda: load_data(npz(tmp_path, images=IMAGES, labels=content)))


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (np.zeros((0, 2, 2), np.uint8), np.zeros(0, np.int64), "holds no images: their shape is (0, 2, 2)"),
        (np.zeros((0, 2, 2), np.uint8), None, "holds no images"),
        (np.zeros((3, 0, 2), np.uint8), None, "holds no images"),
        (IMAGES, np.array([0, 1, -1]), "the labels are -1 to 1; they must be 0 to"),
        (IMAGES, np.array([0, 1, 10**18]), "they must be 0 to at most 999,999"),
        (IMAGES, np.array([0, 1, 2**64 - 1], np.uint64), "they must be 0 to at most 999,999"),
        (IMAGES, np.array([0.0, 1.0, 2.0]), "not one integer per image"),
        (IMAGES, np.array([0, 1]), "not one integer per image"),
        (IMAGES, np.array([True, False, True]), "not one integer per image"),
    ],
)
def test_arrays_that_are_no_labelled_images_are_one_line(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray | None, says: str
) -> None:
    arrays = {"images": images} if labels is None else {"images": images, "labels": labels}
    assert says in refusal(lambda: load_data(npz(tmp_path, **arrays)))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("compressed", [False, True])
def test_sound_arrays_are_as_numpy_reads_them(tmp_path: Path, order: Any, compressed: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 3)).astype(np.uint8).copy(order)
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "i.npz", images=images, labels=np.array([4, 0, 1, 1, 2], ">i2"))
    data = load_data(str(tmp_path / "i.npz"))
    assert torch.equal(data.images, torch.from_numpy(images.copy("C")).permute(0, 3, 1, 2))
    assert data.labels is not None
    assert (data.labels.tolist(), data.classes) == ([4, 0, 1, 1, 2], 5)


def test_an_npy_file_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGES)
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    assert "cannot be read as an npz file" in refusal(lambda: load_data(str(tmp_path / "a.npz")))


@pytest.mark.parametrize(
    ("images", "labels", "classes"),
    [
        (torch.zeros(2, 1, 4, 4), None, None),
        (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), None, None),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), None, None),
        (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), None, None),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, -1]), 2),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 2]), 2),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), None),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), 10**12),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0.0, 1.0]), 2),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0]), 2),
    ],
)
def test_a_set_is_what_it_says_it_is_wherever_it_comes_from(images: Any, labels: Any, classes: Any) -> None:
    """A data plugin's too: it is checked where the set is made."""
    assert "the data set mine: the " in refusal(lambda: ImageSet("mine", "all", images, labels, classes))


# --- JSON and TOML --------------------------------------------------------------------------------------------------

DOCUMENTS = {
    "deep list": "[" * DEEP + "]" * DEEP,
    "deep object": '{"a":' * DEEP + "1" + "}" * DEEP,
    "somewhat deep": '{"a":' * (MAX_DEPTH + 2) + "1" + "}" * (MAX_DEPTH + 2),
    "open": "[" * DEEP,
    "long integer": '{"a": ' + LONG + "}",
    "half a character": '{"a": "\\ud800"}',
    "list": "[1, 2]",
    "nothing": "",
    "word": "null",
    "not utf-8": "\udcff",
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_json_that_is_no_object_is_one_line_for_every_reader(tmp_path: Path, kind: str) -> None:
    content = DOCUMENTS[kind].encode("utf-8", "surrogateescape")
    readers: dict[str, Callable[[Path], Any]] = {
        "model_index.json": lambda f: setup.load_model(str(f), CPU, "fp32"),
        "config.json": lambda f: setup.load_model(str(f), CPU, "fp32"),
        "samplerbench.json": lambda f: load_extractor(str(f), CPU),
    }
    for name, read in readers.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(content)
        refusal(lambda read=read, folder=folder: read(folder))
    assert refusal(lambda: read_json(tmp_path / "config.json" / "config.json", "it")).startswith("it: config.json/conf")


def test_what_is_allowed_is_read() -> None:
    inner: Any = 1
    for _ in range(MAX_DEPTH - 1):
        inner = [inner]
    assert parse_json(json.dumps(inner)) == inner
    assert parse_json('{"a": [1e999, "\\ud83d\\ude00"]}') == {"a": [float("inf"), "\U0001f600"]}
    assert parse_toml("a.b = 1") == {"a": {"b": 1}}


@pytest.mark.parametrize("name", ["fifo", "device", "folder", "large"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    file = tmp_path / "config.json"
    if name in ("fifo", "device") and not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes and devices")
    if name == "fifo":
        os.mkfifo(file)
    elif name == "device":
        file.symlink_to("/dev/zero")
    elif name == "folder":
        file.mkdir()
    else:
        file.write_text("{}" + " " * 100)
        monkeypatch.setattr("samplerbench.untrusted.MAX_TEXT_BYTES", 100)
    says = {
        "fifo": "not a regular file",
        "device": "not a regular file",
        "folder": "a folder",
        "large": "at most 100 are read",
    }
    assert says[name] in refusal(lambda: read_json(file, "it"))
    assert "cannot be read" in refusal(lambda: load_suite(file))
    assert "cannot be read" in refusal(lambda: read_prompts(str(file)))


SUITES = {
    "deep list": "a = " + "[" * DEEP,
    "closed deep list": "a = " + "[" * DEEP + "]" * DEEP,
    "deep table": "a = " + "{a=" * DEEP,
    "dotted": ".".join("a" * 500) + " = 1",
    "long integer": f"n = {LONG}",
    "no date": "a = 2020-02-30",
    "no month": "a = 2020-13-01T00:00:00",
}


@pytest.mark.parametrize("kind", SUITES)
def test_a_suite_that_cannot_be_parsed_is_one_line(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "suite.toml"
    file.write_text(SUITES[kind] + '\n[[grid]]\nsamplers = ["ddim"]\nsteps = [2]\n')
    assert refusal(lambda: load_suite(file)).startswith(f"{file}:")


# --- Configurations of checkpoints ----------------------------------------------------------------------------------

WRONG: list[Any] = [True, "8", -1, 0, 10**30, 1.5, [8], [], {}, [8, 8, 8], ["8", "8"], float("nan"), float("inf")]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, **kinds)
    unet.save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "DDPMScheduler"]}))
    return folder


def changed(pipeline: Path, tmp_path: Path, file: str, **values: Any) -> str:
    folder = tmp_path / "model"
    if not folder.exists():
        shutil.copytree(pipeline, folder)
    written = json.loads((pipeline / file).read_text("utf-8"))
    (folder / file).write_text(json.dumps(written | values))
    return str(folder)


@pytest.mark.parametrize(
    ("file", "key", "sound"),
    [
        ("unet/config.json", "sample_size", [1.0]),
        ("unet/config.json", "in_channels", []),
        ("unet/config.json", "out_channels", []),
        ("unet/config.json", "num_class_embeds", [0]),
        ("scheduler/scheduler_config.json", "num_train_timesteps", []),
        ("scheduler/scheduler_config.json", "beta_start", [0]),
        ("scheduler/scheduler_config.json", "beta_end", [0]),
        ("scheduler/scheduler_config.json", "clip_sample", [True]),
        ("scheduler/scheduler_config.json", "clip_sample_range", [1.5, 8]),
        ("scheduler/scheduler_config.json", "thresholding", []),
        ("scheduler/scheduler_config.json", "rescale_betas_zero_snr", [True]),
        ("scheduler/scheduler_config.json", "trained_betas", []),
        ("scheduler/scheduler_config.json", "prediction_type", []),
        ("scheduler/scheduler_config.json", "beta_schedule", []),
        ("scheduler/scheduler_config.json", "variance_type", ["8"]),
    ],
)
def test_a_setting_of_the_wrong_type_or_range_is_one_line(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, key: str, sound: list[Any]
) -> None:
    """Without a network: what is wrong is seen before any weights are loaded."""
    monkeypatch.setattr(UNet2DModel, "from_pretrained", lambda *_, **__: pytest.fail("the weights were loaded"))
    for value in WRONG:
        if any(value == s and type(value) is type(s) for s in sound):
            continue
        line = refusal(lambda v=value: setup.load_model(changed(pipeline, tmp_path, file, **{key: v}), CPU, "fp32"))
        assert str(tmp_path / "model") in line


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_start": 0.0, "beta_end": 0.0},
        {"beta_start": 1.0, "beta_end": 1.0},
        {"trained_betas": [0.5, 2.0]},
        {"trained_betas": [0.0, 0.1]},
        {"trained_betas": "0.1"},
        {"trained_betas": [0.1, None]},
        {"num_train_timesteps": 1_000_000},
    ],
)
def test_a_schedule_without_finite_increasing_levels_is_one_line(changes: dict[str, Any]) -> None:
    refusal(lambda: read_schedule("DDPMScheduler", changes, "it"))


def test_the_levels_of_a_sound_schedule_are_those_of_the_formula() -> None:
    found = read_schedule("DDPMScheduler", {"num_train_timesteps": 3, "beta_start": 0.1, "beta_end": 0.3}, "it").levels
    bars = torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], dtype=torch.float64)
    torch.testing.assert_close(found, ((1 - bars) / bars).sqrt(), rtol=1e-14, atol=0)
    arrays = (np.array([0.1, 0.2, 0.3]), [0.1, 0.2, 0.3], torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
    for given in arrays:
        torch.testing.assert_close(noise_levels(alphas_cumprod({"trained_betas": given})), found, rtol=1e-14, atol=0)


def test_a_card_of_the_wrong_types_is_one_line(pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pipeline, tmp_path / "model")
    good: dict[str, Any] = {"name": "mine", "class_counts": [1, 2]}
    cards: list[dict[str, Any]] = [{"data": data} for data in ("x", 1, [1], {"a": 1})]
    cards += [{"data": good | {key: value}} for key in ("name", "source") for value in (1, ["a"], {}, True)]
    cards += [{"data": good | {"class_counts": c}} for c in ("12", [1, "2"], [-1, 2], [0, 0], [], [1.5], [True], {})]
    cards += [{key: value} for key in ("classes", "null_label") for value in ("1", -1, 1.5, True, [1], 10**30)]
    cards += [{"feature_space": 1}, {"command": ["x"]}]
    for card in cards:
        (folder / "samplerbench.json").write_text(json.dumps(card))
        assert "has a damaged card: " in refusal(lambda: setup.load_model(str(folder), CPU, "fp32")), card


def test_a_card_with_more_classes_than_the_network_is_one_line(pipeline: Path, tmp_path: Path) -> None:
    folder = changed(pipeline, tmp_path, "unet/config.json", num_class_embeds=3)
    for card in ({"classes": 4}, {"null_label": 3}, {"classes": 2, "null_label": 10**5}):
        (Path(folder) / "samplerbench.json").write_text(json.dumps(card))
        assert "but the network has only 3 class embeddings" in refusal(lambda: setup.load_model(folder, CPU, "fp32"))


# --- A training's checkpoint ----------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_of_a_training_is_one_line(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 8, 8), generator=generator, dtype=torch.uint8)
    data = ImageSet("mine", "all", images, torch.arange(40) % 2, 2)
    settings = TrainSettings(steps=2, batch_size=4, checkpoint_every=1, cpu=True)

    def train() -> None:
        fit(FeaturesTask(data, (8,), 4), data, settings, tmp_path)

    train()
    file = tmp_path / "checkpoint" / "state.safetensors"
    from safetensors import safe_open

    with safe_open(str(file), "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    for change in (
        {"settings": "[" * DEEP},
        {"settings": "3"},
        {"result": "{}"},
        {"result": json.dumps(json.loads(metadata["result"]) | {"steps": "2"})},
        {"result": json.dumps(json.loads(metadata["result"]) | {"steps": -1})},
        {"ema_steps": "x"},
        {"scaler": "{"},
    ):
        save_file(tensors, file, metadata | change)
        assert "is damaged (" in refusal(train), change
    for gone in ("ema.0", "adamw.0.exp_avg"):
        save_file({k: v for k, v in tensors.items() if k != gone}, file, metadata)
        if gone == "ema.0":
            assert "is damaged (" in refusal(train)
    save_file(tensors, file)
    assert "is damaged (" in refusal(train)
