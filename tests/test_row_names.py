"""What rows are called and how they are sorted: a parameter that two rows vary is written in both, in every output."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from support.synthetic_results import put, record
from typer.testing import CliRunner

from samplerbench import registry
from samplerbench.bench.cell import Cell, describe_plugin
from samplerbench.bench.plan import Unmet
from samplerbench.cli.app import app, main
from samplerbench.report.formats import latex, markdown, payload, to_csv
from samplerbench.report.series import sweeps
from samplerbench.report.table import row_names
from samplerbench.results.groups import group
from samplerbench.results.names import RowNames, natural
from samplerbench.results.pairs import pair


def made(sampler: str = "ddim", guidance: str | None = None, spacing: str = "leading", **change: Any) -> dict[str, Any]:
    """A record as a run of these specs leaves it: with every parameter, the defaults too."""
    plugins = {"sampler": sampler, "guidance": guidance, "spacing": spacing}
    parsed = {kind: None if spec is None else registry.parse(kind, spec) for kind, spec in plugins.items()}
    protocol = {kind: None if plugin is None else describe_plugin(plugin) for kind, plugin in parsed.items()}
    base = record(sampler, protocol=protocol, spacing=spacing, **change)
    base["guidance"] = guidance
    return base


SCALES = [made(guidance="cfg"), made(guidance="cfg:scale=1"), made(guidance="cfg:scale=10"), made()]
LABELS = ["ddim", "ddim + cfg:scale=1", "ddim + cfg:scale=2", "ddim + cfg:scale=10"]
"""2 is the default of `cfg`."""


def test_the_default_of_a_varied_parameter_is_written_and_rows_are_sorted_by_its_value() -> None:
    (found,) = group(SCALES)
    assert found.rows() == LABELS


def test_the_same_names_stand_in_every_output(tmp_path: Path) -> None:
    (found,) = group(SCALES)
    assert [row["label"] for row in csv.DictReader(io.StringIO(to_csv([found])))] == LABELS
    content = payload([found], [])["groups"][0]
    assert [r["label"] for r in content["records"]] == LABELS
    assert [row["label"] for row in content["tables"][0]["rows"]] == LABELS
    in_markdown = [line.split(" | ")[0].strip("| ") for line in markdown([found], [], None).splitlines()]
    assert [name for name in in_markdown if name.startswith("ddim")] == LABELS
    in_latex = [line.split(" & ")[0].strip() for line in latex([found], None).splitlines()]
    assert [name for name in in_latex if name.startswith("ddim")] == LABELS
    assert row_names(SCALES) == [LABELS[i] for i in (2, 1, 3, 0)]  # in the order of the command
    put(tmp_path, *SCALES)
    for command in (["report", str(tmp_path), "--format", "csv"], ["results", "ls", str(tmp_path)]):
        shown = CliRunner().invoke(app, command).output
        column = 2 if command[0] == "results" else 1  # after the key
        rows = [line.split("│")[column].strip() for line in shown.splitlines() if line.startswith("│")]
        assert rows[: len(LABELS)] == LABELS, command


def test_compare_names_both_sides_alike() -> None:
    (row,) = pair([SCALES[0]], [SCALES[1]], "guidance=cfg", "guidance=cfg:scale=1").rows
    assert row.cell == "ddim + cfg:scale=2, 10 steps, seed 0 → ddim + cfg:scale=1, 10 steps, seed 0"


def test_a_parameter_that_all_rows_share_is_not_added() -> None:
    (found,) = group([made("dpm++"), made("unipc"), made("ddim", guidance="cfg")])
    assert found.rows() == ["ddim + cfg", "dpm++", "unipc"]
    (found,) = group([made("dpm++:order=1,sde=true")])
    assert found.rows() == ["dpm++:order=1,sde=true"]


def test_parameters_are_written_in_the_order_of_their_declaration() -> None:
    specs = ["langevin:r=0.1", "langevin:T=10", "langevin"]
    (found,) = group([made(spec) for spec in specs])
    default = registry.parse("sampler", "langevin").parameters
    names = list(default)
    for label in found.rows():
        plugin = registry.parse("sampler", label)
        tail = label.partition(":")[2].split(",")
        assert [part.partition("=")[0] for part in tail] == sorted(("T", "r"), key=names.index)
        assert plugin.spec in specs  # the name is a spec of the same sampler


def test_spacings_of_one_sampler_are_told_apart_by_their_parameters() -> None:
    found = group([made(spacing="karras"), made(spacing="karras:rho=5")])[0]
    assert found.rows() == ["ddim on karras:rho=5", "ddim on karras:rho=7"]


def test_a_record_that_knows_no_parameters_is_called_by_its_spec() -> None:
    plain = record("ddim", protocol={"sampler": "ddim", "guidance": None})
    assert RowNames([plain, made("ddim:eta=0.5")]).row(plain) == "ddim"
    odd = made("ddim:eta=0.5")
    odd["protocol_fields"]["sampler"] = {"parameters": [1]}
    assert RowNames([odd, made()]).row(odd) == "ddim:eta=0.5"


def test_cells_without_a_result_have_the_names_of_those_with_one() -> None:
    import torch

    sampler, guided = registry.parse("sampler", "ddim"), registry.parse("guidance", "cfg")
    pending = Cell(sampler, guided, registry.parse("spacing", "leading"), 10, torch.tensor([1.0, 0.0])).pending
    assert row_names([pending, SCALES[1]]) == ["ddim + cfg:scale=2", "ddim + cfg:scale=1"]
    unmet = Unmet(sampler, guided, 1, 2).record
    assert row_names([unmet, SCALES[1]]) == ["ddim + cfg:scale=2", "ddim + cfg:scale=1"]


FAILING = """
from dataclasses import dataclass
from samplerbench.sampling import Sampler, option

