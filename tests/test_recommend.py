"""`samplerbench recommend`: existing results, searches, latencies, and the code and names that come out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from samplerbench import cli, elsewhere, registry
from samplerbench.bench import latency as bench_latency
from samplerbench.bench.prepare import prepare
from samplerbench.bench.request import Request, one_grid
from samplerbench.bench.run import Observer, Run
from samplerbench.bench.suite import load_suite
from samplerbench.diffusers.equivalent import equivalent_scheduler
from samplerbench.errors import UserError
from samplerbench.results.store import Store
from samplerbench.tuning.arena import Arena
from samplerbench.tuning.clock import Clock
from samplerbench.tuning.code import Pipeline, code_of, pipeline_of
from samplerbench.tuning.recommend import Budget, Recommendation, recommend
from samplerbench.tuning.search import ConfidenceInterval, Limit, Row
from samplerbench.tuning.space import Candidate, Space
from samplerbench.tuning.stored import Stored, best_of

MODEL = "exact:mixture,shape=1x2x2"
SAMPLERS = ("ddim", "ipndm", "dpm++")
SPACE = Space(SAMPLERS, ("logsnr",))


def request(**more: Any) -> Request:
    return Request([one_grid(["ddim"], nfe=[6])], model=MODEL, metrics=("gap",), **more)


def filled(
    folder: Path, nfe: int = 6, seeds: tuple[int, ...] = (0, 1, 2), samplers: tuple[str, ...] = SAMPLERS
) -> None:
    """Results as those of `samplerbench run`."""
    wanted = Request([one_grid(list(samplers), nfe=[nfe])], model=MODEL, metrics=("gap",), n=4, seeds=seeds)
    Run(prepare(wanted, "cpu"), Store(folder)).run(Observer())


def chosen(folder: Path, budget: Budget, space: Space = SPACE, **more: Any) -> Recommendation:
    wanted = more.pop("request", request())
    return recommend(wanted, "cpu", Store(folder), space, budget, **more)


# --- Existing results -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_existing_results_are_used_and_the_winner_is_measured_again(tmp_path: Path) -> None:
    filled(tmp_path)
    records = [r for _, r in Store(tmp_path).records() if r is not None]
    means: dict[str, list[float]] = {}
    for r in records:
        means.setdefault(r["sampler"], []).append(r["metrics"]["gap"]["value"])
    best = min(means, key=lambda name: sum(means[name]))
    found = chosen(tmp_path, Budget(nfe=6), source="results")
    assert found.source == "results"
    assert found.winner.candidate.sampler == found.best_default.candidate.sampler == best
    assert found.winner.search == pytest.approx(sum(means[best]) / 3)
    assert found.n == 4  # that of the results
    fresh = [r for _, r in Store(tmp_path).records() if r is not None and r["seed"] >= 1_000_000]
    assert [(r["sampler"], r["blocks"]) for r in fresh] == [(best, 8)]
    assert found.winner.fresh.value == pytest.approx(fresh[0]["metrics"]["gap"]["value"])
    # The fresh measurement is never used to choose.
    again = chosen(tmp_path, Budget(nfe=6), source="results")
    assert (again.winner.search, again.winner.fresh) == (found.winner.search, found.winner.fresh)


def test_results_that_do_not_suffice_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'^out=".*nowhere": there is no such folder, so it has no r'):
        chosen(tmp_path / "nowhere", Budget(nfe=6), source="results")
    with pytest.raises(UserError, match=r"do not suffice for a recommendation: none has this model, metric and prot"):
        chosen(tmp_path, Budget(nfe=6), source="results")
    filled(tmp_path, samplers=("ddim", "ipndm"))
    with pytest.raises(UserError, match=r"not all of the named samplers use the budget of 6 evaluations\.$"):
        chosen(tmp_path, Budget(nfe=6), source="results", named=True)
    with pytest.raises(UserError, match=r"too few samplers use the budget of 12 evaluations\.$"):  # 6 are half of it
        chosen(tmp_path, Budget(nfe=12), Space(("ddim", "ipndm")), source="results")
    with pytest.raises(UserError, match=r"none has this model, metric and protocol with n = 5 "):
        chosen(tmp_path, Budget(nfe=6), source="results", request=request(n=5))


def test_edited_code_or_another_dtype_is_another_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    with pytest.raises(UserError, match="none has this model, metric and protocol"):
        chosen(tmp_path, Budget(nfe=6), source="results", request=request(dtype="fp64"))
    monkeypatch.setattr("samplerbench.bench.cell._source_hash", lambda cls: "edited")
    with pytest.raises(UserError, match="none has this model, metric and protocol"):
        chosen(tmp_path, Budget(nfe=6), source="results")


def row(*values: float, first: int = 0) -> Stored:
    return Stored(object(), {(0, first + i): v for i, v in enumerate(values)}, 6.0, False)  # type: ignore[arg-type]


def test_the_best_of_results_with_different_numbers_of_blocks() -> None:
    """A row with fewer blocks wins only if it is significantly better on the common ones."""
    long, lucky, better = row(1.0, 1.2, 1.1, 0.9), row(0.9, 1.25), row(0.50, 0.71)
    assert best_of([long, lucky]) is long
    assert best_of([lucky, long, better]) is better
    assert best_of([row(0.1, first=9), long]) is long  # no block in common
    assert best_of([]) is None


# --- A search, and the choice ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_results_it_searches_and_a_second_call_uses_the_search(tmp_path: Path) -> None:
    lines: list[str] = []
    given = {"request": request(n=4), "limit": Limit(evaluations=800)}
    found = chosen(tmp_path, Budget(nfe=6), Space(("ddim", "ipndm"), ("logsnr",)), say=lines.append, **given)
    assert found.source == "search"
    assert found.tuned is not None
    assert "searching, because the results in" in lines[0]
    space = Space(("ddim", "ipndm"), ("logsnr",))
    second = chosen(tmp_path, Budget(nfe=6), space, source="results")
    assert second.winner.candidate.sampler == registry.parse("sampler", found.winner.candidate.sampler).spec
    assert second.winner.fresh == found.winner.fresh  # the same noise, which the choice did not use


def interval(value: float) -> ConfidenceInterval:
    return ConfidenceInterval(value, value - 0.1, value + 0.1)


def a_row(sampler: str = "ddim", spacing: str | None = "trailing", guidance: str | None = None, steps: int = 5) -> Row:
    return Row(Candidate(sampler, guidance, spacing), spacing, steps, steps, steps, 1.0, interval(1.0), (3.0, 1.0, 0.0))


def test_a_tie_recommends_the_default_row(tmp_path: Path) -> None:
    from dataclasses import replace

    from samplerbench.results.compare import Difference
    from samplerbench.tuning.words import recommended

    filled(tmp_path)
    found = chosen(tmp_path, Budget(nfe=6), source="results")
    other = a_row("ipndm:order=2", "logsnr")
    tied = replace(found, winner=other, difference=Difference(-0.1, 0.2))
    assert tied.choice is found.best_default
    assert tied.as_dict()["recommended"] == "best_default"
    assert "This is not significantly different from the best default row" in recommended(tied)
    assert "use ipndm:order=2" not in recommended(tied)
    better = replace(tied, difference=Difference(-0.3, 0.2))
    assert better.choice is other
    assert "0.3 ± 0.2 better than the best default row" in recommended(better)
    worse = replace(tied, difference=Difference(0.3, 0.2))
    assert worse.choice is found.best_default
    assert "; use the default row." in recommended(worse)


# --- A time per image -----------------------------------------------------------------------------------------------


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A machine on which a batch takes 2 ms and 10 ms for each evaluation. `slow` is added for dpm++."""
    machine = {"slow": 0.0, "batches": 0}

    def batch(self: Any, configuration: Any, method: Any, parts: Any = None) -> float:
        machine["batches"] += 1
        sampler = configuration.cell.method.spec
        seconds = 0.002 + 0.010 * (configuration.cell.steps or 0) + machine["slow"] * sampler.startswith("dpm++")
        if parts is not None:
            original(self, configuration, method, parts)
        return seconds

    original = bench_latency._Measurement._batch
    monkeypatch.setattr(bench_latency._Measurement, "_batch", batch)
    return machine


