"""`samplerbench tune`: the space, the races, the search, and what the command prints."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch

from samplerbench import cli, registry
from samplerbench.bench.request import Request, one_grid
from samplerbench.bench.suite import load_suite
from samplerbench.errors import Stopped, UserError
from samplerbench.options import parameters_of
from samplerbench.results.compare import paired_difference
from samplerbench.results.store import Store
from samplerbench.sampling import Sampler, option
from samplerbench.tuning.arena import Arena, Entry
from samplerbench.tuning.code import code_of
from samplerbench.tuning.proposals import Proposals
from samplerbench.tuning.search import FRESH, FRESH_OFFSET, RUNGS, ConfidenceInterval, Limit, Tuned, race, tune
from samplerbench.tuning.space import Candidate, Space, all_specs, choices
from samplerbench.tuning.words import verdict

MODEL = ("--model", "exact:mixture,shape=1x2x2", "--n", "8")


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


# --- The space ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Many(Sampler):
    """Parameters of every kind."""

    how: Literal["a", "b"] = option("b", "a choice")
    on: bool = option(True, "a switch")
    order: int = option(2, "a small range", ge=1, le=3)
    repeats: int = option(1, "a large range", ge=1, le=1000)
    share: float = option(0.0, "a number between bounds", ge=0, le=1)
    rho: float = option(7.0, "a positive number", gt=0)
    wide: float = option(2.0, "a number between wide bounds", gt=0, le=3.0e3)
    churn: float = option(0.0, "a number without bounds")
    file: str = option("", "text")

    def steps(self, denoise: Any, x: Any, sigmas: Any, noise: Any) -> Any:
        raise NotImplementedError


def test_the_values_of_parameters() -> None:
    """The default is first. What has no obvious values keeps its default."""
    values = {name: choices(parameter) for name, parameter in parameters_of(Many).items()}
    assert values == {
        "how": ["b", "a"],
        "on": [True, False],
        "order": [2, 1, 3],
        "repeats": [1],
        "share": [0.0, 0.25, 0.5, 0.75, 1.0],
        "rho": [7.0, 3.5, 4.9, 9.8, 14.0],
        "wide": [2.0, 1.0, 1.4, 2.8, 4.0],
        "churn": [0.0],
        "file": [""],
    }


class Fixed:
    """A trial that chooses given values, and the first choice otherwise."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        value = self.values.get(name, choices[0])
        assert value in choices, (name, value, choices)
        return value


def test_a_trial_is_a_candidate_and_a_default_row_is_a_trial() -> None:
    space = Space(("ddim", "dpm++:order=3"), ("karras",), (None, "cfg"))
    for row in space.defaults():
        assert space.suggest(Fixed(space.values_of(row))) == row
    assert len(space.defaults()) == 4
    trial = Fixed({"sampler": "dpm++:order=3", "dpm++:order=3 sde": "true", "spacing": "karras", "karras rho": "14"})
    assert space.suggest(trial) == Candidate("dpm++:order=3,sde=true", None, "karras:rho=14")
    # A parameter that the spec fixes is not searched.
    named: list[str] = []
    asked = SimpleNamespace(suggest_categorical=lambda name, values: named.append(name) or values[-1])
    space.suggest(asked)
    assert "dpm++:order=3 order" not in named
    assert {"sampler", "spacing", "guidance", "dpm++:order=3 method", "karras rho", "cfg scale"} <= {*named}


def test_every_plugin_without_needed_parameters_is_in_the_space() -> None:
    names = all_specs("sampler")
    assert {"ddim", "dpm++", "unipc", "heun"} <= {*names}
    assert all(registry.parse("sampler", name).spec for name in names)


def test_proposals_do_not_repeat_and_end_with_the_space() -> None:
    space = Space(("ddim", "heun"), ("karras:rho=3",))
    proposals = Proposals(space, 0)
    for row in space.defaults():
        proposals.add(row, 1.0)
    seen = [*space.defaults()]
    while batch := proposals.batch(4):
        seen += batch
        for candidate in batch:
            proposals.tell(candidate, math.inf if "heun" in candidate.sampler else 0.5)
    assert len(seen) == len(set(seen))
    etas = {f"ddim:eta={eta:g}" for eta in (0.25, 0.5, 0.75, 1)} | {"ddim"}
    assert {Candidate(eta, None, spacing) for eta in etas for spacing in (None, "karras:rho=3")} <= {*seen}


# --- Races ----------------------------------------------------------------------------------------------------------


