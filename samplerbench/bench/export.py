"""Export of images in the folder layouts of text-to-image benchmarks: GenEval and HPS v2.

The images are those of a run: sample i of the model's seed, with prompt i mod K of K prompts.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from samplerbench.data.pixels import quantise
from samplerbench.errors import UserError, argument
from samplerbench.results.files import write_atomically
from samplerbench.untrusted import parse_json, read_text, shorten, user_path

Layout = Literal["geneval", "hps"]
MAX_PROMPTS = 100_000
"""The folders of GenEval and the files of HPS v2 are numbered with five digits."""


@dataclass(frozen=True)
class Entry:
    """A prompt and the place of its images.

    Attributes:
        prompt: the prompt.
        metadata: the line of a GenEval metadata file; empty for HPS v2.
        style: the style of HPS v2; empty for GenEval.
        number: number of the prompt in its file, from 0.
    """

    prompt: str
    metadata: str
    style: str
    number: int

    def path(self, image: int) -> Path:
        """Where an image of this prompt belongs.

        `00000/samples/0000.png` for GenEval, and `anime/00000.jpg` for HPS v2, which has one image of each prompt.

        Args:
            image: number of the image among those of this prompt, from 0.
        """
        if self.style:
            return Path(self.style) / f"{self.number:05d}.jpg"
        return Path(f"{self.number:05d}") / "samples" / f"{image:04d}.png"


def read_entries(layout: Layout, files: Sequence[str]) -> list[Entry]:
    """Read the prompts of a benchmark.

    Args:
        layout: "geneval": one JSONL file, whose lines are objects with a "prompt" (`evaluation_metadata.jsonl`).
            "hps": JSON files, each a list of prompts (`anime.json`); the name of the file is the style.
        files: the files.

    Returns:
        The prompts in order.

    Raises:
        UserError: a file cannot be read or has other contents, or two files have the same style.
    """
    if layout == "geneval":
        if len(files) != 1:
            raise UserError(f"{argument('prompts')}: the layout geneval has one file; there are {len(files)}.")
        return _geneval(files[0])
    entries: list[Entry] = []
    for file in files:
        style = user_path(file).stem
        if not re.fullmatch(r"[\w][\w.+ -]*", style):
            raise UserError(
                f"{argument('prompts', file)}: the style {style!r} is no name of a folder; rename the file."
            )
        if any(entry.style == style for entry in entries):
            raise UserError(f"{argument('prompts', file)}: there are two files of the style {style}.")
        prompts = _parsed(file, _text(file))
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise UserError(f"{argument('prompts', file)}: the file must be a JSON list of prompts.")
        entries += [Entry(prompt, "", style, number) for number, prompt in enumerate(prompts)]
    return _checked(entries, layout)


def _geneval(file: str) -> list[Entry]:
    entries: list[Entry] = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        content = _parsed(file, line)
        prompt = content.get("prompt") if isinstance(content, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(
                f"{argument('prompts', file)}: line {number} is not a JSON object with a prompt; use "
                "GenEval's evaluation_metadata.jsonl."
            )
        entries.append(Entry(prompt, json.dumps(content), "", len(entries)))
    if not entries:
        raise UserError(f"{argument('prompts', file)}: the file contains no prompts.")
    return _checked(entries, "geneval")


def _checked(entries: list[Entry], layout: Layout) -> list[Entry]:
    if any(entry.number >= MAX_PROMPTS for entry in entries):
        raise UserError(f"{argument('prompts')}: the layout {layout} has at most {MAX_PROMPTS:,} prompts a file.")
    return entries


def _text(file: str) -> str:
    try:
        return read_text(user_path(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{argument('prompts', file)}: the file cannot be read ({error}).") from None


def _parsed(file: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{argument('prompts', file)}: invalid JSON ({shorten(str(error))}).") from None


def check_folder(out: Path) -> None:
    """Check that images can be written to a folder.

    Raises:
        UserError: it is a file, or not empty: images of another export would be counted as images of this one.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder; choose another folder.")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"the folder {out} is not empty; choose another folder.")


def sample_order(entries: Sequence[Entry], images: int) -> Iterator[tuple[Entry, int]]:
    """The prompt of each sample and its number among the images of that prompt: sample i has prompt i mod K.

    Args:
        entries: the K prompts.
        images: number of images of each prompt.
    """
    return ((entry, image) for image in range(images) for entry in entries)


def write_metadata(out: Path, entries: Sequence[Entry]) -> None:
    """Write the `metadata.jsonl` of each prompt of GenEval."""
    for entry in entries:
        if entry.metadata:
            write_atomically(out / f"{entry.number:05d}" / "metadata.jsonl", f"{entry.metadata}\n".encode())


def write_images(out: Path, places: Sequence[Path], images: Tensor) -> None:
    """Write images as PNG or JPEG, by the suffix of each place. JPEGs have the default quality of Pillow (75).

    Args:
        out: the folder.
        places: path of each image within the folder.
        images: (B, C, H, W) in [-1, 1].
    """
    from PIL import Image

    pixels = quantise(images).cpu()
    pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
    for place, image in zip(places, pixels, strict=True):
        buffer = io.BytesIO()
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        picture.save(buffer, format="JPEG" if place.suffix == ".jpg" else "PNG")
        write_atomically(out / place, buffer.getvalue())


def prompts_of(entries: Sequence[Entry], images: int) -> Tensor:
    """The index of the prompt of each sample, (K·images,) int64."""
    return torch.arange(len(entries)).repeat(images)