def test_the_number_of_evaluations_that_fit_into_a_time(tmp_path: Path, steady: dict[str, float]) -> None:
    arena = Arena(request(n=4), "cpu", Store(tmp_path))
    clock = Clock(arena.request, arena.model, "cpu", Store(tmp_path), 1, repeats=1)
    assert clock.evaluations_within(SPACE, 65) == {None: 6}
    assert clock.evaluations_within(SPACE, 105) == {None: 10}
    assert clock.evaluations_within(SPACE, 15) == {None: 1}
    with pytest.raises(UserError, match=r'^budget="5ms": one evaluation takes 12 ms per image with batch_size=1; give'):
        clock.evaluations_within(SPACE, 5)
    before = steady["batches"]
    again = Clock(arena.request, arena.model, "cpu", Store(tmp_path), 1, repeats=1)
    assert again.evaluations_within(SPACE, 65) == {None: 6}
    assert (steady["batches"], again.measured) == (before, 0)  # stored latencies are used
    assert again.reused > 0
    larger = Clock(arena.request, arena.model, "cpu", Store(tmp_path), 2, repeats=1)
    assert larger.evaluations_within(SPACE, 65) == {None: 12}  # a batch of two in the same time
    assert larger.measured > 0  # another batch size is another condition


@pytest.mark.slow
def test_a_row_that_takes_longer_than_the_budget_is_not_recommended(tmp_path: Path, steady: dict[str, float]) -> None:
    filled(tmp_path, nfe=6)
    filled(tmp_path, nfe=4)
    budget = Budget(milliseconds=65, repeats=1)
    free = chosen(tmp_path, budget, source="results")
    assert free.winner.candidate.sampler == "dpm++"
    assert free.milliseconds == (pytest.approx(62), pytest.approx(62))
    steady["slow"] = 0.010
    (tmp_path / "latency.json").unlink()
    limited = chosen(tmp_path, budget, source="results")
    assert limited.winner.candidate.sampler != "dpm++"
    assert limited.milliseconds is not None
    assert max(limited.milliseconds) <= 65
    assert all(dot.cost > 0 for dot in limited.dots)


