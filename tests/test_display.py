"""What others wrote never acts on who reads it: a terminal, a shell, a spreadsheet, Markdown, LaTeX or a browser.

Names, specs, messages and file names may come from a plugin, a checkpoint or a result file of a stranger.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import shlex
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.synthetic_results import put, record
from typer.testing import CliRunner

import samplerbench
from samplerbench.cli.app import app, main
from samplerbench.figures.panel import Drawing, Panel
from samplerbench.notebook import NotebookProgress
from samplerbench.progress import Progress
from samplerbench.report import formats
from samplerbench.report.html import page
from samplerbench.report.plots import metric_figure, save
from samplerbench.report.published import published_table
from samplerbench.report.reproduce import command
from samplerbench.report.table import long_table, steps_table
from samplerbench.results.groups import group
from samplerbench.results.store import Store
from samplerbench.text import csv_cell, is_printable, json_text, literal, printable

PACKAGE = Path(samplerbench.__file__).parent
HIDDEN = {
    "escape": "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "C0": "a\rb\x00c\x08d",
    "C1": "a\x9b31mb\x85",
    "delete": "a\x7fb",
    "newline": "one\ntwo\r\nthree",
    "tab": "a\tb",
    "override": "ddim\u202egnp.exe\u202c",
    "isolate": "a\u2066b\u2069",
    "zero width": "dd\u200bim\u200d\ufeff",
    "soft hyphen": "dd\u00adim",
    "separator": "a\u2028b\u2029c",
    "tag": "a\U000e0041\U000e0042",
    "private": "a\ue000b",
    "surrogate": "a\udcffb",
    "filler": "a\u3164b\u115f\u2800",
    "variation": "a\ufe0fb",
    "marks": "e" + "\u0301" * 40,
}
VISIBLE = [
    "ddim:eta=0.5",
    "dpm++ (β, σ → 0)",
    "画像 モデル",
    "Ünïcödé",
    "नमस्ते",
    "e\u0301",
    "[red]x[/red]",
    ":smile:",
    "🎨",
]
NASTY = "=1+1\x1b]8;;http://x\x07[red]`<b>&|$x$_{\\}:smile:\u202e\n\u2028\u200b'\"; rm -rf ~ #"
"""One name with something for every reader."""


def harmless(text: str) -> bool:
    """Whether a text has nothing that cannot be seen, apart from its line breaks; by Unicode's own categories."""
    return not any(c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp") for c in text)


# --- The one function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HIDDEN.values(), ids=HIDDEN)
def test_what_cannot_be_seen_is_written_as_an_escape(text: str) -> None:
    shown = printable(text)
    assert harmless(shown)
    assert "\n" not in shown
    assert "\\" in shown
    assert not is_printable(text)
    assert printable(shown) == shown


@pytest.mark.parametrize("text", VISIBLE)
def test_what_can_be_seen_stays(text: str) -> None:
    assert printable(text) == text
    assert is_printable(text)


def test_names_that_differ_in_what_cannot_be_seen_look_different() -> None:
    names = [*HIDDEN.values(), "ddim", "dd\u200cim", "dd\u200bim"]
    assert len({printable(name) for name in names}) == len(set(names))


def test_several_lines_stay_lines_where_they_may() -> None:
    assert printable("a\n\tb\r\nc\x1b\v", lines=True) == "a\n    b\nc\\x1b\\x0b"


@pytest.mark.parametrize("text", [*HIDDEN.values(), *VISIBLE, NASTY])
def test_json_is_exact_and_harmless(text: str) -> None:
    written = json_text({text: [text, float("inf")]})
    assert json.loads(written) == {text: [text, float("inf")]}
    assert harmless(written)
    written.encode()
    with pytest.raises(ValueError, match="JSON"):
        json_text([float("nan")], allow_nan=False)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\r=1", "\n=1", "＝1", "－1"])
def test_no_text_of_a_csv_is_a_formula(text: str) -> None:
    cell = csv_cell(text)
    assert cell == "'" + printable(text)
    assert [csv_cell(v) for v in (-1.5, 3, None, True, "ddim", "a=b")] == [-1.5, 3, None, True, "ddim", "a=b"]


# --- Every output ----------------------------------------------------------------------------------------------------


def nasty() -> list[dict[str, Any]]:
    """Records in which every text of a stranger is NASTY, and one beside them that is not."""
    protocol = {
        "sampler": {"name": NASTY, "parameters": {NASTY: NASTY}, "source": NASTY},
        "features": {"name": NASTY, "weights": NASTY},
        "reference": {"name": NASTY, "sha256": NASTY},
        "guidance": {"name": NASTY, "parameters": {NASTY: NASTY}, "source": NASTY},
        "dtype": NASTY,
        NASTY: NASTY,
    }
    change = {"spacing": NASTY, "model": NASTY, "labels": NASTY, "versions": {NASTY: NASTY}, "device": NASTY}
    made = [record(NASTY, steps, protocol=protocol, metrics={NASTY: [1.0, 2.0]}, **change) for steps in (5, 10)]
    for r in made:
        r["guidance"] = NASTY
        r["metrics"][NASTY] |= {"features": NASTY, "reference": NASTY}
    return [*made, record("ddim", metrics={"fid": [3.0, 4.0]})]


def printed(content: Any) -> str:
    """What rich prints for a content: with escape codes of its own, which only a terminal gets."""
    out = io.StringIO()
    Console(file=out, width=200).print(content)
    return out.getvalue()


OUTPUTS: dict[str, Callable[[], str]] = {
    "steps table": lambda: printed(steps_table(nasty(), NASTY)),
    "long table": lambda: printed(long_table(nasty())),
    "published": lambda: printed(published_table([(r, NASTY, 1.0, NASTY) for r in nasty()])),
    "markdown": lambda: formats.markdown(group(nasty()), [NASTY], None),
    "latex": lambda: formats.latex(group(nasty()), None),
    "csv": lambda: formats.to_csv(group(nasty())),
    "command": lambda: "\n".join(map(command, nasty())),
    "page": lambda: re.sub(r"<script>.*?</script>", "", page(group(nasty()), [NASTY], {}), flags=re.S),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_no_output_holds_what_cannot_be_seen(output: str) -> None:
    text = OUTPUTS[output]()
    assert harmless(text)
    assert re.search(r"\[red\\?\]", text)  # no markup of rich, so shown
    assert "😄" not in text
    text.encode()


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", ".", "--format", "md,csv,json,html,latex", "--plot"],
        ["results", "ls", "."],
        ["results", "validate", "."],
        ["compare", ".", "--a", "steps=5", "--b", "steps=10", "--metric", NASTY],
        ["compare", ".", "--a", "steps=5", "--b", "steps=10", "--metric", NASTY, "--json"],
        ["compare", ".", "--a", "sampler=none"],
        ["show", NASTY],
        ["check", NASTY],
        ["run", "-s", NASTY],
        ["run", "-s", "ddim", "-m", NASTY],
        ["run", NASTY],
        ["figure", "steps", f"{NASTY}.png", "-s", NASTY],
        [NASTY],
    ],
    ids=lambda words: " ".join(w for w in words[:5] if harmless(w) and len(w) < 15) or "no command",
)
def test_no_command_prints_what_cannot_be_seen(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, *nasty())
    (tmp_path / "run.log").write_text(f"t  {NASTY.splitlines()[0]}, 5 steps: failed: {NASTY}\n", "utf-8")
    (tmp_path / "a\x1b[31m\u202e.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(arguments)
    shown = capsys.readouterr()
    assert shown.out + shown.err
    assert harmless(shown.out + shown.err)


def test_the_written_report_is_harmless_and_its_json_exact(tmp_path: Path) -> None:
    put(tmp_path, *nasty())
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 0
    files = [f for f in (tmp_path / "report").rglob("*") if f.suffix not in (".png", ".html")]
    assert {f.suffix for f in files if f.is_file()} == {".md", ".csv", ".tex", ".json", ".svg"}
    for file in (f for f in files if f.is_file()):
        assert harmless(file.read_text("utf-8")), file.name
    found = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    assert {r["model"] for g in found["groups"] for r in g["records"]} == {NASTY, "digits"}


def test_lines_of_progress_and_of_the_log_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for bars in (Progress(1, log=tmp_path / "run.log"), NotebookProgress(2)):
        with bars.running() as progress, progress.cell(NASTY, 5, 1, 1):
            progress.done(f"{NASTY}: failed: {NASTY}")
    shown = capsys.readouterr()
    assert harmless(re.sub(r"[\r\n]|\x1b\[A", "", shown.err + shown.out))  # tqdm's own ways through its lines
    assert len((tmp_path / "run.log").read_text("utf-8").splitlines()) == 1
    assert harmless((tmp_path / "run.log").read_text("utf-8"))


def test_bars_and_tables_render_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    bars = Progress(1)
    bars.bars.add_task("[red]x[/red]:smile:", total=1, rate="")
    assert "[red]x[/red]:smile:" in printed(bars.bars.get_renderable())
    assert literal("[b]:smile:").plain == "[b]:smile:"


# --- What each format must not do ------------------------------------------------------------------------------------


def test_a_command_with_what_cannot_be_seen_is_not_offered() -> None:
    for name, text in HIDDEN.items():
        offered = command(record(text))
        assert offered.startswith("# not offered"), name
        assert "\n" not in offered
    words = shlex.split(command(record("ddim; rm -rf ~ $(x) `y` 'z' \"w\"", model="画像 モデル")))
    assert words[:4] == ["samplerbench", "run", "--sampler", "ddim; rm -rf ~ $(x) `y` 'z' \"w\""]
    assert "画像 モデル" in words


def test_the_page_offers_to_copy_only_commands(tmp_path: Path) -> None:
    text = page(group(nasty()), [], {})
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert data is not None
    found = json.loads(data[1])
    assert {r["command"][:11] for g in found["groups"] for r in g["records"]} == {"samplerbenc", "# not offer"}
    assert harmless(json.dumps(found, ensure_ascii=False))
    assert 'startsWith("#") ? [] : [copy]' in text
    assert "<b>" not in text.partition("<script")[0]


def test_a_csv_of_strangers_has_no_formula_and_its_numbers_are_numbers() -> None:
    made = [record("=cmd|' /C calc'!A0", metrics={"-x": [-3.5, -4.5]}), record("@SUM(1)", metrics={"-x": -1.0})]
    (head, *rows) = list(csv.reader(io.StringIO(formats.to_csv(group(made)))))
    for cell in (c for line in (head, *rows) for c in line if c[:1] in "=+-@\t\r" and c):
        float(cell)
    values = dict(zip(head, rows[0], strict=True))
    assert values["sampler"] == "'=cmd|' /C calc'!A0"
    assert [float(line[head.index("'-x")]) for line in rows] == [-4.0, -1.0]


def test_markdown_of_strangers_is_text() -> None:
    names = [
        "- item",
        "+ item",
        "1. item",
        "2) item",
        "===",
        "# head",
        "> quote",
        "[x](http://y)",
        "<img src=x>",
        "$x$",
    ]
    for name in names:
        text = formats.markdown(group([record(model=name)]), [name], None)
        lines = [line for line in text.splitlines() if line.startswith(formats._md(name))]
        assert lines, name
        assert not re.match(r"\s*([-+*>#]|=+|\d+[.)])(\s|$)", lines[0]), name
        assert "](" not in text.replace("\\](", ""), name
        assert "<img" not in text


def test_figures_of_strangers_are_readable_files(tmp_path: Path) -> None:
    """A control character in the text of an SVG makes it a file that no reader opens."""
    import torch

    from samplerbench.figures.output import render_still

    files = save(metric_figure(group(nasty()[:2])[0], NASTY, "nfe"), tmp_path / "x")
    assert "red" in "".join(ElementTree.fromstring(files[0].read_text("utf-8")).itertext())
    panel = Panel(torch.zeros(1, 1, 1, 4, 4, dtype=torch.uint8), [NASTY], [NASTY], NASTY)
    ElementTree.fromstring(render_still(Drawing(NASTY, [panel], NASTY), "svg"))


def test_a_file_name_that_no_encoding_has_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "a\udcff")])
    assert ended.value.code == 2
    assert "a\\udcff" in capsys.readouterr().err


# --- Nobody goes around it -------------------------------------------------------------------------------------------


def test_only_one_module_prints() -> None:
    """Every line, table and JSON goes through samplerbench.text, so a new command cannot forget to clean its own."""
    for file in sorted(PACKAGE.rglob("*.py")):
        if file == PACKAGE / "text.py":
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            where = f"{file.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{where}: use say, note or print_json of samplerbench.text"
                assert node.func.id != "Console" or file.name == "notebook.py", f"{where}: use console"
            if isinstance(node, ast.ImportFrom):
                assert node.module != "rich.markup", f"{where}: use literal of samplerbench.text"


def test_a_sealed_record_with_such_names_can_be_listed(tmp_path: Path) -> None:
    put(tmp_path, *nasty())
    assert sum(r is not None for _, r in Store(tmp_path).records()) == 3
