"""Wrong inputs of users, as a table: the command, the exit code, and the exact line on stderr.

The table is `wrong_inputs.toml`. Each command runs in a folder with the files of its `[files]` and of `make_files`, and
leaves that folder as it was.
"""

from __future__ import annotations

import shlex
import shutil
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.synthetic_results import put, record

import samplerbench
from samplerbench.cli.app import command, main

TABLE: dict[str, Any] = tomllib.loads((Path(__file__).parent / "wrong_inputs.toml").read_text("utf-8"))
WORDS = TABLE["words"] | {"version": samplerbench.__version__, "diffusers": version("diffusers")}


def rows() -> Iterator[tuple[str, int, str]]:
    """(the words after `samplerbench`, exit code, line) of every row."""
    for name, inputs in TABLE["inputs"].items():
        for arguments, code, line in inputs:
            for word, text in WORDS.items():
                line = line.replace(f"{{{word}}}", text)
            yield (arguments if name == "program" else f"{name} {arguments}").strip(), code, line


ROWS = list(rows())


def make_files(folder: Path) -> None:
    """Write the files that the commands name: those of the table, images, arrays, weights and results."""
    for name, text in TABLE["files"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    save_file({"w": torch.zeros(1)}, folder / "no-scheduler/unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "damaged.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    for name, size, mode in (("a", 8, "L"), ("b", 9, "L"), ("c", 8, "RGB")):
        Image.new(mode, (size, size)).save(folder / f"{name}.png")
    for name, files in {"mixed-sizes": "ab", "mixed-colours": "ac", "large-images": "bb", "one-image": "a"}.items():
        (folder / name).mkdir()
        for i, file in enumerate(files):
            shutil.copy(folder / f"{file}.png", folder / name / f"{i}.png")
    (folder / "empty").mkdir()
    (folder / "damaged-image").mkdir()
    (folder / "damaged-image/a.png").write_bytes((folder / "a.png").read_bytes()[:40])
    np.savez(folder / "floats.npz", images=np.zeros((2, 8, 8)))
    np.savez(folder / "other.npz", pictures=np.zeros((2, 8, 8), np.uint8))
    np.savez(folder / "statistics.npz", mu=np.zeros(5), sigma=np.eye(5))
    put(folder / "results", record("ddim", 10), record("ddim", 20), record("ddpm", 10))
    put(folder / "other-model", record("ddim", 10, model="exact:gaussian"))
    put(folder / "damaged-latency", record("ddim", 10))
    for key in ("0123456789abcdef0000", "0123456789abcdef1111"):
        (folder / f"damaged-results/{key}.json").write_text("{", "utf-8")


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): b"" if file.is_dir() else file.read_bytes() for file in folder.rglob("*")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """The folder with the files, and its content."""
    folder = tmp_path_factory.mktemp("wrong")
    make_files(folder)
    return folder, content(folder)


@pytest.mark.parametrize(("arguments", "code", "line"), ROWS, ids=[arguments for arguments, _, _ in ROWS])
def test_a_wrong_input_gives_its_line_and_its_exit_code(
    place: tuple[Path, dict[str, bytes]],
    arguments: str,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, before = place
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SAMPLERBENCH_DEBUG", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the same lines on a machine with a GPU
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(arguments))
    assert capsys.readouterr() == ("", f"samplerbench: {line}\n")
    assert ended.value.code == code
    assert content(folder) == before


def leaves(group: Any, name: str = "") -> Iterator[str]:
    for word, inner in getattr(group, "commands", {}).items():
        path = f"{name} {word}".strip()
        yield from leaves(inner, path) if hasattr(inner, "commands") else (path,)


def test_the_table_has_every_command_and_no_row_twice() -> None:
    inputs = [arguments for arguments, _, _ in ROWS]
    assert len(set(inputs)) == len(inputs) >= 100
    assert [path for path in leaves(command()) if not any(f"{i} ".startswith(f"{path} ") for i in inputs)] == []


@pytest.mark.parametrize("word", TABLE["words"])
def test_every_word_of_the_table_is_used(word: str) -> None:
    assert f"{{{word}}}" in str(TABLE["inputs"])


def test_every_line_is_a_sentence() -> None:
    assert [line for _, _, line in ROWS if not line.endswith((".", "?"))] == []
