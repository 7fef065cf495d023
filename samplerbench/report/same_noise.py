"""Samples of several cells that have the same noise and the same prompt or label, side by side."""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from samplerbench.report.sheet import data_uri
from samplerbench.results.groups import Group
from samplerbench.results.names import is_generator
from samplerbench.results.record import Record

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SIDE = 256
"""Maximum height and width of a sample on the page, in pixels. Larger images are scaled down."""
MAX_LOSSLESS = 128
"""Maximum height and width of a sample that is stored as PNG. Larger ones are stored as JPEG."""
JPEG_QUALITY = 90
SMALL = 64
"""Height and width up to which a sample is enlarged without interpolation, in pixels."""
MAX_SAMPLES = 8
"""Maximum number of samples that are compared in each group."""
MIN_SAMPLES = 4
"""Number of samples that are compared if there are fewer prompts or labels, and images enough."""
MAX_PIXELS = 2**24
"""Maximum number of pixels of all samples of a group: 32 cells with 8 samples of 256 x 256."""


@dataclass(frozen=True)
class Start:
    """What a sample begins with: all of it determines the noise z and the condition.

    Attributes:
        seed: Seed of the cell.
        index: Index of the sample.
        label: Label, or index of the prompt. None if the model has none, or if the result does not state it.
        text: Prompt, or name of the class. "" if there is none.
        id: Id of the prompt. "" if there is none.
        condition: The `labels` argument of the run and the number of samples of each label, as JSON.
    """

    seed: int
    index: int
    label: int | None
    text: str
    id: str
    condition: str

    def heading(self, prompts: bool) -> str:
        """The prompt or the class: `a red cat`, `Class 3: cat`, `Sample 0`.

        Args:
            prompts: Whether the model is conditioned on prompts.
        """
        if self.label is None:
            return f"Sample {self.index}"
        if prompts:
            return self.text or f"Prompt {self.label}"
        return f"Class {self.label}" + (f": {self.text}" if self.text else "")

    def note(self, prompts: bool) -> str:
        """The id and the indices: `id p1, prompt 0, sample 0, seed 0`."""
        parts = [f"id {self.id}"] if self.id else []
        parts += [f"prompt {self.label}"] if prompts and self.label is not None and self.text else []
        parts += [] if self.label is None else [f"sample {self.index}"]
        return ", ".join([*parts, f"seed {self.seed}"])


def condition_of(record: Record) -> str:
    """What determines the labels or prompts of a cell besides the index: `labels`, their counts, and the model."""
    protocol = record["protocol_fields"]
    return json.dumps([record["labels"], protocol.get("labels"), protocol.get("model")], sort_keys=True)


def starts_of(record: Record, images: int, shown: Mapping[str, Any] | None = None) -> list[Start]:
    """What the first samples of a cell began with. Empty for a generator, which does not begin with the noise z.

    Sample i of a seed has the same z in every cell, and its label or prompt depends only on i. The label is that of
    the field `shown` of the result. Results of older versions do not have it.

    Args:
        record: The result.
        images: Number of samples.
        shown: The field `shown` of another result with the same condition, for a result without it.
    """
    if is_generator(record):
        return []
    shown = record.get("shown") or shown or {}
    labels, texts, ids = (shown.get(name) for name in ("labels", "texts", "ids"))
    if labels is None and record["labels"].isdecimal():  # one label for all samples
        labels, texts, ids = [int(record["labels"])] * images, None, None
    condition = condition_of(record)
    return [
        Start(
            record["seed"],
            i,
            None if labels is None else labels[i],
            texts[i] if texts else "",
            ids[i] if ids else "",
            condition,
        )
        for i in range(images if labels is None else min(images, len(labels)))
    ]


def choose(starts: Sequence[Start], most: int) -> list[Start]:
    """The samples to show: the first of each prompt or label, and then others if these are fewer than `MIN_SAMPLES`.

    Args:
        starts: The samples of one seed, in the order of their indices.
        most: Maximum number.
    """
    firsts = {start.label: start for start in reversed(starts) if start.label is not None}
    chosen = sorted(firsts.values(), key=lambda start: start.index)[:most]
    others = [start for start in starts if start not in chosen]
    chosen += others[: max(0, min(MIN_SAMPLES, most) - len(chosen))]
    return sorted(chosen, key=lambda start: start.index)


