"""Write figures: PNG and SVG of one drawing, GIF and animated PNG of several."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from samplerbench.errors import UserError, argument
from samplerbench.figures.panel import SETTINGS, Drawing, draw

Format = Literal["png", "svg", "gif", "apng"]
STILL_DPI, FRAME_DPI = 200, 110


def pick_format(out: Path, animate: bool) -> Format:
    """The format for the suffix of a file: .png, .svg, .gif or .apng. An animated .png is an APNG.

    Raises:
        UserError: another suffix, or an animated SVG.
    """
    suffix = out.suffix.lower()
    if suffix == ".svg" and animate:
        raise UserError(f"{out}: an SVG file cannot be animated; use .gif, .apng or .png with {argument('animate')}.")
    if suffix == ".png":
        return "apng" if animate else "png"
    if suffix == ".svg":
        return "svg"
    if suffix == ".gif":
        return "gif"
    if suffix == ".apng":
        return "apng"
    raise UserError(f"{out}: the file must have the suffix .png, .svg, .gif or .apng.")


def render_still(drawing: Drawing, form: Literal["png", "svg"]) -> bytes:
    """Render a PNG or SVG. Equal drawings give equal bytes. Raises UserError as `draw`."""
    import matplotlib

    buffer = io.BytesIO()
    figure = draw(drawing, STILL_DPI)
    with matplotlib.rc_context(SETTINGS):
        metadata = {"Date": None} if form == "svg" else {}
        figure.savefig(buffer, format=form, dpi=figure.dpi, metadata=metadata)
    return buffer.getvalue()


def render_animation(frames: Sequence[Drawing], form: Literal["gif", "apng"], seconds: float) -> bytes:
    """Render an endless animation. All frames have the size of the largest one. Raises UserError as `draw`.

    Args:
        frames: the frames.
        form: "gif" or "apng".
        seconds: duration of a frame; the last one is shown longer.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    pictures = []
    for frame in frames:
        canvas = FigureCanvasAgg(draw(frame, FRAME_DPI))
        canvas.draw()
        pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    size = (max(p.width for p in pictures), max(p.height for p in pictures))
    sheets = [Image.new("RGB", size, "white") for _ in pictures]
    for sheet, picture in zip(sheets, pictures, strict=True):
        sheet.paste(picture, (0, 0))
    wait = [round(1000 * seconds)] * (len(sheets) - 1) + [max(1500, round(1000 * seconds))]
    buffer = io.BytesIO()
    first, rest = sheets[0], sheets[1:]
    first.save(
        buffer, format="GIF" if form == "gif" else "PNG", save_all=True, append_images=rest, duration=wait, loop=0
    )
    return buffer.getvalue()
