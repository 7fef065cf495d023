"""`samplerbench results ls`: keys that `show` and `rm` accept, in the groups of the report's tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.synthetic_results import put, record
from typer.testing import CliRunner

from samplerbench.cli.app import app
from samplerbench.cli.results import _key_length


def results(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["results", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def listed(text: str) -> list[tuple[str, str]]:
    """Key and sampler of each line."""
    return re.findall(r"^│ ([0-9a-f]{8,}) │ (\S+)", text, re.MULTILINE)


def test_every_line_begins_with_a_key_that_show_and_rm_accept(tmp_path: Path) -> None:
    put(tmp_path, record("ddim", 5), record("ddim", 10), record("heun"), shade=9)
    found = listed(results("ls", str(tmp_path)))
    assert sorted(name for _, name in found) == ["ddim", "ddim", "heun"]
    for key, name in found:
        assert json.loads(results("show", key, str(tmp_path)))["sampler"] == name
        results("rm", key, str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert results("ls", str(tmp_path)) == "no results\n"


def test_the_groups_and_their_titles_are_those_of_the_report(tmp_path: Path) -> None:
    put(tmp_path, record("ddim"), record("heun"), record("unipc", n=16))
    text = results("ls", str(tmp_path))
    report = CliRunner().invoke(app, ["report", str(tmp_path), "--format", "md"]).stdout
    heads = [line for line in report.splitlines() if line.startswith(("n = ", "digits, ", "2 protocols"))]
    assert len(heads) == 5
    assert [line for line in text.splitlines() if line in heads] == heads
    assert [name for _, name in listed(text[: text.index("n = 16")])] == ["ddim", "heun"]
    assert [name for _, name in listed(text[text.index("n = 16") :])] == ["unipc"]


def test_results_that_the_report_merges_keep_their_keys(tmp_path: Path) -> None:
    """Two files with different metrics of the same images are one row of a table, and two results."""
    files = put(tmp_path, record(metrics={"fid": 3.0}), record(metrics={"kid": 0.5}))
    assert {key for key, _ in listed(results("ls", str(tmp_path)))} == {file.stem[:8] for file in files}


def test_a_narrow_terminal_has_the_key_in_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = put(tmp_path, record("s" * 50, metrics={f"metric-{i}": i / 7 for i in range(6)}))
    monkeypatch.setenv("COLUMNS", "60")
    text = results("ls", str(tmp_path))
    assert max(map(len, text.splitlines())) <= 60
    assert text.count(f"│ {file.stem[:8]} ") == text.count("┃ key ") > 1
    assert "0.714" in text


def test_keys_are_long_enough_to_tell_the_results_apart() -> None:
    assert _key_length(["0123456789abcdef0123"]) == 8
    assert _key_length(["0123456789a" + end * 9 for end in "bc"]) == 12
    assert _key_length([]) == 8