def compared(
    group: Group,
    pictures: Mapping[str, Sequence[Image]],
    observed: Mapping[str, Sequence[tuple[Image, Image]]] | None = None,
) -> list[dict[str, Any]]:
    """The samples of a group that are compared, as data of the page.

    Args:
        group: Comparable results.
        pictures: Protocol hash → first images of the cell, reduced (see `reduced`).
        observed: Protocol hash → first truths and observations of a cell with a task, reduced.

    Returns:
        For each sample, `heading`, `note`, `small` (see `SMALL`) and `tiles`: protocol hash → data URI of the image.
        With a task, also the data URIs `truth` and `observation`. A sample that only one cell has is left out.
    """
    observed = observed or {}
    described = {condition_of(record): record["shown"] for record in group.records if "shown" in record}
    cells: dict[Start, dict[str, Image]] = defaultdict(dict)
    for record in group.records:
        images = pictures.get(record["protocol"], ())
        starts = starts_of(record, len(images), described.get(condition_of(record)))
        for start, image in zip(starts, images, strict=False):
            cells[start][record["protocol"]] = image
    shared = {start: tiles for start, tiles in cells.items() if len(tiles) > 1}
    if not shared:
        return []
    prompts = _has_prompts(group.records[0])
    most = _affordable(shared)
    seeds: dict[tuple[int, str], list[Start]] = defaultdict(list)
    for start in sorted(shared, key=lambda s: s.index):
        seeds[start.seed, start.condition].append(start)
    return [
        {
            "heading": start.heading(prompts),
            "note": start.note(prompts),
            "small": max(next(iter(shared[start].values())).size) <= SMALL,
            "tiles": {key: encoded(image, max(image.size)) for key, image in shared[start].items()},
            **_observation(start, [observed[key] for key in shared[start] if key in observed]),
        }
        for starts in seeds.values()
        for start in choose(starts, most)
    ]


def _observation(start: Start, cells: Sequence[Sequence[tuple[Image, Image]]]) -> dict[str, str]:
    """The truth and the observation of a sample, which are the same in every cell of a group, as data URIs."""
    pair = next((cell[start.index] for cell in cells if start.index < len(cell)), None)
    if pair is None:
        return {}
    return {name: encoded(image, max(image.size)) for name, image in zip(("truth", "observation"), pair, strict=True)}


def _has_prompts(record: Record) -> bool:
    """Whether the model of a result is conditioned on prompts, according to its protocol."""
    return bool((record["protocol_fields"].get("model") or {}).get("prompts"))


def _affordable(shared: Mapping[Start, Mapping[str, Image]]) -> int:
    """How many samples of each seed may be shown, so that the page does not become too large."""
    tiles = max(shared.values(), key=len)
    width, height = next(iter(tiles.values())).size
    seeds = len({(start.seed, start.condition) for start in shared})
    return max(1, min(MAX_SAMPLES, MAX_PIXELS // (width * height * len(tiles) * seeds)))


def scaled(size: tuple[int, int]) -> tuple[int, int]:
    """The size of an image on the page: (width, height), at most `MAX_SIDE` each."""
    scale = min(1.0, MAX_SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def reduced(image: Image) -> Image:
    """An image as it is shown on the page: scaled down to `MAX_SIDE` if it is larger."""
    import PIL.Image

    size = scaled(image.size)
    return image if size == image.size else image.resize(size, PIL.Image.Resampling.LANCZOS)


def encoded(image: Image, side: int) -> str:
    """An image as a data URI: PNG if the samples have up to `MAX_LOSSLESS` pixels a side, else JPEG.

    Args:
        image: One or several samples.
        side: Maximum height and width of a sample, in pixels.
    """
    if side <= MAX_LOSSLESS:
        return data_uri(image)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def storage(side: int) -> str:
    """A sentence about how the samples are stored on the page; "" if no pixel is changed.

    Args:
        side: Maximum height and width of the samples, in pixels.
    """
    if side <= MAX_LOSSLESS:
        return ""
    smaller = f"scaled down to {MAX_SIDE} pixels and " if side > MAX_SIDE else ""
    return f"The samples are {smaller}compressed as JPEG of quality {JPEG_QUALITY}; the PNG files have all pixels."


__all__ = ["Start", "choose", "compared", "encoded", "reduced", "starts_of", "storage"]
