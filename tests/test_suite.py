"""Suite files: what they expand to, and errors that name the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from samplerbench.bench.suite import load_suite
from samplerbench.cli.app import main
from samplerbench.errors import UserError

ROOT = Path(__file__).parent.parent

GOOD = """\
model = "exact:mixture"
n = 64
blocks = 2

[[grid]]
samplers = ["ddim", "heun"]
steps = [2, 3]

[[grid]]
samplers = ["ddim"]
nfe = [4]
spacings = ["karras", "default"]
  [grid.parameters]
  eta = [0.0, 0.5]
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "suite.toml"
    file.write_text(text, "utf-8")
    return file


def test_a_suite_is_every_combination_of_its_grids(tmp_path: Path) -> None:
    request = load_suite(write(tmp_path, GOOD))
    assert (request.model, request.n, request.blocks, list(request.seeds)) == ("exact:mixture", 64, 2, [0])
    first, second = request.grids
    assert [sampler.spec for sampler in first.samplers] == ["ddim", "heun"]
    assert list(first.steps) == [2, 3]
    assert [sampler.spec for sampler in second.samplers] == ["ddim", "ddim:eta=0.5"]
    assert [spacing and spacing.spec for spacing in second.spacings] == ["karras", None]


def test_the_projects_own_suites_are_valid() -> None:
    files = sorted((ROOT / "benchmarks" / "suites").glob("*.toml"))
    assert files
    for file in files:
        assert load_suite(file).grids


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("n = 64", "n = 0", 2, "n = 0: at least 1 image is needed."),
        ("n = 64", "n = ", 2, "value"),
        ("blocks = 2", "bloks = 2", 3, 'Did you mean "blocks"'),
        ('"ddim", "heun"', '"ddim", "heum"', 6, 'Did you mean "heun"'),
        ("steps = [2, 3]", "steps = [2, 0]", 7, "steps = 0: at least 1 step is needed."),
        ("steps = [2, 3]", "", 5, "neither steps nor nfe"),
        ("steps = [2, 3]", "steps = [2, 3]\nnfe = [4]", 5, "both steps and nfe"),
        ("nfe = [4]", "nfes = [4]", 11, 'Did you mean "nfe"'),
        ('"karras", "default"', '"karas", "default"', 12, 'Did you mean "karras"'),
        ("eta = [0.0, 0.5]", "eta = [0.0, 1.5]", 13, "it must be at most 1"),
        ('samplers = ["ddim", "heun"]', "", 5, "samplers is missing in this [[grid]]; give at least one: samplers = ["),
        ('samplers = ["ddim", "heun"]', "samplers = []", 6, "samplers is empty; give at least one."),
        ("eta = [0.0, 0.5]", "eta = []", 14, "parameters.eta is empty; give at least one value."),
        ("n = 64", "seeds = []", 2, "seeds is empty; give at least one."),
        ("n = 64", 'sampler = ["ddim"]', 2, 'no key "sampler" here. Write samplers in a [[grid]]. Known: name, '),
        (
            "steps = [2, 3]",
            "steps = [2]\nseed = 1",
            8,
            'no key "seed" here. Write seeds above the first [[grid]]. Known',
        ),
        (
            "steps = [2, 3]",
            "steps = [2]\n[grid.published]\nfid = [[1.0], [2.0]]",
            8,
            "source is missing in [grid.published]; name the paper and the table as text.",
        ),
        ("steps = [2, 3]", "steps = [2]\npublished = 3", 8, "grid.published: write it as a table, [grid.published]."),
        (
            "steps = [2, 3]",
            "steps = [2]\nparameters = 3",
            8,
            "grid.parameters: write it as a table, [grid.parameters].",
        ),
    ],
)
def test_an_error_names_its_line(tmp_path: Path, old: str, new: str, line: int, says: str) -> None:
    file = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(UserError) as refused:
        load_suite(file)
    assert str(refused.value).startswith(f"{file}:{line}: ")
    assert says in str(refused.value)


def test_a_dry_run_lists_the_cells_and_runs_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, GOOD)
    with pytest.raises(SystemExit) as ended:
        main(["run", str(file), "--dry-run", "--out", str(tmp_path / "out")])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    rows = [line.split("│")[1:5] for line in out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert ["heun", "karras", "3", "5"] in cells
    assert ["ddim:eta=0.5", "leading", "4", "4"] in cells
    assert len(cells) == 8
    assert "8 cells of 2 x 64 images" in out
    assert not (tmp_path / "out").exists()


def test_a_suite_runs_each_cell_once_and_options_beside_it_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, GOOD)
    for expected in ("s", "from an earlier run"):
        with pytest.raises(SystemExit) as ended:
            main(["run", str(file), "--out", str(tmp_path / "out")])
        assert ended.value.code == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
        assert len(lines) == 8
        assert all(line.endswith(expected) for line in lines)
    assert len(list((tmp_path / "out").glob("*.json"))) == 8
    with pytest.raises(SystemExit) as ended:
        main(["run", str(file), "--sampler", "ddim"])
    assert ended.value.code == 2
