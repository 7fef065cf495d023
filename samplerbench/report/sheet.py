"""The images in the PNG of samples of a cell."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from samplerbench.results.files import open_regular
from samplerbench.results.record import Record

if TYPE_CHECKING:
    from PIL.Image import Image

KEPT = 100
"""Number of images in the PNG of a cell that does not say it."""


def images_of(record: Record) -> int:
    """The number of images in the PNG of a cell. Results of older versions do not state it."""
    return int(record["shown"]["images"]) if "shown" in record else min(KEPT, int(record["n"]))


def rows_of(record: Record) -> list[str]:
    """The images of each sample in the PNG of a cell: truth, observation and restored. Empty without a task."""
    return list(record.get("shown", {}).get("rows") or [])


def tiles(file: Path, record: Record, count: int, row: str = "restored") -> list[Image]:
    """The first `count` images of a PNG that a cell has written.

    Sample i of every cell with one seed began at the same x_T. Empty where the file is no readable sheet.

    Args:
        file: The PNG.
        record: The result.
        count: Maximum number of samples.
        row: Which image of each sample, in a cell with a task (see `rows_of`).
    """
    from PIL import Image

    kept, rows = images_of(record), rows_of(record) or [row]
    columns = math.ceil(math.sqrt(kept))
    lines = math.ceil(kept / columns) * len(rows)
    try:
        with open_regular(file) as stream, Image.open(stream) as picture:
            sheet = picture.convert("RGB" if picture.mode not in ("L", "RGB") else picture.mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # SyntaxError for a damaged PNG
        return []
    # Without the gaps, the sides of the sheet would be multiples of those of the images.
    gaps = [g for g in range(1, 17) if (sheet.width - g) % columns == 0 and (sheet.height - g) % lines == 0]
    if not gaps:
        return []
    gap = gaps[0]
    wide, high = (sheet.width - gap) // columns, (sheet.height - gap) // lines
    if wide <= gap or high <= gap:
        return []
    places = [(i % columns, i // columns * len(rows) + rows.index(row)) for i in range(min(count, kept))]
    corners = [(gap + x * wide, gap + y * high) for x, y in places]
    return [sheet.crop((x, y, x + wide - gap, y + high - gap)) for x, y in corners]


def block(images: list[Image], columns: int, gap: int = 2, most: int = 128) -> Image:
    """Images side by side on white. Images wider than `most` pixels are scaled down."""
    from PIL import Image

    scale = min(1.0, most / max(images[0].size))
    size = (max(1, round(images[0].width * scale)), max(1, round(images[0].height * scale)))
    lines = math.ceil(len(images) / columns)
    sheet = Image.new(images[0].mode, (columns * (size[0] + gap) - gap, lines * (size[1] + gap) - gap), "white")
    for i, image in enumerate(images):
        small = image if scale == 1 else image.resize(size, Image.Resampling.LANCZOS)
        sheet.paste(small, (i % columns * (size[0] + gap), i // columns * (size[1] + gap)))
    return sheet


def data_uri(image: Image) -> str:
    """The image as a data URI with a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