@dataclass(frozen=True)
class Failing(Sampler):
    \"\"\"Fails.\"\"\"

    x: float = option(1.0, "a number")

    def steps(self, denoise, x, sigmas, noise):
        raise ValueError("no")
        yield
"""


def test_cells_that_failed_are_named_like_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.py").write_text(FAILING, encoding="utf-8")
    samplers = ["-s", "bad.py:Failing", "-s", "bad.py:Failing:x=2"]
    with pytest.raises(SystemExit) as ended:
        main(["run", *samplers, "-m", "exact:mixture", "--steps", "2", "--n", "70"])
    assert ended.value.code == 1
    rows = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert rows == ["bad.py:Failing:x=1", "bad.py:Failing:x=2"] * 2


def test_a_run_prints_the_default_that_its_rows_vary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "-s", "ddim", "-s", "ddim:eta=0.5", "-m", "exact:mixture", "--steps", "2", "--n", "70"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--out", str(tmp_path)])
    assert ended.value.code == 0
    rows = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert rows == ["ddim:eta=0", "ddim:eta=0.5"] * 2


def test_a_sweep_leaves_the_scale_out_and_nothing_else() -> None:
    found = sweeps(group([made(guidance="cfg"), made(guidance="cfg:scale=3")])[0], "fid")
    assert [(s.label, s.x) for s in found] == [("ddim + cfg, 10 steps", [2.0, 3.0])]
    two = [made(guidance=spec) for spec in ("cfg", "cfg:scale=3")]
    two += [made(guidance=spec, spacing="karras") for spec in ("cfg", "cfg:scale=3")]
    labels = [s.label for s in sweeps(group(two)[0], "fid")]
    assert labels == ["ddim + cfg on karras, 10 steps", "ddim + cfg on leading, 10 steps"]


def test_numbers_sort_by_value_within_texts_too() -> None:
    assert sorted([10, 2.5, -1, 2], key=natural) == [-1, 2, 2.5, 10]
    assert sorted(["x10", "x9.5", "x2", "a"], key=natural) == ["a", "x2", "x9.5", "x10"]
    mixed: list[Any] = ["b", None, True, 3, float("nan"), 10**400, "1"]
    assert sorted(mixed, key=natural)[:2] == [3, 10**400]


def test_progress_lines_and_the_dry_run_have_the_names_of_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "-s", "ddim", "-g", "cfg:scale=1", "-g", "cfg:scale=2", "--steps", "2", "--n", "4"]
    arguments += ["-m", "exact:mixture,shape=1x8x8", "--out", str(tmp_path)]
    names = ["ddim + cfg:scale=1", "ddim + cfg:scale=2"]
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--dry-run"])
    rows = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert rows == names
    for _ in range(2):  # sampled, then from the earlier run
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
        assert [line.partition("] ")[2].partition(", 2 steps: ")[0] for line in lines] == names
