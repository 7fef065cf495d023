"""Equal budgets of network evaluations, and the spacings of log σ that the fast solvers take."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.samplers import own_samplers
from torch import Tensor

import samplerbench
from samplerbench import cli, registry
from samplerbench.bench import engine
from samplerbench.bench.plan import most_steps
from samplerbench.errors import UserError
from samplerbench.models.schedule import alphas_cumprod, noise_levels
from samplerbench.sampling.spacing import make_grid

BUDGETS = range(1, 41)
LEVELS = noise_levels(alphas_cumprod({}))
MIXTURE = ("--model", "exact:mixture,shape=1x8x8")


def most(spec: str, budgets: Iterable[int], guidance: str | None = None) -> list[int | None]:
    sampler = registry.parse("sampler", spec)
    cost = 1 if guidance is None else registry.parse("guidance", guidance).evaluations
    return [most_steps(sampler, cost, budget) for budget in budgets]


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


# --- The most steps that fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "guidance", "per_step", "less"),
    [
        ("ddim", None, 1, 0),
        ("heun", None, 2, 1),  # 2N - 1
        ("dpm-solver:order=2", None, 2, 1),
        ("dpm-solver:order=3", None, 3, 2),  # 3(N - 1) + 1: the last step is of order 1
        ("dpm++:method=singlestep", None, 2, 1),
        ("unipc", None, 1, 0),
        ("pc:M=2", None, 3, 2),
        ("langevin:T=5", None, 5, -1),  # and one to denoise
        ("langevin:T=5,denoise=false", None, 5, 0),
        ("pf-ode:solver=rk4", None, 4, 3),
        ("ddim", "cfg:scale=3", 2, 0),
        ("heun", "cfg:scale=3", 4, 2),
        ("heun", "cfg:scale=1", 2, 1),
        ("dpm-solver:order=3", "cfg:scale=3", 6, 4),
        ("heun", "classifier", 2, 1),
    ],
)
def test_a_sampler_takes_the_most_steps_that_fit(spec: str, guidance: str | None, per_step: int, less: int) -> None:
    """N steps cost per_step·N - less."""
    fit = [(budget + less) // per_step for budget in BUDGETS]
    assert most(spec, BUDGETS, guidance) == [n if n >= 1 else None for n in fit]


def test_the_issues_examples() -> None:
    budgets = (5, 6, 8, 10, 20)
    assert most("heun", budgets) == [3, 3, 4, 5, 10]
    assert most("dpm-solver:order=3", budgets) == [2, 2, 3, 4, 7]
    assert most("ddim", budgets, "cfg") == [2, 3, 4, 5, 10]
    assert most("langevin", budgets) == [None, 1, 1, 1, 3]


# --- The command ----------------------------------------------------------------------------------------------------


def records_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return json.loads(capsys.readouterr().out)


@pytest.mark.filterwarnings("ignore::Warning:diffusers")
def test_what_is_counted_is_within_the_budget_for_every_sampler(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    specs = [
        *own_samplers(needs_task=False),
        "dpm-solver:order=3",
        "dpm++:method=singlestep",
        "diffusers/HeunDiscreteScheduler",
    ]
    samplers = [word for spec in specs for word in ("--sampler", spec)]
    out = ("--out", str(tmp_path), "--json")
    assert command("run", *samplers, "--nfe", "12", "--n", "4", *MIXTURE, *out) == 0
    records = records_of(capsys)
    shown = [registry.parse("sampler", spec).spec for spec in specs]
    assert [(r["sampler"], r["budget"]) for r in records] == [(s, 12) for s in shown]
    for r in records:
        sampler = registry.parse("sampler", r["sampler"])
        assert r["nfe"] == sampler.nfe(r["steps"]) <= r["budget"] < sampler.nfe(r["steps"] + 1)


def test_guidance_is_in_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guidances = ("--guidance", "cfg:scale=2", "--guidance", "none", "--guidance", "classifier")
    out = ("--out", str(tmp_path), "--json")
    assert command("run", "-s", "heun", *guidances, "--nfe", "11", "--n", "4", *MIXTURE, *out) == 0
    told = {r["guidance"]: (r["steps"], r["nfe"], r["classifier_forward"]) for r in records_of(capsys)}
    assert told == {"cfg": (3, 10, 0), None: (6, 11, 0), "classifier": (6, 11, 11)}


def test_a_budget_that_cannot_be_met_is_a_gap_and_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("-s", "langevin", "-s", "ddim", "--nfe", "5,8", "--n", "4", *MIXTURE, "--out", str(tmp_path))
    assert command("run", *arguments, "--json") == 0
    records = {(r["sampler"], r["budget"]): r for r in records_of(capsys)}
    assert {key: r.get("nfe") for key, r in records.items()} == {
        ("langevin", 8): 6, ("ddim", 5): 5, ("ddim", 8): 8, ("langevin", 5): None,
    }  # fmt: skip
    assert records["langevin", 5]["unmet"] == "a budget of 5 evaluations is too small: one step costs 6"
    assert [r["sampler"] for r in records.values() if "unmet" in r] == ["langevin"]

    assert command("run", *arguments) == 0
    table = capsys.readouterr().out.splitlines()
    (heading,) = [line for line in table if "sampler \\ NFE" in line]
    assert heading.replace("┃", " ").split() == ["sampler", "\\", "NFE", "5", "8"]
    row = next(line for line in table if "langevin" in line)
    assert row.replace("│", " ").split()[:2] == ["langevin", "unmet"]


def test_two_budgets_of_one_run_are_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Heun has no run of 10 evaluations: both budgets are its 5 steps, sampled once."""
    arguments = ("--nfe", "9,10", "--n", "4", *MIXTURE, "--out", str(tmp_path), "--json")
    assert command("run", "-s", "heun", *arguments) == 0
    nine, ten = records_of(capsys)
    assert (nine["budget"], ten["budget"]) == (9, 10)
    assert (nine["nfe"], ten["nfe"]) == (9, 9)
    assert nine["protocol"] == ten["protocol"]
    assert len(list(tmp_path.glob("*.json"))) == 1


