"""The results that are committed: whole, of the published schema, and what is said of them is so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from samplerbench.cli.app import app, main
from samplerbench.results.record import schema_errors
from samplerbench.results.store import Store

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
DIGITS = RESULTS / "digits"
SEEDS = ("--a", "seed=0", "--b", "seed=1")


def records(folder: Path) -> list[dict[str, Any]]:
    return [record for _, record in Store(folder).records() if record is not None]


TIMINGS = ("speed", "gpu")
"""Folders of what the scripts of benchmarks/ measured, which are no results of cells."""
MEASURED = sorted(f for name in TIMINGS for f in (RESULTS / name).glob("*.json"))


@pytest.mark.parametrize("file", MEASURED, ids=lambda f: f.name)
def test_a_timing_says_when_and_on_what_it_was_measured(file: Path) -> None:
    told = json.loads(file.read_text("utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:+]+", told["date"])
    assert told["device"]
    assert {"torch", "diffusers", "torch-fidelity"} <= told["versions"].keys()
    assert told.get("rows") or told.get("parts")


FOLDERS = sorted(f for f in RESULTS.iterdir() if f.is_dir() and f.name not in TIMINGS)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_committed_results_are_whole_and_fit_the_schema(folder: Path) -> None:
    found = list(Store(folder).records())
    assert found
    for file, record in found:
        assert record is not None, file
        assert schema_errors(record) == [], file
        assert file.with_suffix(".png").exists()


@pytest.mark.slow
def test_one_command_makes_every_format_of_the_digits_suite(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(DIGITS), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    written = {f.suffix for f in tmp_path.rglob("*") if f.is_file()}
    assert {".md", ".csv", ".tex", ".json", ".html", ".svg", ".png"} <= written
    for picture in tmp_path.rglob("*.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 200, picture


def test_more_steps_of_ddim_are_better_and_the_interval_says_by_how_much() -> None:
    selections = ["--a", "sampler=ddim,steps=5", "--b", "sampler=ddim,steps=50"]
    done = CliRunner().invoke(app, ["compare", str(DIGITS), *selections, "--json"])
    assert done.exit_code == 0, done.output
    (row,) = [r for r in json.loads(done.output) if r["metric"] == "fid"]
    assert row["verdict"] == "better"
    assert row["change"] + row["margin"] < 0
    plain = [r for r in records(DIGITS) if r["sampler"] == "ddim" and r["guidance"] is None]
    values = {r["steps"]: r["metrics"]["fid"]["value"] for r in plain}
    assert row["change"] == pytest.approx(values[50] - values[5])


def test_two_seeds_of_one_sampler_cannot_be_told_apart(tmp_path: Path) -> None:
    for seed in ("0", "1"):
        arguments = ["run", "-s", "ddim", "--steps", "4", "--n", "100", "--blocks", "4", "--seed", seed]
        with pytest.raises(SystemExit, match="0"):
            main([*arguments, "--device", "cpu", "--out", str(tmp_path / seed)])
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "0"), str(tmp_path / "1"), *SEEDS, "--json"])
    assert [r["verdict"] for r in json.loads(done.output)] == ["cannot be told apart"]


def mnist() -> dict[tuple[str, int | None], dict[str, float]]:
    """The metrics of the unguided cells of MNIST, by sampler and budget of evaluations."""
    plain = [r for r in records(RESULTS / "mnist") if r["guidance"] is None]
    return {(r["sampler"], r.get("budget")): {k: e["value"] for k, e in r["metrics"].items()} for r in plain}


def test_the_network_of_mnist_is_within_twice_the_floor() -> None:
    """Real against real is the FID of the test images, at the same number."""
    cells = mnist()
    floor = cells["real:data=mnist:split=test", None]["fid"]
    assert cells["ddim", 10]["fid"] < 2 * floor
    assert cells["dpm++", 10]["fid"] < 2 * floor
    assert cells["heun", 35]["fid"] < 2 * floor
    assert cells["ddpm:variance=large", 10]["fid"] > 10 * floor


def test_the_cells_of_mnist_have_ten_thousand_images() -> None:
    found = records(RESULTS / "mnist")
    assert {(r["n"], r["protocol_fields"]["blocks"]) for r in found} == {(5000, 2)}
    assert all("sd" in r["metrics"]["fid"] for r in found)


def test_a_folder_of_results_says_which_version_made_them() -> None:
    result = CliRunner().invoke(app, ["results", "ls", str(DIGITS)])
    made = {(r["versions"]["samplerbench"], r["protocol_fields"]["format"]) for r in records(DIGITS)}
    assert made == {("0.1.0", 1)}
    lines = [line for line in result.stdout.splitlines() if line.startswith("made by")]
    assert lines == [f"made by samplerbench 0.1.0, protocol format 1: {len(records(DIGITS))} results"]
