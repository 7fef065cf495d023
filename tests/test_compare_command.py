"""`samplerbench compare`: pairs, intervals, verdicts and refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.synthetic_results import put, record
from typer.testing import CliRunner

from samplerbench.cli.app import app
from samplerbench.errors import UserError
from samplerbench.results.pairs import pair, parse_selection, select

NOISE = [0.0, 1.0, -0.5]


def fid(mean: float, *more: float, **change: Any) -> dict[str, Any]:
    """A cell whose blocks are the mean plus noise that every cell shares, plus its own."""
    own = [*more, 0.0, 0.0, 0.0]
    return {"metrics": {"fid": [mean + n + o for n, o in zip(NOISE, own, strict=False)]}} | change


def test_shared_noise_cancels_in_the_paired_difference() -> None:
    (row,) = pair([record(**fid(4.0))], [record(**fid(4.2, 0.01, -0.01))], "", "").rows
    assert row.change == pytest.approx(0.2)
    assert row.margin == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-6)  # t(0.975, 2) · s/√n
    assert row.verdict == "worse"


@pytest.mark.parametrize(
    ("metric", "change", "verdict"),
    [("fid", -0.2, "better"), ("fid", 0.2, "worse"), ("acc", 0.2, "better"), ("acc", -0.2, "worse")],
)
def test_the_verdict_knows_the_direction(metric: str, change: float, verdict: str) -> None:
    before = record(metrics={metric: [0.5 + 0.01 * n for n in NOISE]})
    after = record(metrics={metric: [0.5 + change + 0.01 * n for n in NOISE]})
    assert [row.verdict for row in pair([before], [after], "", "").rows] == [verdict]


def test_a_difference_within_its_interval_cannot_be_told_apart() -> None:
    (row,) = pair([record(**fid(4.0))], [record(**fid(4.0, 0.3, -0.2, 0.1))], "", "").rows
    assert row.verdict == "cannot be told apart"


def test_two_seeds_are_compared_by_welchs_interval() -> None:
    from scipy.stats import ttest_ind

    a, b = [4.0, 5.0, 3.5], [4.1, 5.1, 3.7]
    one, two = record(metrics={"fid": a}), record(metrics={"fid": b}, seed=1)
    (row,) = pair([one], [two], "seed=0", "seed=1").rows
    interval = ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    assert row.margin is not None
    assert (row.change - row.margin, row.change + row.margin) == pytest.approx((interval.low, interval.high))
    assert row.verdict == "cannot be told apart"
    assert "Welch" in row.how


def test_one_block_has_no_verdict() -> None:
    (row,) = pair([record(metrics={"fid": 4.0})], [record(metrics={"fid": 9.0})], "", "").rows
    assert (row.margin, row.verdict, row.how) == (None, "no verdict", "one block: no interval")


def test_a_value_that_became_nan_is_worse() -> None:
    (row,) = pair([record(metrics={"fid": 4.0})], [record(metrics={"fid": math.nan})], "", "").rows
    assert row.verdict == "worse"
    assert row.as_dict()["b"] is None


def test_cells_pair_by_sampler_steps_and_the_rest() -> None:
    before = [record("ddim", 5), record("ddim", 10), record("heun", 5)]
    after = [record("ddim", 10, **fid(5.0)), record("heun", 5, **fid(6.0)), record("unipc", 5)]
    found = pair(before, after, "", "")
    assert [row.cell for row in found.rows] == ["ddim, 10 steps, seed 0", "heun, 5 steps, seed 0"]
    assert [row.b for row in found.rows] == pytest.approx([5.0 + sum(NOISE) / 3, 6.0 + sum(NOISE) / 3])
    assert (found.only_a, found.only_b) == (["ddim, 5 steps, seed 0"], ["unipc, 5 steps, seed 0"])


def test_samplers_pair_at_each_number_of_steps_whatever_their_spacing() -> None:
    store = [record("ddim", n, spacing="leading") for n in (5, 10)] + [record("unipc", n) for n in (5, 10)]
    a, b = "sampler=ddim", "sampler=unipc"
    found = pair(select(store, a, "a"), select(store, b, "b"), a, b)
    assert [row.cell for row in found.rows] == [
        "ddim, 5 steps, seed 0 → unipc, 5 steps, seed 0",
        "ddim, 10 steps, seed 0 → unipc, 10 steps, seed 0",
    ]


def test_a_selection_that_fits_two_cells_is_refused_with_what_tells_them_apart() -> None:
    store = [record("ddim"), record("ddim", spacing="karras"), record("unipc")]
    with pytest.raises(UserError, match=r"both match, and differ in spacing; narrow the selection, as in a=\"spacing="):
        pair(select(store, "sampler=ddim", "a"), store[2:], "sampler=ddim", "sampler=unipc")


def test_two_protocols_in_one_store_are_told_apart_by_a_field_one_can_select() -> None:
    store = [record("ddim", n=9), record("ddim", n=16)]
    with pytest.raises(UserError, match=r"differ in n; narrow the selection, as in b=\"n=16\"\."):
        pair(store[:1], store, "", "")
    assert select(store, "n=16", "b") == store[1:]
    store[1] = record("ddim", protocol={"dtype": "bfloat16"})
    with pytest.raises(UserError, match=r"differ in dtype; keep results of different protocols in different folders"):
        pair(store[:1], store, "", "")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"n": 16}, "n"),
        ({"protocol": {"dtype": "bfloat16"}}, "dtype"),
        ({"protocol": {"features": {"name": "inception", "weights": "f"}}}, "features.name"),
        ({"protocol": {"reference": {"name": "digits", "sha256": "other"}}}, "reference.sha256"),
        ({"protocol": {"metrics": ["fid:k=2"]}}, "metric fid"),
    ],
)
def test_different_protocols_are_refused_and_the_field_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=f"they differ in {field};"):
        pair([record()], [record(**change)], "", "")


def test_versions_may_differ_and_are_told() -> None:
    assert pair([record()], [record(versions={"torch": "3.0"})], "", "").versions == "torch 2.15.0 and 3.0"


def test_a_selection_is_fields_and_a_spec_may_hold_commas() -> None:
    text = "sampler=pf-ode:solver=rk4,order=2,steps=5"
    assert parse_selection(text, "a") == {"sampler": "pf-ode:solver=rk4,order=2", "steps": "5"}
    with pytest.raises(UserError, match=r'there is no field "colour"\. The fields are sampler'):
        parse_selection("colour=red", "a")
    for bad in ("ddim", "steps"):
        with pytest.raises(UserError, match=r"is not FIELD=VALUE; the fields are sampler"):
            parse_selection(bad, "a")


def test_selections_match_numbers_and_none() -> None:
    store = [record("ddim", 5), record("ddim", 5, guidance="cfg:scale=2")]
    assert select(store, "guidance=none,nfe=5", "a") == store[:1]
    assert select(store, "guidance=cfg:scale=2", "a") == store[1:]
    with pytest.raises(UserError, match=r"a=\"steps=50\": no result matches; the results have steps="):
        select(store, "steps=50", "a")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["compare", *arguments])


def test_fail_if_worse_is_exit_code_one(tmp_path: Path) -> None:
    put(tmp_path / "a", record(**fid(4.0)))
    put(tmp_path / "b", record(**fid(5.0, 0.01)))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    found = run(a, b)
    assert found.exit_code == 0
    assert "worse" in found.output
    assert run(a, b, "--fail-if-worse").exit_code == 1
    assert run(b, a, "--fail-if-worse").exit_code == 0
    (row,) = json.loads(run(a, b, "--json").output)
    assert row["verdict"] == "worse"


def test_one_store_with_two_selections(tmp_path: Path) -> None:
    put(tmp_path, record("ddim", 5, **fid(8.0)), record("ddim", 50, **fid(3.0, 0.01)))
    found = run(str(tmp_path), "--a", "sampler=ddim,steps=5", "--b", "sampler=ddim,steps=50")
    assert found.exit_code == 0
    assert "better" in found.output
    assert isinstance(run(str(tmp_path)).exception, UserError)


def test_the_comparison_fits_into_80_columns() -> None:
    digits = Path(__file__).parents[1] / "benchmarks" / "results" / "digits"
    done = CliRunner().invoke(app, ["compare", str(digits), "--a", "sampler=ddim", "--b", "sampler=dpm++"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "ddim, 5 steps, seed 0 → dpm++, 5 steps, seed 0 (paired over blocks)"
    assert sum(line.startswith("FID ↓") for line in lines) == 3
    assert max(map(len, lines)) <= 80
    assert len({line.index(word) for line in lines for word in ("better", "worse", "≈ tied") if word in line}) == 1


def test_a_change_of_kid_is_not_in_percent(tmp_path: Path) -> None:
    """KID is unbiased, so it may be 0 or negative; a share of it means nothing."""
    for name, fid, kid in (("one", 4.0, 0.001), ("two", 5.0, 0.5)):
        put(tmp_path / name, record(metrics={"fid": fid, "kid": kid, "kid:degree=2": kid, "other": kid - 0.01}))
    shown = CliRunner().invoke(app, ["compare", str(tmp_path / "one"), str(tmp_path / "two")]).output
    lines = {line.split()[0]: line for line in shown.splitlines() if "↓" in line}
    assert "+1.00 (+25%)" in lines["FID"]
    assert "%" not in lines["KID"] + lines["KID:degree=2"] + lines["other"]
