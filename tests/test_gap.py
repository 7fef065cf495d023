"""The metric gap: what it needs and does not, and how its solution is announced, estimated and stopped."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_cell
from rich.console import Console

import samplerbench
from samplerbench import registry
from samplerbench.bench import cell_run, engine, prepare, request, setup
from samplerbench.bench.estimate import estimate
from samplerbench.cli.app import main
from samplerbench.errors import Stopped, UserError
from samplerbench.models import Model
from samplerbench.report.table import steps_table
from samplerbench.results.record import schema_errors
from samplerbench.results.store import Store


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither features nor real images are touched."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    for name in ("load_extractor", "load_data", "pick_reference"):
        monkeypatch.setattr(setup, name, refuse)


def test_a_result_of_gap_alone_is_used_again(tmp_path: Path) -> None:
    """Its protocol names neither features nor a reference, and the record is valid all the same."""
    reused = []
    for _ in range(2):
        session, cell = session_of(tmp_path)
        outcome = engine.run_cell(session, cell)
        reused.append(outcome.reused)
    assert reused == [False, True]
    assert schema_errors(json.loads(next(tmp_path.glob("*.json")).read_text("utf-8"))) == []
    assert not list(tmp_path.glob("*.damaged"))


@pytest.mark.usefixtures("nothing_is_loaded")
def test_gap_alone_needs_neither_data_nor_features(digits: Model) -> None:
    model = dataclasses.replace(digits, data=None, features=None, draws=False)
    (record,) = samplerbench.evaluate("ddim", steps=2, model=model, metrics="gap:tol=0.01", n=2, quiet=True)
    entry = record["metrics"]["gap"]
    assert entry["value"] > 0
    assert (entry["features"], entry["reference"]) == ("", "")
    assert record["protocol_fields"]["features"] is None
    assert record["protocol_fields"]["reference"] is None


@pytest.mark.slow
def test_gap_beside_fid_changes_nothing_of_the_protocol_but_its_metrics(tmp_path: Path) -> None:
    fields = {}
    for metrics in (("fid",), ("fid", "gap"), ("inception-score:splits=2",)):
        asked = request.Request([request.Grid(["ddim"], [2])], model="exact:mixture", n=40, metrics=metrics)
        prepared = prepare.prepare(asked, "cpu")
        session = prepare.make_session(prepared, prepare.measure_reference(prepared), 0, Store(tmp_path))
        fields[metrics] = session.measurement.protocol(prepared.cells[0]) | {"metrics": None}
    assert len({json.dumps(f, sort_keys=True) for f in fields.values()}) == 1


def test_gap_prints_no_note_and_no_reference_of_fid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["run", "-m", "exact:mixture", "-s", "ddim", "-s", "ddim:eta=1", "--steps", "3", "--n", "3"]
    assert run(*base, "--metric", "gap", "--out", str(tmp_path)) == 0
    out, err = capsys.readouterr()
    assert "singular" not in err
    assert "against" not in out
    assert re.search(r"^Gap ↓\s*$", out, re.MULTILINE)
    assert "failed" not in out + err
    assert err.count("computing the converged solution for 3 images") == 1
    # The stochastic sampler's cell is empty.
    assert re.search(r"ddim:eta=1 +│ +│", out)


def test_a_table_says_failed_of_what_failed_alone(digits: Model) -> None:
    record = make_cell(digits, "ddim", None, 2).pending
    del record["pending"]
    shown = {}
    for name, more in (("not applicable", {}), ("failed", {"error": "a fault"})):
        console = Console(width=120, file=io.StringIO())
        console.print(steps_table([record | more | {"seed": 0}], "gap"))
        shown[name] = "failed" in console.file.getvalue()  # type: ignore[attr-defined]
    assert shown == {"not applicable": False, "failed": True}


def session_of(tmp_path: Path, **more: Any) -> tuple[engine.Session, engine.Cell]:
    asked = request.Request([request.Grid(["ddim"], [2])], model="exact:mixture", n=6, metrics=["gap"], **more)
    prepared = prepare.prepare(asked, "cpu")
    store = Store(tmp_path)
    store.prepare()
    return prepare.make_session(prepared, prepare.measure_reference(prepared), 0, store), prepared.cells[0]


def test_a_stop_ends_the_converged_solution_at_its_next_step(tmp_path: Path) -> None:
    session, cell = session_of(tmp_path)
    steps: list[float] = []

    @contextmanager
    def solving(images: int, total: int) -> Any:
        assert (images, total) == (6, 6)
        yield lambda i, step: steps.append(step.sigma)

    session.execution.solving = solving
    session.execution.stop = lambda: len(steps) == 3
    with pytest.raises(Stopped):
        engine.run_cell(session, cell)
    assert len(steps) == 3
    assert not session.solutions
    session.execution.stop = lambda: False
    steps.clear()
    record = engine.run_cell(session, cell).record
    assert len(steps) > 10
    assert steps[-1] == 0
    other, _ = session_of(tmp_path / "undisturbed")
    assert engine.run_cell(other, cell).record["metrics"] == record["metrics"]


def test_the_estimate_counts_the_solution_and_solvers_that_choose_their_own_steps() -> None:
    """Against the rows that the network's own hook sees when the same two images are solved."""
    spec = "pf-ode:solver=rk45,rtol=0.01,atol=0.01"
    grids = [request.Grid(["ddim", "heun", spec], [4])]
    asked = request.Request(grids, model="digits", n=8, blocks=3, metrics=["gap:images=5,tol=0.01"])
    prepared = prepare.prepare(asked, "cpu")
    found = estimate(prepared)

    rows: list[int] = []
    hook = prepared.model.network.register_forward_hook(lambda _module, _args, output: rows.append(len(output.sample)))
    try:
        cell = cell_run.solution_cell(prepared.model, registry.parse("sampler", spec), None)
        list(engine.generate(prepared.model, cell, torch.arange(2), prepared.inputs(2), 0, 2))
    finally:
        hook.remove()
    counted = sum(rows) / 2
    assert [(row.nfe, row.measured, row.images) for row in found.rows] == [
        (4, False, 24),
        (7, False, 24),
        (counted, True, 24),
        (counted, True, 15),  # the solution: 5 images of each of 3 blocks, for all cells at once
    ]
    assert [row.metrics for row in found.rows] == [(), (), (), ("gap",)]
    assert found.seconds == pytest.approx(found.evaluation * (24 * (4 + 7 + counted) + 15 * counted))


