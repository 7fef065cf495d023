"""Tables in a terminal of any width: no value is cut, and none is left out."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from support.synthetic_results import record

from samplerbench.bench.prepare import prepare
from samplerbench.bench.request import Grid, Request
from samplerbench.bench.run import Run
from samplerbench.report.matrix import matrix
from samplerbench.report.table import long_table, steps_table
from samplerbench.report.terminal import matrix_table
from samplerbench.report.wide import FRAME, NAME_WIDTH, WideTable
from samplerbench.results.groups import group
from samplerbench.results.store import Store
from samplerbench.text import note, unwrapped

METRICS = {"fid": [123.4, 125.0], "label-accuracy": [0.0773, 0.0901], "gap": [1e-5, 3e-5]}
RECORDS = [
    record(sampler, steps, guidance=guidance, metrics=METRICS)
    for sampler in ("ddim", "./a/long/path/to/my_sampler.py:MySampler", "画像モデルの名前はとても長いことがあります")
    for guidance in (None, "cfg:scale=1.5")
    for steps in (5, 10, 20, 50, 100, 200)
]


def lines(content: Any, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(content)
    return out.getvalue().splitlines()


def columns_of(printed: list[str]) -> dict[str, int]:
    """How often each heading stands above a column."""
    heads = [cell.strip() for line in printed if line.startswith("┃") for cell in line.strip("┃").split("┃")]
    return {head: heads.count(head) for head in heads}


@pytest.mark.parametrize("width", [60, 80, 100, 160, 400])
@pytest.mark.parametrize("make", ["matrix", "steps", "long"])
def test_every_value_is_whole_at_every_width(make: str, width: int) -> None:
    content = {
        "matrix": lambda: matrix_table(matrix(group(RECORDS)[0], "fid", "steps")),
        "steps": lambda: steps_table(RECORDS, "fid", (3.0, 0.5, 300)),
        "long": lambda: long_table(RECORDS),
    }[make]()
    printed = lines(content, width)
    assert max(map(cell_len, printed)) <= width
    cells = [cell.strip() for line in printed if line.startswith("│") for cell in line.strip("│").split("│")]
    if make == "long":
        assert cells.count("0.0837") == cells.count("2.0e-05") == cells.count("124.2") == len(RECORDS)
        heads = {"fid", "label-accuracy", "gap", "seconds", "images/s"}
    else:
        assert sum("124.2 ± 1" in cell for cell in cells) == len(RECORDS)
        heads = {"5", "10", "20", "50", "100", "200"}
    assert all(columns_of(printed)[head] == 1 for head in heads)


def test_what_fits_is_one_table_and_parts_repeat_the_first_columns() -> None:
    table = WideTable(["name", "steps", "a", "b"], fixed=2)
    table.add_row("x" * 40, "5", "1" * 10, "2" * 10)
    whole = 40 + 5 + 10 + 10 + 4 * FRAME + 1
    assert table.parts(whole) == [[0, 1, 2, 3]]
    assert table.parts(NAME_WIDTH + 5 + 10 + 3 * FRAME + 1) == [[0, 1, 2], [0, 1, 3]]
    assert table.parts(1) == [[0, 1], [0, 2], [0, 3]]
    assert WideTable(["name"]).parts(1) == [[0]]


def test_the_table_that_fills_in_while_a_run_goes_on_can_be_drawn(tmp_path: Path) -> None:
    """A terminal shows it; the other tests have none."""
    request = Request([Grid(["ddim", "ddim:eta=0.5"], [2, 3])], model="exact:mixture", n=70)
    prepared = prepare(request, "cpu")
    pending = Run(prepared, Store(tmp_path)).pending
    printed = lines(steps_table(pending, "fid"), 80)
    assert [line.split("│")[1:4] for line in printed if line.startswith("│")] == [
        [f" {name.ljust(15)} ", " … ", " … "] for name in ("ddim:eta=0", "ddim:eta=0.5")
    ]


def test_a_docstring_is_wrapped_as_paragraphs_where_it_does_not_fit() -> None:
    wide = "Its formula:\nx ← " + "a " * 50 + "b\ncontinues here. A second sentence.\n\n- an item"
    assert unwrapped(wide, 120) == wide
    assert unwrapped(wide, 80) == wide.replace("b\ncontinues", "b continues")
    formulas = "x ← " + "y " * 40 + "\nand z\n  indented"
    assert unwrapped(formulas, 60) == formulas  # the next word would have fitted: the break is meant


def test_a_message_is_wrapped_between_words_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    message = "one two three four five six seven eight ./a/path/of/more/than/forty/columns/my-file.py"
    note(message)
    assert capsys.readouterr().err == f"samplerbench: {message}\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    note(message)
    printed = capsys.readouterr().err.splitlines()
    assert " ".join(printed) == f"samplerbench: {message}"
    assert [len(line) <= 40 for line in printed] == [True, True, False]
