"""A time stands only where it was measured under the same batch size, device, processes and threads."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.synthetic_results import put, record

from samplerbench.bench import engine, prepare, request
from samplerbench.cli.app import main
from samplerbench.errors import Stopped
from samplerbench.report.formats import payload, rows
from samplerbench.report.html import page
from samplerbench.report.plots import metric_figure
from samplerbench.report.series import series
from samplerbench.report.table import long_table
from samplerbench.results.groups import group
from samplerbench.results.record import schema_errors
from samplerbench.results.store import Store
from samplerbench.results.timings import (
    combine,
    common_conditions,
    conditions_of,
    describe_conditions,
    timing_under,
    timings_of,
    under,
)

LARGE = {"batch_size": 60, "processes": 1, "device": "cpu", "device_name": "", "threads": 2, "graphs": False}
SMALL = LARGE | {"batch_size": 1}
OLD = {name: LARGE[name] for name in ("batch_size", "processes", "device", "threads")}


def timing(conditions: dict[str, Any], rate: float) -> dict[str, Any]:
    measured = {"seconds": 100 / rate, "decoder_seconds": 0.0, "metric_seconds": 1.0, "images_per_second": rate}
    return conditions | measured | {"finished": "2026-01-01T00:00:00+00:00"}


def timed(*timings: dict[str, Any], **change: Any) -> dict[str, Any]:
    """A record with these timings, the first at its top too."""
    first = timings[0] if timings else timing(LARGE, 50.0)
    return record(**change) | first | {"timings": list(timings)}


# --- Records --------------------------------------------------------------------------------------------------------


def test_a_time_is_found_under_its_own_conditions_alone() -> None:
    both = timed(timing(LARGE, 103.0), timing(SMALL, 10.0))
    assert schema_errors(both | {"seal": "0" * 64}) == []
    for conditions, rate in ((LARGE, 103.0), (SMALL, 10.0)):
        found = timing_under(both, conditions)
        assert found is not None
        assert found["images_per_second"] == rate
        assert under(both, conditions)["images_per_second"] == rate
        assert under(both, conditions)["seconds"] == 100 / rate
        assert under(both, conditions)["batch_size"] == conditions["batch_size"]
    for name, other in (("device", "cuda:0"), ("threads", 1), ("processes", 2), ("graphs", True), ("batch_size", 2)):
        assert timing_under(both, LARGE | {name: other}) is None
        shown = under(both, LARGE | {name: other})
        assert shown["seconds"] is shown["images_per_second"] is shown["metric_seconds"] is None
        assert shown["metrics"] == both["metrics"]


def test_a_record_of_an_older_version_has_the_timing_at_its_top() -> None:
    old = record() | timing(OLD, 103.0)
    assert "timings" not in old
    assert timings_of(old) == [timing(OLD, 103.0)]
    assert timing_under(old, LARGE) == timing(OLD, 103.0)  # what it does not know cannot differ
    assert timing_under(old, SMALL) is None


def test_a_rerun_under_other_conditions_adds_its_time_and_one_under_the_same_replaces_it() -> None:
    first = timed(timing(LARGE, 103.0)) | {"seal": "0" * 64}
    added = combine(first, timed(timing(SMALL, 10.0)))
    assert [t["images_per_second"] for t in added["timings"]] == [103.0, 10.0]
    assert added["images_per_second"] == 103.0  # an older reader finds the first
    assert "seal" not in added
    replaced = combine(added, timed(timing(LARGE, 110.0)))
    assert [t["images_per_second"] for t in replaced["timings"]] == [110.0, 10.0]
    assert replaced["images_per_second"] == 110.0
    assert replaced["batch_size"] == 60
    assert combine(None, first) is first


def test_values_that_agree_stay_and_others_replace_the_record_and_its_times() -> None:
    first = timed(timing(LARGE, 103.0), metrics={"fid": [4.0]})
    close = combine(first, timed(timing(SMALL, 10.0), metrics={"fid": [4.0 * (1 + 0.5e-4)]}))
    assert close["metrics"]["fid"]["value"] == 4.0
    assert len(close["timings"]) == 2
    for change in ({"metrics": {"fid": [4.001]}}, {"nfe": 11}, {"metrics": {"kid": [4.0]}}):
        made = timed(timing(SMALL, 10.0), **({"metrics": {"fid": [4.0]}} | change))
        assert combine(first, made) == made


def test_the_conditions_of_most_records_are_the_common_ones() -> None:
    one, two = timed(timing(LARGE, 103.0)), timed(timing(SMALL, 10.0), sampler="ddpm")
    both = timed(timing(SMALL, 9.0), timing(LARGE, 100.0), sampler="heun")
    assert common_conditions([one, two, both]) == LARGE  # as often as the other, and first
    assert common_conditions([two, two, one]) == SMALL
    assert common_conditions([timed()]) == {}
    assert conditions_of(timing(SMALL, 1.0)) == SMALL


def test_conditions_are_described() -> None:
    assert describe_conditions(LARGE) == "cpu, 2 threads, batches of 60"
    cuda = SMALL | {"device": "cuda:0", "device_name": "NVIDIA H200", "threads": 1, "processes": 8, "graphs": True}
    assert describe_conditions(cuda) == "NVIDIA H200, 1 thread, 8 processes, batches of 1, CUDA graphs"
    assert describe_conditions({}) == ""


# --- Tables and reports ---------------------------------------------------------------------------------------------


def shown(table: Any) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_the_table_leaves_out_a_time_of_other_conditions_and_says_so() -> None:
    stored = timed(timing(LARGE, 103.25))
    text = shown(long_table([under(stored, LARGE)]))
    assert "103.2" in text
    assert "no time" not in text
    text = shown(long_table([under(stored, SMALL), under(timed(timing(SMALL, 10.5), sampler="ddpm"), SMALL)]))
    assert "103" not in text
    assert "10.5" in text
    told = " ".join(text.split())
    assert "no time: 1 row timed under other conditions (cpu, 2 threads, batches of 60)" in told
    assert "--rerun" in told


def test_a_report_compares_times_of_one_set_of_conditions_only() -> None:
    records = [
        timed(timing(LARGE, 100.0)),
        timed(timing(LARGE, 50.0), sampler="ddpm"),
        timed(timing(SMALL, 10.0), sampler="heun"),
        timed(timing(SMALL, 5.0), timing(LARGE, 25.0), sampler="unipc"),
    ]
    (found,) = group(records)
    assert {s.label: s.x for s in series(found, "fid", "seconds_per_image")} == {
        "ddim": [1 / 100],
        "ddpm": [1 / 50],
        "unipc": [1 / 25],
    }
    assert len(series(found, "fid", "nfe")) == 4
    told = "cpu, 2 threads, batches of 60; 1 of 4 results were timed under other conditions and have no time here"
    assert found.describe_times() == told
    (made,) = payload([found], [])["groups"]
    assert made["times"] == told
    of = {r["label"]: r["seconds_per_image"] for r in made["records"]}
    assert of == {"ddim": 1 / 100, "ddpm": 1 / 50, "heun": None, "unipc": 1 / 25}
    assert "batches of 60" in page([found], [], {})
    assert told in metric_figure(found, "fid", "seconds_per_image").axes[0].get_title(loc="left")
    # In the long form each row's own conditions stand beside its time.
    by = {r["sampler"]: (r["batch_size"], r["seconds_per_image"]) for r in rows([found])}
    assert by == {"ddim": (60, 1 / 100), "ddpm": (60, 1 / 50), "heun": (1, 1 / 10), "unipc": (1, 1 / 5)}


def test_a_time_of_changing_conditions_is_nowhere() -> None:
    mixed = timed()
    (found,) = group([mixed, timed(timing(LARGE, 100.0), sampler="ddpm")])
    assert [s.label for s in series(found, "fid", "seconds_per_image")] == ["ddpm"]
    assert next(r for r in rows([found]) if r["sampler"] == "ddim")["seconds_per_image"] is None
    assert "timed under changing conditions" in " ".join(shown(long_table([under(mixed, LARGE)])).split())


# --- Runs -----------------------------------------------------------------------------------------------------------


def run(out: Path, *more: str) -> Any:
    from typer.testing import CliRunner

    from samplerbench.cli.app import app

    command = ["run", "-m", "exact:gaussian", "-s", "ddim", "--steps", "2", "--n", "30", "--data", "digits", "--json"]
    done = CliRunner().invoke(app, [*command, "--out", str(out), *more])
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)
    return found


def stored(out: Path) -> dict[str, Any]:
    ((_, found),) = Store(out).records()
    assert found is not None
    return found


def test_the_time_of_one_batch_size_is_not_shown_for_another(tmp_path: Path) -> None:
    first = run(tmp_path, "-b", "30")
    assert first["images_per_second"] > 0
    assert run(tmp_path, "-b", "30")["images_per_second"] == first["images_per_second"]
    other = run(tmp_path, "-b", "1")
    assert other["seconds"] is other["images_per_second"] is None
    assert other["metrics"] == first["metrics"]
    timed_again = run(tmp_path, "-b", "1", "--rerun")
    assert timed_again["images_per_second"] > 0
    assert timed_again["batch_size"] == 1
    found = stored(tmp_path)
    assert [t["batch_size"] for t in found["timings"]] == [30, 1]
    assert found["images_per_second"] == first["images_per_second"]
    assert found["metrics"] == first["metrics"]
    assert run(tmp_path, "-b", "1")["images_per_second"] == timed_again["images_per_second"]
    assert run(tmp_path, "-b", "30")["images_per_second"] == first["images_per_second"]


def test_a_result_of_an_older_version_is_reused_and_its_time_only_where_it_was_measured(tmp_path: Path) -> None:
    first = run(tmp_path, "-b", "30")
    old = {k: v for k, v in stored(tmp_path).items() if k not in ("timings", "device_name", "graphs", "seal")}
    Store(tmp_path).put(old)
    assert run(tmp_path, "-b", "30")["images_per_second"] == first["images_per_second"]
    assert run(tmp_path, "-b", "10")["images_per_second"] is None
    assert run(tmp_path, "-b", "10", "--rerun")["images_per_second"] > 0
    assert [t["batch_size"] for t in stored(tmp_path)["timings"]] == [30, 10]


@pytest.mark.parametrize("then", [10, 20])
def test_a_cell_resumed_under_other_conditions_has_no_time(tmp_path: Path, then: int) -> None:
    asked = request.Request([request.Grid(["ddim"], [2])], model="exact:gaussian", n=40, data="digits")
    prepared = prepare.prepare(asked, "cpu")
    measured = prepare.measure_reference(prepared)
    store = Store(tmp_path)
    store.prepare()
    session = prepare.make_session(prepared, measured, 0, store)
    session.execution.batch_size = 10
    session.execution.stop = lambda: True
    with pytest.raises(Stopped):
        engine.run_cell(session, prepared.cells[0])
    session = prepare.make_session(prepared, measured, 0, store)
    session.execution.batch_size = then
    outcome = engine.run_cell(session, prepared.cells[0])
    assert outcome.record["resumed"] == 1
    found = stored(tmp_path)
    assert schema_errors(found) == []
    assert [t["batch_size"] for t in found["timings"]] == ([10] if then == 10 else [])
    assert (outcome.record["images_per_second"] is None) == (then != 10)


def test_a_listing_shows_times_of_one_set_of_conditions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, timed(timing(LARGE, 123.5)), timed(timing(LARGE, 77.5), sampler="ddpm"))
    put(tmp_path, timed(timing(SMALL, 9.5), sampler="heun"))
    with pytest.raises(SystemExit, match="0"):
        main(["results", "ls", str(tmp_path)])
    out = capsys.readouterr().out
    assert "123.5" in out
    assert "77.5" in out
    assert " 9.5" not in out
    assert "times: cpu, 2 threads, batches of 60" in out


def test_the_record_is_not_changed_by_looking_at_it() -> None:
    made = timed(timing(LARGE, 103.0), timing(SMALL, 10.0))
    before = copy.deepcopy(made)
    under(made, SMALL)
    under(made, {"device": "cuda"})
    combine(made, timed(timing(LARGE, 1.0)))
    assert made == before