def test_solutions_that_do_not_fit_are_estimated_for_every_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request.Request([request.Grid(["ddim"], [2, 3, 4])], model="exact:mixture", n=10, metrics=["gap:tol=0.01"])
    prepared = prepare.prepare(asked, "cpu")
    each = 4 * int(torch.tensor(prepared.model.shape).prod())
    for kept, images in ((10, 10), (4, 4 + 3 * 6), (0, 30)):
        monkeypatch.setattr("samplerbench.bench.estimate.SOLUTIONS", kept * each)
        assert estimate(prepared).rows[-1].images == images


def test_a_dry_run_shows_the_solution(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["run", "-m", "exact:mixture", "-s", "ddim", "--steps", "3", "--n", "4", "--metric", "gap:tol=0.01"]
    assert run(*base, "--dry-run") == 0
    out = capsys.readouterr().out
    assert re.search(r"converged solution of gap +│ own +│ +own │ ≈ \d+ │", out)


def test_a_stop_during_the_sampling_starts_no_solution(tmp_path: Path) -> None:
    session, cell = session_of(tmp_path)
    session.execution.solving = lambda images, total: pytest.fail("the solver was started")
    session.execution.stop = lambda: True
    with pytest.raises(Stopped):
        engine.run_cell(session, cell)
    assert not session.solutions


def test_the_solution_is_announced_with_all_images_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not with those of its first batch."""
    base = ["run", "-m", "exact:mixture", "-s", "ddim", "--steps", "2", "--n", "6", "--out", str(tmp_path)]
    for metric, more, images in (("gap:tol=0.01", (), 6), ("gap:images=3,tol=0.01", ("--blocks", "2"), 6)):
        assert run(*base, "--metric", metric, "-b", "2", *more) == 0
        assert f"computing the converged solution for {images} images" in capsys.readouterr().err


def test_no_solution_is_planned_where_every_sampler_draws_noise() -> None:
    """`heun` with churn between levels above all of the grid draws none, and `ddpm` of one step neither."""
    tables = {
        ("ddpm", "euler-maruyama"): (3, []),
        ("ddpm", "ddim"): (3, ["gap"]),
        ("heun:S_churn=10",): (3, []),
        ("heun:S_churn=10,S_min=100000,S_max=200000",): (3, ["gap"]),
        ("ddpm",): (1, ["gap"]),
    }
    for samplers, (steps, metrics) in tables.items():
        grid = request.Grid(list(samplers), [steps])
        asked = request.Request([grid], model="exact:mixture", n=4, metrics=["gap:tol=0.01"])
        found = estimate(prepare.prepare(asked, "cpu"))
        assert [name for row in found.rows for name in row.metrics] == metrics, samplers
        assert found.n == 4


def test_solutions_that_do_not_fit_are_not_counted_for_samplers_that_draw_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = request.Grid(["ddim", "ddpm", "heun"], [3])
    asked = request.Request([grid], model="exact:mixture", n=10, metrics=["gap:tol=0.01"])
    monkeypatch.setattr("samplerbench.bench.estimate.SOLUTIONS", 0)
    assert estimate(prepare.prepare(asked, "cpu")).rows[-1].images == 20


def test_without_n_and_data_gap_asks_for_the_number_of_images(digits: Model) -> None:
    model = dataclasses.replace(digits, data=None, features=None, draws=False)
    with pytest.raises(UserError, match="set it with `n`"):
        samplerbench.evaluate("ddim", steps=2, model=model, metrics="gap", quiet=True)


def test_a_metric_of_features_alone_needs_no_data(digits: Model) -> None:
    model = dataclasses.replace(digits, data=None)
    results = samplerbench.evaluate(
        "ddim", steps=1, model=model, metrics=["inception-score:splits=1", "gap:tol=0.01"], n=4, quiet=True
    )
    (record,) = results
    assert record["metrics"]["inception-score"]["value"] >= 1
    assert record["protocol_fields"]["reference"] is None
    assert isinstance(record["protocol_fields"]["features"], dict)
