"""Colours and marks of series: told apart without colour vision, and in print."""

from __future__ import annotations

# Okabe & Ito 2008, without its yellow, which is lost on white; black comes last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")
LINES = ("-", "--", "-.", ":")


def style(index: int) -> dict[str, str]:
    """Colour, marker and line of the index-th series; 308 of them differ."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
    }