@dataclass
class Simulated:
    """An arena whose measurements are drawn: true values, noise that all candidates share, and noise of their own."""

    truth: dict[str, float]
    shared: float = 1.0
    own: float = 0.05
    draws: int = 0
    sign: int = 1
    metric: str = "fid"
    n: int = 10
    measured: list[tuple[str, int]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def evaluations(self) -> int:
        return len(self.measured)

    def __post_init__(self) -> None:
        self.entries: dict[Candidate, Entry] = {}

    def entry(self, candidate: Candidate, budget: int) -> Entry:
        if candidate not in self.entries:
            known = candidate.label in self.truth
            cell = cast(Any, SimpleNamespace(spacing=None, steps=budget, budget=budget, sigmas=torch.zeros(1)))
            self.entries[candidate] = Entry(candidate, cell if known else None, None if known else "unknown")
        return self.entries[candidate]

    def draw(self, entry: Entry, seed: int) -> float:
        noise = random.Random(f"{self.draws} {seed}").gauss(0, self.shared)
        own = random.Random(f"{self.draws} {seed} {entry.candidate.label}").gauss(0, self.own)
        return self.truth[entry.candidate.label] + noise + own

    def measure(self, entries: Sequence[Entry], seeds: Sequence[int]) -> None:
        for entry in entries:
            for seed in seeds:
                if entry.reason is None and seed not in entry.values:
                    entry.values[seed] = self.draw(entry, seed)
                    self.measured.append((entry.candidate.label, seed))

    def measure_again(self, entries: Sequence[Entry], seed: int, blocks: int) -> list[dict[str, Any]]:
        values = [[self.draw(entry, seed + block) for block in range(blocks)] for entry in entries]
        return [{"metrics": {self.metric: {"blocks": v}}, "seconds": 1.0} for v in values]


def test_a_race_drops_what_is_worse_and_keeps_what_cannot_be_told_apart() -> None:
    """Noise of size 1 that all candidates share does not hide a difference of 0.5, because values are paired."""
    truth, kept = {"best": 1.0, "equal": 1.0, "worse": 1.5, "bad": 9.0}, []
    for draws in range(20):
        arena = Simulated(truth, draws=draws)
        entries = [arena.entry(Candidate(name), 8) for name in (*truth, "unknown")]
        alive = race(cast(Any, arena), entries, 0)
        kept.append({e.candidate.label for e in alive})
        seeds = {name: [seed for label, seed in arena.measured if label == name] for name in truth}
        assert len(seeds["bad"]) == RUNGS[0]  # what is dropped is not measured further
        assert seeds[alive[0].candidate.label] == list(range(RUNGS[-1]))
    assert all(labels <= {"best", "equal"} for labels in kept)
    assert sum(labels == {"best", "equal"} for labels in kept) >= 14  # 5% are dropped by chance at each of 3 rungs


def planted(draws: int) -> tuple[Simulated, Space, Candidate]:
    """A space with one candidate that is better than the others."""
    space = Space(("ddim", "dpm++"), ("karras", "logsnr"))
    every = [
        Candidate(sampler, None, spacing)
        for sampler in ("ddim", "ddim:eta=0.25", "ddim:eta=0.5", "ddim:eta=0.75", "ddim:eta=1")
        for spacing in (None, "logsnr", "karras", *(f"karras:rho={rho}" for rho in ("3.5", "4.9", "9.8", "14")))
    ]
    truth = {c.label: 5.0 + 0.3 * i / len(every) for i, c in enumerate(every)} | {"dpm++": 5.2}
    winner = every[len(every) // 2]
    truth[winner.label] = 4.5
    return Simulated(truth, draws=draws), space, winner


@pytest.mark.slow
@pytest.mark.parametrize("draws", range(2))
def test_a_planted_winner_is_found(draws: int) -> None:
    arena, space, winner = planted(draws)
    tuned = tune(cast(Any, arena), space, 8, draws, Limit(evaluations=300))
    assert tuned.winner.candidate == winner
    assert not tuned.difference.tied
    assert tuned.improvement == pytest.approx(0.5, abs=0.1)
    assert tuned.best_default.candidate == Candidate("ddim")
    assert tuned.winner.fresh.low < 4.5 < tuned.winner.fresh.high
    assert tuned.tried > 15


def every(space: Space) -> list[Candidate]:
    """All candidates of a space: every choice of every parameter."""
    candidates: dict[Candidate, None] = {}

    def extend(prefix: list[Any]) -> None:
        asked: list[tuple[Any, Sequence[Any]]] = []

        def choose(_: str, choices: Sequence[Any]) -> Any:
            value = prefix[len(asked)] if len(asked) < len(prefix) else choices[0]
            asked.append((value, choices))
            return value

        candidates[space.suggest(SimpleNamespace(suggest_categorical=choose))] = None
        for place in range(len(prefix), len(asked)):
            for value in asked[place][1][1:]:
                extend([value_before for value_before, _ in asked[:place]] + [value])

    extend([])
    return list(candidates)


@pytest.mark.slow
def test_the_best_candidate_of_an_exact_problem_is_found_in_19_of_20_searches(tmp_path: Path) -> None:
    """The best one is known from an exhaustive measurement with other noise. No two searches share noise."""
    space, nfe = Space(("ddim:eta=0,cfg_pp=false", "ipndm:order=3"), ("karras", "trailing")), 4
    request = Request([one_grid(["ddim"], nfe=[nfe])], model="exact:mixture,shape=1x2x2", metrics=("gap",), n=8)
    arena = Arena(request, "cpu", Store(tmp_path))
    entries = list(dict.fromkeys(arena.entry(candidate, nfe) for candidate in every(space)))
    seeds = range(500_000, 500_012)
    arena.measure(entries, seeds)
    ranked = sorted((e for e in entries if e.reason is None), key=lambda e: e.mean(seeds))
    assert len(ranked) >= 15
    best, second = ranked[:2]
    margin = paired_difference(second.at(seeds), best.at(seeds))
    assert margin.mean > 1.5 * margin.margin  # so that there is one best candidate
    tuned = [tune(arena, space, nfe, 100 * k, Limit(evaluations=20_000)) for k in range(20)]
    right = [arena.entry(one.winner.candidate, nfe) is best for one in tuned]
    assert sum(right) >= 19
    assert all(one.improvement > 0 and not one.difference.tied for one in tuned)


@pytest.mark.slow
def test_the_best_of_many_equal_candidates_is_too_good_in_the_search() -> None:
    """All candidates are equal, so the winner's value in the search is too low. The fresh one is right on average."""
    search, fresh = [], []
    for draws in range(6):
        arena, space, _ = planted(draws)
        arena.truth, arena.shared, arena.own = dict.fromkeys(arena.truth, 5.0), 0.0, 0.5
        tuned = tune(cast(Any, arena), space, 8, 0, Limit(evaluations=150))
        search.append(tuned.winner.search)
        fresh.append(tuned.winner.fresh.value)
    assert sum(search) / 6 < 4.85
    assert sum(fresh) / 6 == pytest.approx(5.0, abs=0.2)


@pytest.mark.slow
def test_a_higher_value_can_be_better() -> None:
    arena, space, winner = planted(0)
    arena.truth = {label: -value for label, value in arena.truth.items()}
    arena.sign, original = -1, arena.draw

    def measure(entries: Sequence[Entry], seeds: Sequence[int]) -> None:
        for entry in entries:
            for seed in seeds:
                if entry.reason is None and seed not in entry.values:
                    entry.values[seed] = -original(entry, seed)
                    arena.measured.append((entry.candidate.label, seed))

    arena.measure = measure  # type: ignore[method-assign]
    tuned = tune(cast(Any, arena), space, 8, 0, Limit(evaluations=300))
    assert (tuned.better, tuned.winner.candidate) == ("higher", winner)
    assert tuned.improvement == pytest.approx(0.5, abs=0.1)
    assert tuned.winner.fresh.value < 0


def test_without_optuna_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    arena, space, _ = planted(0)
    with pytest.raises(UserError, match=r"^this needs Optuna: pip install 'samplerbench\[tune\]'\.$"):
        tune(cast(Any, arena), space, 8, 0, Limit(evaluations=1))
    assert arena.measured == []


def test_an_interval_is_students() -> None:
    interval = ConfidenceInterval.of([1.0, 2.0, 3.0])
    assert interval.value == 2.0
    assert interval.high - 2.0 == pytest.approx(4.302652729911275 / math.sqrt(3))  # t of two degrees of freedom


# --- On a model -----------------------------------------------------------------------------------------------------


def small(folder: Path, evaluations: int = 1500, seed: int = 0, **more: Any) -> Tuned:
    request = Request([one_grid(["ddim"], nfe=[6])], model="exact:mixture,shape=1x2x2", metrics=("gap",), n=4)
    arena = Arena(request, "cpu", Store(folder), **more)
    return tune(arena, Space(("ddim", "ipndm"), ("logsnr",)), 6, seed, Limit(evaluations=evaluations))


def same(tuned: Tuned) -> dict[str, Any]:
    return {key: value for key, value in tuned.as_dict().items() if key != "seconds"}


@pytest.mark.slow
def test_an_interrupted_search_continues_and_a_seed_gives_the_same_choice(tmp_path: Path) -> None:
    whole = small(tmp_path / "whole")
    with pytest.raises(Stopped):
        small(tmp_path / "parts", stop=lambda: len([*(tmp_path / "parts").glob("*.json")]) >= 5)
    kept = {file.name: file.read_bytes() for file in (tmp_path / "parts").glob("*.json")}
    assert len(kept) >= 5
    continued = small(tmp_path / "parts")
    assert same(continued) == same(whole)
    assert all((tmp_path / "parts" / name).read_bytes() == data for name, data in kept.items())
    assert whole.difference.mean < 0  # a better schedule than the default of ddim and ipndm
    assert whole.evaluations >= 1500


def test_the_last_measurement_has_a_seed_of_its_own(tmp_path: Path) -> None:
    small(tmp_path, evaluations=1)
    seeds = [json.loads(file.read_text())["seed"] for file in tmp_path.glob("*.json")]
    assert {*seeds} == {*range(RUNGS[-1]), FRESH_OFFSET}


def test_the_command_prints_what_its_suite_measures_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ("tune", *MODEL, "--nfe", "4,6", "--metric", "gap", "-s", "ddim", "-s", "ipndm", "--spacing", "logsnr")
    arguments = (*arguments, "--evaluations", "1500", "--out", str(out))
    assert command(*arguments, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ["4", "6"]
    for nfe, tuned in printed.items():
        assert tuned["nfe"] == int(nfe) == tuned["winner"]["nfe"]
        assert tuned["winner"].keys() == {"sampler", "guidance", "spacing", "nfe", "steps"}
        assert tuned["fresh"]["low"] <= tuned["fresh"]["value"] <= tuned["fresh"]["high"]
        assert {"search_best", "best_default", "tried", "seconds", "tied", "difference"} <= tuned.keys()
        assert tuned["best_default"]["fresh"].keys() == {"value", "low", "high"}
        assert tuned["diffusers"]["line"].startswith("pipe.scheduler = ")
        assert tuned["comfyui"].keys() == {"sampler", "scheduler"}
    assert json.loads((out / "tuned.json").read_text("utf-8")) == printed
    assert (out / "tuned.png").read_bytes().startswith(b"\x89PNG")
    request = load_suite(out / "tuned.toml")
    assert (request.blocks, request.seeds, request.n) == (FRESH, (FRESH_OFFSET,), 8)
    before = {file.name for file in out.glob("*.json")}
    assert all(entry.record is not None for entry in Store(out).entries())  # tuned.json is not taken for a result
    assert command("run", str(out / "tuned.toml"), "--out", str(out), "--json") == 0
    records = json.loads(capsys.readouterr().out)
    assert {file.name for file in out.glob("*.json")} == before  # nothing was sampled again
    values = {(r["sampler"], r["budget"]): r["metrics"]["gap"]["value"] for r in records}
    for tuned in printed.values():
        expected = tuned["fresh"]["value"]
        name = registry.parse("sampler", tuned["winner"]["sampler"]).spec
        assert expected == pytest.approx(next(v for (s, n), v in values.items() if n == tuned["nfe"] and v == expected))
        assert any(s.partition(":")[0] == name.partition(":")[0] for s, _ in values)


@pytest.mark.slow
def test_the_verdict_says_what_is_better_and_what_is_not(tmp_path: Path) -> None:
    tuned = small(tmp_path)
    assert "better than the best default row" in verdict(tuned) or "not significantly different" in verdict(tuned)
    code = code_of(tuned.winner).lines
    assert f'as_scheduler("{tuned.winner.candidate.sampler}", pipe.scheduler' in code
    assert f"num_inference_steps={tuned.winner.steps}" in code


@pytest.mark.slow
def test_the_code_runs_in_a_pipeline(tmp_path: Path) -> None:
    from diffusers import DDIMPipeline, DDIMScheduler
    from support.pipelines import tiny_unet

    pipe = DDIMPipeline(tiny_unet(1), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    tuned = small(tmp_path)
    made: dict[str, Any] = {"pipe": pipe}
    exec(code_of(tuned.winner).lines, made)
    assert len(made["images"]) == 1
    assert type(pipe.scheduler).__name__ == "SamplerScheduler"


def test_a_metric_that_no_sampler_has_is_one_line(tmp_path: Path) -> None:
    request = Request([one_grid(["ddim"], nfe=[2])], model="exact:mixture,shape=1x2x2", metrics=("gap",), n=4)
    arena = Arena(request, "cpu", Store(tmp_path))
    with pytest.raises(UserError, match=r"^no sampler can be run with 2 evaluations \(ddpm: it has no gap\)\.$"):
        tune(arena, Space(("ddpm",)), 2, 0, Limit(evaluations=1))