@pytest.mark.slow
def test_a_search_for_a_time(tmp_path: Path, steady: dict[str, float]) -> None:
    steady["slow"] = 0.010
    budget = Budget(milliseconds=65, repeats=1)
    more = {"request": request(n=4), "limit": Limit(evaluations=400)}
    found = chosen(tmp_path, budget, Space(("ddim", "dpm++:order=2"), ()), source="search", **more)
    assert found.winner.candidate.sampler.startswith("ddim")
    assert found.milliseconds is not None
    assert max(found.milliseconds) <= 65
    assert "An image takes 62 ms (cpu, " in found.verdict


# --- diffusers ------------------------------------------------------------------------------------------------------


def config(name: str = "DDPMScheduler", **settings: Any) -> dict[str, Any]:
    import diffusers

    made = getattr(diffusers, name)(**settings)
    return {**made.config, "_class_name": name}


@pytest.mark.parametrize(
    ("sampler", "spacing", "line"),
    [
        (
            "dpm++",
            "trailing",
            'DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")',
        ),
        ("unipc", "trailing", "UniPCMultistepScheduler.from_config(pipe.scheduler.config, solver_order=3, timestep_"),
        ("ddim", "leading", 'DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")'),
        ("dpm++", "logsnr", None),
        ("dpm++:order=3", "trailing", None),  # half of the second-derivative term there
        ("ipndm", "trailing", None),
    ],
)
def test_the_equivalent_scheduler(sampler: str, spacing: str, line: str | None) -> None:
    found = equivalent_scheduler(
        registry.parse("sampler", sampler), registry.parse("spacing", spacing), 8, config(clip_sample=False)
    )
    assert (found is None) == (line is None)
    assert found is None or line is None or found.code.startswith(line)


def test_a_scheduler_that_would_not_clip_is_not_equivalent() -> None:
    """DDPMScheduler clips by default, and `as_scheduler` takes it over. DPMSolverMultistepScheduler ignores it."""
    parts = (registry.parse("sampler", "dpm++"), registry.parse("spacing", "trailing"), 8)
    assert equivalent_scheduler(*parts, config(clip_sample=True)) is None
    assert equivalent_scheduler(*parts, config(clip_sample=False)) is not None


def saved(folder: Path) -> Path:
    from diffusers import DDPMPipeline, DDPMScheduler
    from support.pipelines import tiny_unet

    DDPMPipeline(tiny_unet(1), DDPMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "stock"), [("dpm++", "DPMSolverMultistepScheduler"), ("ipndm", None)])
