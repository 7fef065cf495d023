"""The report as a single HTML file without external resources."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samplerbench.report.formats import payload
from samplerbench.report.latency import html_section, tradeoffs
from samplerbench.report.matrix import Axis
from samplerbench.report.same_noise import compared, encoded, reduced, storage
from samplerbench.report.sheet import block, rows_of, tiles
from samplerbench.report.style import COLOURS
from samplerbench.results.groups import Group
from samplerbench.results.latency import Latency
from samplerbench.text import printable, printable_data

if TYPE_CHECKING:
    from PIL.Image import Image

# Plotly's names of the marks in style.py, and their outlines within a circle of radius 5.
SYMBOLS = {
    "circle": "M5,0A5,5 0 1,1 0,-5A5,5 0 0,1 5,0Z",
    "square": "M4.5,4.5H-4.5V-4.5H4.5Z",
    "triangle-up": "M-5,4H5L0,-5Z",
    "diamond": "M6,0L0,6L-6,0L0,-6Z",
    "triangle-down": "M-5,-4H5L0,5Z",
    "cross": "M5.5,2H2V5.5H-2V2H-5.5V-2H-2V-5.5H2V-2H5.5Z",
    "x": "M0,2.5L3,5.5L5.5,3L2.5,0L5.5,-3L3,-5.5L0,-2.5L-3,-5.5L-5.5,-3L-2.5,0L-5.5,3L-3,5.5Z",
    "hexagon": "M-5,-3V3L0,6L5,3V-3L0,-6Z",
    "triangle-left": "M4,-5V5L-5,0Z",
    "triangle-right": "M-4,-5V5L5,0Z",
    "pentagon": "M-5.5,-1.5L-3.5,5H3.5L5.5,-1.5L0,-6Z",
}
DASHES = ("solid", "dash", "dashdot", "dot")
SAMPLES = 16  # images of each cell on the page
COLUMNS = 4  # columns of the picture of a cell


def page(
    groups: Sequence[Group],
    problems: Sequence[str],
    pictures: dict[str, Path],
    by: Axis | None = None,
    latencies: Sequence[Latency] = (),
) -> str:
    """The HTML page: tables, plot, samples, protocols and commands, with all scripts, styles and images embedded.

    All names are data: without characters that cannot be seen, escaped in the markup, and set as text nodes by the
    script.
    """
    from plotly.offline import get_plotlyjs

    content = printable_data(payload(groups, problems, by))
    content["style"] = {"colours": COLOURS, "symbols": list(SYMBOLS), "paths": SYMBOLS, "dashes": DASHES}
    for record in (r for g in content["groups"] for r in g["records"]):
        record.pop("shown", None)  # in `same` where it is used
    images, side = _images(groups, pictures)
    observed = _observed(groups, pictures)
    content["pictures"] = {key: encoded(_picture(first, observed.get(key)), side) for key, first in images.items()}
    content["restored"] = list(observed)
    content["same"] = printable_data([compared(group, images, observed) for group in groups])
    content["same_note"] = storage(side)
    listed = "".join(f"<li>{html.escape(printable(problem))}</li>" for problem in problems)
    fill = {
        "title": html.escape(title(groups)),
        "css": _template("page.css"),
        "js": _template("page.js"),
        "plotly": get_plotlyjs(),
        "data": embed(content),
        "problems": f'<div class="problems" role="note">Left out of this report:<ul>{listed}</ul></div>'
        if listed
        else "",
        "latency": html_section([t for group in groups for t in tradeoffs(group, latencies)]),
    }
    # Replace in one pass, so that inserted text is not replaced again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: fill[found[1]], _template("page.html"))


def title(groups: Sequence[Group]) -> str:
    """The title of the page: `Samplers on digits`."""
    models = dict.fromkeys(printable(str(r["model"])) for group in groups for r in group.records)
    return "Samplers on " + ", ".join(models)


def embed(content: dict[str, Any]) -> str:
    """JSON for a <script> element, escaped so that it cannot end the element or open a comment."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _images(groups: Sequence[Group], pictures: dict[str, Path]) -> tuple[dict[str, list[Image]], int]:
    """The first images of each cell, by protocol hash, reduced; and the largest side before that, in pixels."""
    images: dict[str, list[Image]] = {}
    side = 0
    for record in (r for group in groups for r in group.records if r["protocol"] in pictures):
        if first := tiles(pictures[record["protocol"]], record, SAMPLES):
            images[record["protocol"]] = [reduced(image) for image in first]
            side = max(side, *first[0].size)
    return images, side


def _observed(groups: Sequence[Group], pictures: dict[str, Path]) -> dict[str, list[tuple[Image, Image]]]:
    """The first truths and observations of each cell with a task, by protocol hash, reduced."""
    found: dict[str, list[tuple[Image, Image]]] = {}
    for record in (r for group in groups for r in group.records if r["protocol"] in pictures and rows_of(r)):
        rows = [tiles(pictures[record["protocol"]], record, SAMPLES, row) for row in ("truth", "observation")]
        if all(rows):
            found[record["protocol"]] = [(reduced(a), reduced(b)) for a, b in zip(*rows, strict=True)]
    return found


def _picture(restored: list[Image], observed: list[tuple[Image, Image]] | None) -> Image:
    """The picture of a cell: 16 samples in a square, or 4 truths, their observations, and their restorations."""
    if observed is None:
        return block(restored, COLUMNS)
    first = observed[:COLUMNS]
    return block([*(truth for truth, _ in first), *(y for _, y in first), *restored[:COLUMNS]], len(first))


def _template(name: str) -> str:
    return (files("samplerbench.report") / "page" / name).read_text("utf-8")
