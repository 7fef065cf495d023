"""A terminal table that is split into several tables if it is too wide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from samplerbench.text import literal

NAME_WIDTH = 26
"""Minimum width of the column of names, whose text wraps."""
FRAME = 3  # characters around a cell: a space on each side, and a border


class WideTable:
    """A table that is split between columns if the terminal is too narrow.

    Args:
        heads: the column headings.
        fixed: number of first columns that each part repeats, if there is space.
        left: number of first columns that are left-aligned.
        name: index of the column whose text wraps.
    """

    def __init__(self, heads: list[str], fixed: int = 1, left: int = 1, name: int = 0) -> None:
        self.heads = [literal(head) for head in heads]
        self.fixed, self.left, self.name = fixed, left, name
        self.rows: list[list[Text]] = []
        self.sections: set[int] = set()
        self.caption = ""
        """A note that is printed below the table."""

    def add_row(self, *cells: str | Text) -> None:
        """Add a row. Missing cells are empty."""
        row = [cell if isinstance(cell, Text) else literal(cell) for cell in cells]
        self.rows.append(row + [Text("")] * (len(self.heads) - len(row)))

    def add_section(self) -> None:
        """Draw a line below the last row."""
        self.sections.add(len(self.rows) - 1)

    def parts(self, width: int) -> list[list[int]]:
        """The columns of each table, none wider than `width` characters as far as one column fits."""
        widths = self._widths()
        if sum(widths) + FRAME * len(widths) + 1 <= width:
            return [list(range(len(widths)))]
        widths[self.name] = self._name_width(widths)
        count = self.fixed
        while count > 1 and sum(widths[:count]) + max(widths[count:], default=0) + FRAME * (count + 1) + 1 > width:
            count -= 1
        fixed = list(range(count))
        room = width - 1 - sum(widths[:count]) - FRAME * count
        found: list[list[int]] = []
        left = 0
        for column in range(count, len(widths)):
            needed = widths[column] + FRAME
            if not found or needed > left:
                found.append(list(fixed))
                left = room
            found[-1].append(column)
            left -= needed
        return found or [fixed]

    def _widths(self) -> list[int]:
        lines = [self.heads, *self.rows]
        return [max(cell_len(line[i].plain) for line in lines) for i in range(len(self.heads))]

    def _name_width(self, widths: list[int]) -> int:
        return min(widths[self.name], NAME_WIDTH)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        parts, widths = self.parts(options.max_width), self._widths()
        for columns in parts:
            table = Table(header_style="bold")
            for i in columns:
                width = self._name_width(widths) if i == self.name and len(parts) > 1 else None
                justify: Literal["left", "right"] = "left" if i < self.left else "right"
                table.add_column(self.heads[i], justify=justify, width=width, overflow="fold")
            for number, row in enumerate(self.rows):
                table.add_row(*(row[i] for i in columns), end_section=number in self.sections)
            yield table
        if self.caption:
            yield literal(self.caption, "dim")