def test_the_program_runs_on_a_saved_checkpoint(sampler: str, stock: str | None, tmp_path: Path) -> None:
    """Its images are those of samplerbench from the same noise."""
    from diffusers import DiffusionPipeline

    import samplerbench

    folder = saved(tmp_path / "model")
    model = samplerbench.load_model(folder, device="cpu")
    wanted = Request([one_grid([sampler], nfe=[6])], model=str(folder))
    code = code_of(a_row(sampler, steps=6), pipeline_of(wanted, model))
    assert code.stock == stock
    assert ("as_scheduler" in code.line) == (stock is None)
    assert f'DiffusionPipeline.from_pretrained("{folder}", use_safetensors=True)' in code.lines
    made: dict[str, Any] = {}
    torch.manual_seed(3)
    exec(code.lines, made)
    assert len(made["images"]) == 1
    pipe: DiffusionPipeline = made["pipe"]
    assert type(pipe.scheduler).__name__ == (stock or "SamplerScheduler")
    pipe.set_progress_bar_config(disable=True)
    theirs = torch.from_numpy(
        pipe(generator=torch.Generator().manual_seed(3), num_inference_steps=6, output_type="np").images
    )
    noise = torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(3))
    ours = samplerbench.sample(sampler, 6, model=model, spacing="trailing", x_T=noise, output_type="float", quiet=True)
    expected = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert float((theirs - expected).abs().max()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_the_program_of_a_model_that_no_pipeline_samples_uses_samplerbench(named: bool, tmp_path: Path) -> None:
    """One that is known only by its name, and a class-conditional U-Net: DDPMPipeline takes no labels."""
    import samplerbench
    from samplerbench.assets import asset

    source = "digits" if named else str(asset("digits"))
    model = samplerbench.load_model(source, device="cpu")
    code = code_of(a_row("ipndm", "karras", "cfg:scale=2", 3), pipeline_of(Request((), model=source), model))
    assert "pipe" not in code.lines
    made: dict[str, Any] = {}
    exec(code.lines, made)
    wanted = samplerbench.sample("ipndm", 3, model=model, spacing="karras", guidance="cfg:scale=2", quiet=True)
    assert torch.equal(made["images"], wanted)


def test_the_program_of_a_text_to_image_model_has_a_prompt_and_a_guidance_scale() -> None:
    pipeline = Pipeline("runs/mine", ("torch_dtype=torch.bfloat16",), ('"a cat"',), True, None)
    lines = code_of(a_row("ipndm", "karras", "cfg:scale=4", 7), pipeline).lines.splitlines()
    assert lines[0] == "import torch"
    assert lines[-1] == 'images = pipe("a cat", num_inference_steps=7, guidance_scale=4).images'
    other = code_of(a_row("ipndm", "karras", "apg", 7), pipeline).lines.splitlines()
    assert other[-2] == "# The guidance apg is not part of a scheduler; set that of the pipeline."


def test_a_learned_spacing_is_written_as_its_levels() -> None:
    line = code_of(a_row("ipndm", "gap-optimal")).line
    assert line == 'pipe.scheduler = as_scheduler("ipndm", pipe.scheduler, spacing="list:levels=3.0;1.0")'


# --- ComfyUI --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "name", "exact"),
    [
        ("dpm++", "dpmpp_2m", True),
        ("pf-ode:solver=euler", "euler", True),
        ("ddim:eta=0.0", "euler", True),
        ("ddim:eta=1", "euler_ancestral", True),
        ("unipc", "uni_pc_bh2", False),
        ("dpm++:order=3", None, False),
        ("ipndm:order=2", None, False),
    ],
)
def test_names_in_comfyui(spec: str, name: str | None, exact: bool) -> None:
    same = elsewhere.same_parameters("sampler", registry.parse("sampler", spec))
    found = elsewhere.name_in_comfyui("sampler", same)
    assert (None if found is None else found.name) == name
    assert found is None or found.exact == exact
    assert found is None or ("nearest" in found.text) == (not exact)


def test_every_sampler_of_comfyui_is_named_in_reverse() -> None:
    """The table is used in both directions, so they cannot contradict each other."""
    from samplerbench_plugins.foreign_names import K_DIFFUSION, TABLE

    for row in TABLE:
        if row.software == K_DIFFUSION and row.kind == "sampler" and row.shown_by:
            same = elsewhere.same_parameters("sampler", registry.parse("sampler", row.spec))
            found = elsewhere.name_in_comfyui("sampler", same)
            assert found is not None
            assert found.exact


# --- The command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_writes_a_suite_a_program_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path)
    arguments = ["recommend", "--model", MODEL, "--nfe", "6", "--metric", "gap", "--no-search", "--out", str(tmp_path)]
    arguments += [part for name in SAMPLERS for part in ("-s", name)]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--json"])
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "recommended.json").read_text("utf-8"))
    assert (printed["source"], printed["budget"]) == ("results", {"nfe": 6})
    assert printed["winner"]["fresh"].keys() == {"value", "low", "high"}
    assert printed["diffusers"]["line"].startswith("pipe.scheduler = ")
    assert (tmp_path / "recommended.py").read_text("utf-8") == printed["diffusers"]["program"]
    assert (tmp_path / "recommended.png").read_bytes().startswith(b"\x89PNG")
    assert all(math.isfinite(printed["winner"]["fresh"][name]) for name in ("value", "low", "high"))
    suite = load_suite(tmp_path / "recommended.toml")
    assert (suite.blocks, suite.n, suite.seeds) == (8, 4, (1_000_000,))
    with pytest.raises(SystemExit):
        cli.main(arguments)
    shown = capsys.readouterr().out.strip().splitlines()
    assert shown[-1] == f"ComfyUI: {_comfy(printed)}"
    assert shown[-2].startswith(printed["diffusers"]["line"])
    # Neither file is taken for a result.
    with pytest.raises(SystemExit) as ended:
        cli.main(["results", "ls", str(tmp_path)])
    assert ended.value.code == 0
    assert "recommended" not in capsys.readouterr().out


def _comfy(printed: dict[str, Any]) -> str:
    names = [(kind, printed["comfyui"][kind]) for kind in ("sampler", "scheduler")]
    assert all(name is not None and name["exact"] for _, name in names)
    return ", ".join(f"{kind} {name['name']}" for kind, name in names)