@pytest.mark.parametrize("more", [(), ("--rerun",)])
def test_cells_that_differ_in_their_budget_alone_are_sampled_listed_and_estimated_once(
    more: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("run", "-s", "heun", "-s", "ddim", "--nfe", "9,10", "--n", "4", *MIXTURE, "--out", str(tmp_path))
    assert command(*arguments, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "3 cells of 4 images" in told
    assert sum("heun" in line for line in told.splitlines()) == 1

    sampled = []
    inner = engine.run_cell
    monkeypatch.setattr(engine, "run_cell", lambda *a, **k: (sampled.append(a[1]), inner(*a, **k))[1])
    assert command(*arguments, *more) == 0
    out, err = capsys.readouterr()
    assert [(c.sampler.spec, c.steps) for c in sampled] == [("heun", 5), ("ddim", 9), ("ddim", 10)]
    assert "[3/3]" in err
    assert "earlier run" not in err
    wide, long = (part.splitlines() for part in out.split("┃ sampler  ┃")) if "┃ sampler  ┃" in out else ([], [])
    if not wide:
        wide, long = (part.splitlines() for part in out.split("┃ sampler ┃"))
    (row,) = [line.split("│")[2:4] for line in wide if line.startswith("│ heun")]
    assert row[0].strip() == row[1].strip() != ""
    assert sum(line.startswith("│ heun") for line in long) == 1

    results = samplerbench.evaluate("heun", nfe=[9, 10], model=MIXTURE[1], n=4, quiet=True)
    assert [(r["budget"], r["nfe"]) for r in results] == [(9, 9), (10, 9)]
    assert len(sampled) == 4


def test_a_solver_of_its_own_steps_has_no_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--nfe", "5,10", "--n", "4", *MIXTURE, "--out", str(tmp_path), "--json")
    assert command("run", "-s", "pf-ode:solver=rk45", *arguments) == 0
    (record,) = records_of(capsys)
    assert (record["steps"], record["budget"]) == (None, None)
    assert record["nfe"] > 10


def test_steps_and_nfe_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("run", "-s", "ddim", "--steps", "5", "--nfe", "5", *MIXTURE) == 2
    assert capsys.readouterr().err == ("samplerbench: --steps and --nfe cannot be combined; use one of them.\n")


@pytest.mark.parametrize("nfe", ["0", "-3", "five", "", "5,,x"])
def test_a_bad_budget_is_refused_by_its_own_name(nfe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("run", "-s", "ddim", f"--nfe={nfe}", *MIXTURE) == 2
    error = capsys.readouterr().err
    assert error.startswith("samplerbench: --nfe")
    assert error.count("\n") == 1


# --- Spacings -------------------------------------------------------------------------------------------------------


def grid(spec: str, steps: int) -> Tensor:
    return make_grid(registry.parse("spacing", spec), LEVELS, steps)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_logsnr_is_even_in_log_sigma_between_the_models_ends(steps: int) -> None:
    found = grid("logsnr", steps)
    assert float(found[0]) == pytest.approx(float(LEVELS[-1]), rel=1e-12)
    if steps > 1:
        assert float(found[-2]) == pytest.approx(float(LEVELS[0]), rel=1e-12)
        gaps = found[:-1].log().diff()
        assert float(gaps.max() - gaps.min()) < 1e-12
    assert torch.equal(found, grid("geometric", steps))


def test_exponential_is_a_power_in_log_sigma() -> None:
    torch.testing.assert_close(grid("exponential", 20), grid("logsnr", 20), rtol=1e-12, atol=0)
    found = grid("exponential:rho=2,sigma_min=0.1,sigma_max=1000", 5)
    # (1 - i/4)² of four decades above 0.1.
    assert found.tolist() == pytest.approx([0.1 * 10 ** (4 * (1 - i / 4) ** 2) for i in range(5)] + [0], rel=1e-12)
    below = [int((grid(f"exponential:rho={rho}", 50) < 1).sum()) for rho in (0.5, 1, 2, 4)]
    assert below == sorted(set(below))


@pytest.mark.parametrize("spec", ["logsnr", "exponential"])
def test_ends_may_be_given(spec: str) -> None:
    assert grid(f"{spec}:sigma_min=0.5,sigma_max=7", 9)[[0, -2]].tolist() == pytest.approx([7, 0.5], rel=1e-12)
    with pytest.raises(UserError, match=r"sigma_min = 9 is not below sigma_max = 1\."):
        grid(f"{spec}:sigma_min=9,sigma_max=1", 5)


def test_a_list_is_its_levels(tmp_path: Path) -> None:
    expected = [80.0, 20.0, 5.0, 1.0, 0.1, 0.0]
    file = tmp_path / "levels.txt"
    file.write_text("80\n20\n5\n\n1\n0.1\n")
    for spec in ("list:levels=80;20;5;1;0.1", "list:80;20;5;1;0.1", "list:80; 20;5;1;1e-1;0", f"list:{file}"):
        found = grid(spec, 5)
        assert found.tolist() == expected
        assert found.dtype == torch.float64


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_a_list_of_another_length_says_which_steps_it_needs(steps: int) -> None:
    with pytest.raises(UserError, match="spacing list: it has 5 levels above 0, so it needs steps=5"):
        grid("list:80;20;5;1;0.1", steps)


@pytest.mark.parametrize("levels", ["1;2", "2;2;1", "3;0;1", "-1", "0", "", "2;1;0;0", "2;-1;0"])
def test_a_list_that_does_not_decrease_above_zero_is_refused(levels: str) -> None:
    with pytest.raises(UserError, match="spacing list: the levels must be decreasing numbers above 0"):
        grid(f"list:levels={levels}", 2)


@pytest.mark.parametrize("levels", ["80;x;1", "nofile.txt"])
def test_a_list_of_no_numbers_is_refused_in_one_line(levels: str) -> None:
    with pytest.raises(UserError, match=r"could not convert string to float.*; write levels=80;20;5;1 or name a file"):
        grid(f"list:levels={levels}", 2)


@pytest.mark.parametrize("levels", ["nan;1", "2;nan", "inf;inf", "2;inf"])
def test_a_list_of_no_finite_numbers_is_refused(levels: str) -> None:
    with pytest.raises(UserError):
        grid(f"list:levels={levels}", 2)


def test_samplers_run_on_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = "list:150;40;12;4;1.5;0.5;0.1"
    arguments = ("--spacing", levels, "--n", "4", *MIXTURE, "--out", str(tmp_path))
    samplers = ("-s", "dpm++:order=3", "-s", "unipc", "-s", "deis")
    assert command("run", *samplers, "--steps", "7", *arguments, "--json") == 0
    records = records_of(capsys)
    assert all(math.isfinite(r["metrics"]["fid"]["value"]) and r["nfe"] == 7 for r in records)
    assert command("run", *samplers, "--steps", "8", *arguments) == 2
    assert "it needs --steps 7" in capsys.readouterr().err


def test_fast_solvers_walk_evenly_in_log_sigma_unless_told() -> None:
    """What they publish as their default."""
    for name in ("dpm-solver", "dpm++", "unipc", "deis"):
        assert registry.get("sampler", name).spacing == "logsnr"
    for name in ("heun", "ipndm"):
        assert registry.get("sampler", name).spacing == "karras"
    values = grid("logsnr", 6)[:-1].tolist()
    assert [a / b for a, b in pairwise(values)] == pytest.approx([(values[0] / values[-1]) ** 0.2] * 5)
