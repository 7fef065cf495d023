"""Former names of plugins: accepted wherever a name is, and read from results that were written under them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import synthetic_results
from typer.testing import CliRunner

import samplerbench
from samplerbench import registry
from samplerbench.bench.suite import load_suite
from samplerbench.cli.app import app
from samplerbench.errors import UserError
from samplerbench.registry import Entry
from samplerbench.results.groups import group
from samplerbench.results.store import Store

DIGITS = Path(__file__).parents[1] / "benchmarks" / "results" / "digits"


def test_a_former_name_gives_the_plugin_under_its_current_name() -> None:
    assert registry.aliases("metric")["isc"] == "inception-score"
    assert registry.parse("metric", "isc:splits=3") == registry.parse("metric", "inception-score:splits=3")
    assert registry.parse("metric", "isc").spec == "inception-score"
    assert registry.kind_of("isc", ("sampler", "metric")) == "metric"
    assert registry.current_spec("metric", "isc:splits=3") == "inception-score:splits=3"
    assert registry.current_spec("metric", "fid") == "fid"
    assert "isc" not in {e.name for e in registry.entries("metric")}


def test_a_spelling_near_a_former_name_suggests_the_current_one() -> None:
    with pytest.raises(UserError, match='Did you mean "inception-score"') as caught:
        registry.parse("metric", "ics")
    assert "isc" not in str(caught.value)


def test_a_registered_name_takes_precedence_over_a_former_one(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Entry("metric", "isc", "mine:Mine", "mine", "1.0")
    entries = registry.entries
    monkeypatch.setattr(registry, "entries", lambda kind: [*entries(kind), mine] if kind == "metric" else entries(kind))
    registry._aliases.cache_clear()  # it was installed after they were read
    try:
        assert registry.find("metric", "isc") == mine
        assert registry.current_name("metric", "isc") == "isc"
    finally:
        registry._aliases.cache_clear()


def test_a_suite_may_use_a_former_name_for_metrics_and_published_values(tmp_path: Path) -> None:
    file = tmp_path / "suite.toml"
    file.write_text(
        'metrics = ["isc:splits=2"]\n[[grid]]\nsamplers = ["ddim"]\nsteps = [5]\n'
        '[grid.published]\nsource = "a paper"\nisc = [[9.5]]\n'
    )
    request = load_suite(file)
    assert [p.metric for p in request.grids[0].published] == ["inception-score"]


def test_results_of_both_names_share_a_column(tmp_path: Path) -> None:
    """A record under the former name is read as it was sealed, and shown under the current name."""
    store = Store(tmp_path)
    for steps, name in ((5, "isc"), (10, "inception-score")):
        store.put(synthetic_results.record("ddim", steps=steps, metrics={"fid": 1.0, name: 2.0}))
    records = [record for _, record in store.records() if record is not None]
    assert [sorted(r["metrics"]) for r in records] == [["fid", "inception-score"]] * 2
    (table,) = group(records)
    assert table.metrics() == ["fid", "inception-score"]
    for command in (["report", str(tmp_path), "--metric", "isc", "--format", "csv"], ["results", "ls", str(tmp_path)]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert ("inception-score" if command[0] == "results" else "Inception score") in done.output
        assert "ISC" not in done.output


def test_merged_files_keep_the_seal_of_the_name_they_were_written_under(tmp_path: Path) -> None:
    before, merged = tmp_path / "before", tmp_path / "merged"
    Store(before).put(synthetic_results.record("ddim", metrics={"fid": 1.0, "isc": 2.0}))
    done = CliRunner().invoke(app, ["results", "merge", str(before), "--out", str(merged)])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["results", "validate", str(merged)])
    assert done.exit_code == 0, done.output
    (file,) = merged.glob("*.json")
    assert json.loads(file.read_text("utf-8"))["metrics"].keys() == {"fid", "isc"}


def test_the_api_accepts_a_former_name() -> None:
    results = samplerbench.evaluate(
        "ddim", steps=1, model="exact:gaussian", metrics=["gap:images=2"], n=2, device="cpu", quiet=True
    )
    renamed = samplerbench.api.Results([r | {"metrics": {"inception-score": r["metrics"]["gap"]}} for r in results])
    assert renamed.table("isc") is not None


def test_compare_selects_a_metric_by_its_former_name() -> None:
    selections = ["--a", "sampler=ddim,steps=5", "--b", "sampler=ddim,steps=50", "--metric", "isc", "--json"]
    done = CliRunner().invoke(app, ["compare", str(DIGITS), *selections])
    assert done.exit_code == 0, done.output
    assert {row["metric"] for row in json.loads(done.output)} == {"inception-score"}
