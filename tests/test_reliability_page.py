"""docs/reliability.md: every test it names exists, and it counts right."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text("utf-8")


def rows(page: str) -> list[tuple[str, list[str]]]:
    """(promise, tests) of every row of every table."""
    cells = [line.strip("|").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return [(row[0].strip(), re.findall(r"`([^`]*)`", row[-1])) for row in cells if row[0].strip() != "promise"]


PROMISES = [row for row in rows(PAGE) if not set(row[0]) <= set("- ")]


@cache
def functions(file: Path) -> set[str]:
    """The test functions of a module."""
    return {node.name for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("promise", [promise for promise, _ in PROMISES])
def test_every_promise_names_tests_that_exist(promise: str) -> None:
    names = dict(PROMISES)[promise]
    assert names, "name a test, as `test_file.py::test_function`"
    for name in names:
        assert re.fullmatch(r"test_\w+\.py::test_\w+", name), f"{name} is not file::function"
        file, _, function = name.partition("::")
        assert (ROOT / "tests" / file).is_file(), name
        assert function in functions(ROOT / "tests" / file), name


def test_the_number_at_the_top_is_the_number_of_rows() -> None:
    said = re.search(r"\*\*(\d+) promises\*\*", PAGE)
    assert said is not None
    assert int(said[1]) == len(PROMISES), f"docs/reliability.md has {len(PROMISES)} rows; write this number at its top"


def test_no_promise_stands_twice() -> None:
    promises = [promise for promise, _ in PROMISES]
    assert len(set(promises)) == len(promises)


def test_every_row_is_read() -> None:
    """A row that the pattern above missed would be neither counted nor checked."""
    lines = [line for line in PAGE.splitlines() if "test_" in line and line.startswith("|")]
    assert len(lines) == len(PROMISES)
    assert len(PROMISES) > 90
