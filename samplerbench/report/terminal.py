"""A report in the terminal: tables, and plots in braille."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from samplerbench.report.formats import AXIS_NAMES
from samplerbench.report.matrix import Entry, Matrix
from samplerbench.report.series import Series
from samplerbench.report.table import BEST_NOTE, format_value
from samplerbench.report.wide import WideTable
from samplerbench.results.names import metric_title
from samplerbench.text import literal, printable

COLOURS = ("blue", "red", "green", "magenta", "yellow", "cyan", "white")
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, by row and column


def matrix_table(matrix: Matrix) -> Group:
    """Rows are samplers, columns are steps or budgets. The best of a column is bold, with a *; ties have ≈."""
    title = f"{metric_title(matrix.metric)} {matrix.arrow}{matrix.measured_in}"
    table = WideTable([f"sampler \\ {AXIS_NAMES[matrix.axis]}", *matrix.heads])
    for name, row in matrix.rows:
        table.add_row(literal(name), *(_cell(entry, matrix.blank(name)) for entry in row))
    best = [BEST_NOTE] if any(entry is not None and entry.best for _, row in matrix.rows for entry in row) else []
    return Group(literal(title, "bold"), table, *[Text(note, style="dim") for note in [*best, *matrix.notes]])


def _cell(entry: Entry | None, blank: str) -> Text:
    if entry is None:
        return Text(blank, "dim")
    if entry.best:
        return Text(f"* {entry.text}", "bold green")
    return Text(f"≈ {entry.text}", "green") if entry.tied else Text(entry.text)


def text_plot(
    found: Sequence[Series], x_name: str, y_name: str, log_y: bool, width: int = 64, height: int = 14
) -> Text:
    """A plot in braille with a letter at each point. x is logarithmic, y optionally. A legend explains the letters.

    Where two points fall into one character, the first series keeps it.
    """
    points = [(x, y) for s in found for x, y in zip(s.x, s.y, strict=True) if x > 0 and (y > 0 or not log_y)]
    if not points:
        return Text("")
    up = math.log if log_y else float
    xs, ys = [math.log(x) for x, _ in points], [up(y) for _, y in points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = 0.5 if right == left else (math.log(x) - left) / (right - left)
        above = 0.5 if high == low else (up(y) - low) / (high - low)
        return across * (2 * width - 1), (1 - above) * (4 * height - 1)

    dots: dict[tuple[int, int], tuple[int, int]] = {}
    letters: dict[tuple[int, int], tuple[str, int]] = {}
    for i, s in enumerate(found):
        spots = [place(x, y) for x, y in zip(s.x, s.y, strict=True) if x > 0 and (y > 0 or not log_y)]
        for (x0, y0), (x1, y1) in itertools.pairwise(spots):
            count = max(1, math.ceil(max(abs(x1 - x0), abs(y1 - y0))))
            for k in range(count + 1):
                column, line = round(x0 + (x1 - x0) * k / count), round(y0 + (y1 - y0) * k / count)
                cell = (line // 4, column // 2)
                bits, owner = dots.get(cell, (0, i))
                dots[cell] = (bits | DOTS[line % 4][column % 2], owner)
        for across, down in spots:
            letters.setdefault((round(down) // 4, round(across) // 2), (_letter(i), i))
    return _assemble(found, dots, letters, (x_name, y_name), (points, log_y), width, height)


def _letter(index: int) -> str:
    return "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"[index % 52]


def _assemble(
    found: Sequence[Series],
    dots: dict[tuple[int, int], tuple[int, int]],
    letters: dict[tuple[int, int], tuple[str, int]],
    names: tuple[str, str],
    scale: tuple[list[tuple[float, float]], bool],
    width: int,
    height: int,
) -> Text:
    points, log_y = scale
    bottom, top = min(y for _, y in points), max(y for _, y in points)
    middle = math.sqrt(bottom * top) if log_y else (bottom + top) / 2
    marks = {0: top, height // 2: middle, height - 1: bottom} if top > bottom else {height // 2: top}
    text = literal(names[1], "bold").append("\n")
    for line in range(height):
        text.append(f"{format_value(marks[line]) if line in marks else '':>9} ", style="dim")
        text.append("┤" if line in marks else "│", style="dim")
        for column in range(width):
            if (line, column) in letters:
                letter, i = letters[line, column]
                text.append(letter, style=f"bold {COLOURS[i % len(COLOURS)]}")
            elif (line, column) in dots:
                bits, i = dots[line, column]
                text.append(chr(0x2800 + bits), style=COLOURS[i % len(COLOURS)])
            else:
                text.append(" ")
        text.append("\n")
    first, last = f"{min(x for x, _ in points):g}", f"{max(x for x, _ in points):g}"
    text.append(" " * 10 + "└" + "─" * width + "\n", style="dim")
    text.append(" " * 11 + first + names[0].center(width - len(first) - len(last)) + last + "\n", style="dim")
    for i, s in enumerate(found):
        text.append(f"{'':11}{_letter(i)}", style=f"bold {COLOURS[i % len(COLOURS)]}")
        text.append(f"  {printable(s.label)}\n")
    return text
