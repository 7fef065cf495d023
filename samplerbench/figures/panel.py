"""Figures with panels of images in rows and columns, drawn with matplotlib and aligned to pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "svg.hashsalt": "samplerbench",
    "svg.fonttype": "path",
    "text.parse_math": False,
}
SIDE = 0.64
"""Minimum height of an image, in inches."""
INK, FAINT = "#111111", "#666666"


@dataclass(frozen=True)
class Panel:
    """Images in rows and columns, with labels.

    Attributes:
        images: (R, C, channels, H, W) uint8, one or three channels.
        rows: R row labels.
        columns: C column headings, of one or more lines; empty for no headings.
        title: title of the panel, or "".
        group: number of rows that belong together.
    """

    images: Tensor
    rows: Sequence[str]
    columns: Sequence[str]
    title: str = ""
    group: int = 1


@dataclass(frozen=True)
class Drawing:
    """A figure, or one frame of an animation.

    Attributes:
        title: the title.
        panels: the panels, from top to bottom.
        note: the subtitle.
    """

    title: str
    panels: Sequence[Panel]
    note: str = ""


def draw(drawing: Drawing, dpi: int) -> Figure:
    """Draw a figure. Images are enlarged by an integer factor, to a height of at least 0.64 inches.

    If the images are larger than that at `dpi`, they are not enlarged, and the text is scaled with them.

    Raises:
        UserError: a figure of more than 2¹⁶ - 1 pixels a side.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = drawing.panels[0].images.shape[3]
    zoom = max(1, math.ceil(SIDE * dpi / height))
    if height * zoom > 2 * SIDE * dpi:
        dpi = round(height * zoom / (2 * SIDE))
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(1, 1), dpi=dpi, facecolor="white")
        renderer = FigureCanvasAgg(figure).get_renderer()
        sheet = _Sheet(figure, renderer, zoom)
        sheet.lay_out(drawing)
    return figure


class _Sheet:
    """The layout of a figure, in pixels from the top left corner. The size of the figure is computed last."""

    def __init__(self, figure: Figure, renderer: Any, zoom: int) -> None:
        self.figure, self.renderer, self.zoom = figure, renderer, zoom
        self.point = figure.dpi / 72
        self.margin = round(5 * self.point)
        self.placed: list[tuple[Text, float, float]] = []
        self.blocks: list[tuple[np.ndarray, int, int]] = []
        self.width = 0.0

    def text(self, words: str, size: float, **how: Any) -> tuple[Text, float, float]:
        """A text without a position, with its width and height."""
        made = self.figure.text(
            0, 0, printable(words, lines=True), fontsize=size, color=how.pop("color", INK), linespacing=1.25, **how
        )
        box = made.get_window_extent(self.renderer)
        return made, box.width, box.height

    def place(self, made: Text, x: float, y: float) -> None:
        self.placed.append((made, x, y))

    def lay_out(self, drawing: Drawing) -> None:
        names = [[self.text(row, 8, ha="right", va="center") for row in panel.rows] for panel in drawing.panels]
        widest = max((width for rows in names for _, width, _ in rows), default=0.0)
        left = self.margin + (math.ceil(widest + 5 * self.point) if widest else 0)
        top = float(self.margin)
        for words, points, colour in ((drawing.title, 10, INK), (drawing.note, 7.5, FAINT)):
            top = self._line(words, points, colour, self.margin, top, 3)
        for i, (panel, rows) in enumerate(zip(drawing.panels, names, strict=True)):
            top += (12 if i else 3) * self.point if panel.title or i else 0
            top = self._line(panel.title, 9, INK, left, top, 3)
            top = self._panel(panel, rows, left, top)
        size = (math.ceil(self.width + self.margin), math.ceil(top + self.margin))
        if max(size) >= 2**16:
            raise UserError(f"the figure would be {size[0]} x {size[1]} pixels; ask for fewer rows or columns.")
        self._fix(size)

    def _line(self, words: str, size: float, colour: str, left: float, top: float, after: float) -> float:
        if not words:
            return top
        made, width, height = self.text(words, size, color=colour, ha="left", va="top")
        self.place(made, left, top)
        self.width = max(self.width, left + width)
        return top + height + after * self.point

    def _panel(self, panel: Panel, names: list[tuple[Text, float, float]], left: int, top: float) -> float:
        """Draw one panel with its corner at (left, top); returns where it ends."""
        rows, columns, _, height, width = panel.images.shape
        high, wide = height * self.zoom, width * self.zoom
        gap = max(1, round(2 * self.point))
        heads = [self.text(head, 8, ha="center", va="bottom") for head in panel.columns]
        # Headers that would run into each other are made smaller, all alike.
        shrink = max((w / (0.92 * wide) for _, w, _ in heads), default=0.0)
        if heads:
            if shrink > 1:
                for made, _, _ in heads:
                    made.set_fontsize(max(3.5, 8 / shrink))
            top += max(made.get_window_extent(self.renderer).height for made, _, _ in heads) + 2.5 * self.point
            for j, (made, _, _) in enumerate(heads):
                self.place(made, left + j * (wide + gap) + wide / 2, top - 2.5 * self.point)
        between = round(5 * self.point) if panel.group > 1 else gap
        y = math.ceil(top)
        for i, (made, _, _) in enumerate(names):
            self.place(made, left - 5 * self.point, y + high / 2)
            self.blocks.append((_strip(panel.images[i], self.zoom, gap), left, y))
            y += high + (between if (i + 1) % panel.group == 0 else gap) * (i + 1 < rows)
        self.width = max(self.width, left + columns * (wide + gap) - gap)
        return y

    def _fix(self, size: tuple[int, int]) -> None:
        """Set the size of the figure, and the positions of its parts."""
        wide, high = size
        self.figure.set_size_inches(wide / self.figure.dpi, high / self.figure.dpi)
        for made, x, y in self.placed:
            made.set_position((x / wide, 1 - y / high))
        for block, x, y in self.blocks:
            box = (x / wide, 1 - (y + len(block)) / high, block.shape[1] / wide, len(block) / high)
            axes = self.figure.add_axes(box)
            axes.set_axis_off()
            axes.imshow(block, interpolation="nearest", aspect="auto")


def _strip(images: Tensor, zoom: int, gap: int) -> np.ndarray:
    """One row of images (C, channels, H, W) side by side, enlarged: (H·zoom, …, 3) uint8."""
    pixels = images.permute(0, 2, 3, 1).numpy()
    pixels = np.repeat(pixels, 3 // pixels.shape[3], axis=3).repeat(zoom, axis=1).repeat(zoom, axis=2)
    columns, high, wide, _ = pixels.shape
    strip = np.full((high, columns * (wide + gap) - gap, 3), 255, dtype=np.uint8)
    for j, image in enumerate(pixels):
        strip[:, j * (wide + gap) : j * (wide + gap) + wide] = image
    return strip
