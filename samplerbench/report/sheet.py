"""The images of a cell's sample sheet, cut out again."""

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

KEPT = 100  # what a run keeps of a cell for its sheet


def tiles(file: Path, record: Record, count: int) -> list[Image]:
    """The first `count` images of a sheet, as `save_grid` lays them out: about square, in reading order.

    Sample i of every cell with one seed began at the same x_T. Empty where the file is no readable sheet.
    """
    from PIL import Image

    kept = min(KEPT, record["n"])
    columns = math.ceil(math.sqrt(kept))
    lines = math.ceil(kept / columns)
    try:
        with open_regular(file) as stream, Image.open(stream) as picture:
            sheet = picture.convert("RGB" if picture.mode not in ("L", "RGB") else picture.mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # a broken PNG is a SyntaxError
        return []
    # The gap around images is all that keeps the sheet's sides from being whole multiples.
    gaps = [g for g in range(1, 17) if (sheet.width - g) % columns == 0 and (sheet.height - g) % lines == 0]
    if not gaps:
        return []
    gap = gaps[0]
    wide, high = (sheet.width - gap) // columns, (sheet.height - gap) // lines
    if wide <= gap or high <= gap:
        return []
    corners = [(gap + i % columns * wide, gap + i // columns * high) for i in range(min(count, kept))]
    return [sheet.crop((x, y, x + wide - gap, y + high - gap)) for x, y in corners]


def block(images: list[Image], columns: int, gap: int = 2, most: int = 128) -> Image:
    """Images side by side on white; those wider than `most` pixels are scaled down."""
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
    """The image as a PNG within a URI."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
