"""`samplerbench export`: the folder layouts of GenEval and HPS v2, and the images in them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDIMScheduler
from PIL import Image
from support.pipelines import SD_BETAS, tiny_stable_diffusion

import samplerbench
from samplerbench.cli.app import main

METADATA = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"},
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a red dog"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "two cows"},
]
PROMPTS = [str(line["prompt"]) for line in METADATA]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("export")
    tiny_stable_diffusion(made, DDIMScheduler(**SD_BETAS, clip_sample=False)).save_pretrained(made / "sd")
    (made / "evaluation_metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in METADATA))
    (made / "anime.json").write_text(json.dumps(PROMPTS[:2]))
    (made / "concept-art.json").write_text(json.dumps(PROMPTS))
    return made


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def files_in(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def how(folder: Path) -> tuple[str, ...]:
    return ("-m", str(folder / "sd"), "-s", "ddim", "--steps", "3", "--seed", "6", "--batch-size", "4")


@pytest.mark.slow
def test_the_layout_of_geneval(folder: Path, tmp_path: Path) -> None:
    out, prompts = tmp_path / "out", str(folder / "evaluation_metadata.jsonl")
    assert run("export", str(out), "--layout", "geneval", "--prompts", prompts, "--images", "2", *how(folder)) == 0
    assert files_in(out) == [
        f"0000{k}/{name}" for k in range(3) for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    ]
    model = samplerbench.load_model(folder / "sd", prompts=PROMPTS)
    expected = samplerbench.sample("ddim", 3, model=model, n=6, seed=6, quiet=True)
    for k, line in enumerate(METADATA):
        assert json.loads((out / f"0000{k}" / "metadata.jsonl").read_text()) == line
        for image in range(2):  # sample i of a run has prompt i mod 3
            pixels = np.asarray(Image.open(out / f"0000{k}" / "samples" / f"000{image}.png")).astype(int)
            theirs = expected[image * 3 + k].permute(1, 2, 0).numpy().astype(int)
            assert np.abs(pixels - theirs).max() <= 1  # another batch: rounding
    assert len({(out / f"0000{k}" / "samples/0000.png").read_bytes() for k in range(3)}) == 3


def test_the_images_of_a_prompt_default_to_those_of_the_benchmark(folder: Path, tmp_path: Path) -> None:
    out, prompts = tmp_path / "out", str(folder / "evaluation_metadata.jsonl")
    assert run("export", str(out), "--layout", "geneval", "--prompts", prompts, *how(folder)) == 0
    assert [f.name for f in sorted((out / "00002/samples").iterdir())] == [f"000{i}.png" for i in range(4)]


@pytest.mark.slow
def test_the_layout_of_hps(folder: Path, tmp_path: Path) -> None:
    """A folder for each style, named as its file, with one JPEG for each prompt at Pillow's default quality."""
    out = tmp_path / "out"
    prompts = [f"--prompts={folder / name}.json" for name in ("anime", "concept-art")]
    assert run("export", str(out), "--layout", "hps", *prompts, *how(folder)) == 0
    assert files_in(out) == [
        *(f"anime/0000{k}.jpg" for k in range(2)),
        *(f"concept-art/0000{k}.jpg" for k in range(3)),
    ]
    model = samplerbench.load_model(folder / "sd", prompts=[*PROMPTS[:2], *PROMPTS])
    expected = samplerbench.sample("ddim", 3, model=model, n=5, seed=6, batch_size=4, quiet=True)
    for file, image in zip(files_in(out), expected, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="JPEG")
        assert (out / file).read_bytes() == buffer.getvalue()


@pytest.mark.parametrize(
    ("layout", "content", "more", "says"),
    [
        ("geneval", '{"tag": "x"}\n', (), "line 1 is not a JSON object with a prompt; use GenEval's"),
        ("geneval", "a cat\n", (), "invalid JSON"),
        ("geneval", "\n", (), "the file contains no prompts."),
        ("geneval", '{"prompt": "a"}\n', ("--prompts", "{file}"), "the layout geneval has one file; there are 2."),
        ("geneval", '{"prompt": "a"}\n', ("--images", "10001"), "has at most 10,000 images of each prompt."),
        ("hps", '{"prompt": "a"}', (), "the file must be a JSON list of prompts."),
        ("hps", '["a"]', ("--images", "2"), "the layout hps has at most 1 image of each prompt."),
        ("hps", '["a"]', ("--prompts", "{file}"), "there are two files of the style prompts."),
    ],
)
def test_wrong_prompts_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, content: str, more: tuple[str, ...],
    says: str,
) -> None:  # fmt: skip
    file = tmp_path / "prompts.json"
    file.write_text(content)
    options = [option.replace("{file}", str(file)) for option in more]
    out = tmp_path / "out"
    assert run("export", str(out), "--layout", layout, "--prompts", str(file), *options, *how(folder)) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


def test_a_folder_with_files_is_left_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.txt").write_text("old")
    prompts = str(folder / "evaluation_metadata.jsonl")
    assert run("export", str(tmp_path), "--layout", "geneval", "--prompts", prompts, *how(folder)) == 2
    assert "is not empty; choose another folder." in capsys.readouterr().err
    assert files_in(tmp_path) == ["old.txt"]


def test_a_model_without_prompts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = str(folder / "evaluation_metadata.jsonl")
    options = ["--layout", "geneval", "--prompts", prompts, "-m", "digits", "-s", "ddim"]
    assert run("export", str(tmp_path / "out"), *options) == 2
    assert "requires a text-to-image model, but digits is not one." in capsys.readouterr().err
