"""Names of samplers in other software: what the error says of them, and that the images are the same."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import test_scheduler_predictions
import test_solvers_agree
import torch
from samplerbench_plugins import foreign_names
from samplerbench_plugins.foreign_names import DIFFUSERS, K_DIFFUSION, TABLE, ForeignName
from test_solvers_agree import difference, ours
from torch import Tensor

import samplerbench
from samplerbench import registry
from samplerbench.bench.suite import load_suite
from samplerbench.cli.app import main
from samplerbench.errors import UserError
from samplerbench.models.exact import ExactModel, exact
from samplerbench.sampling.spacing import make_grid

pytestmark = pytest.mark.filterwarnings("ignore::Warning:diffusers", "ignore:__array_wrap__:DeprecationWarning")

TESTS = Path(__file__).parent
STEPS = 8
KNOWN = {kind: {e.name for e in registry.entries(kind) if e.distribution == registry.OWN} for kind in registry.BASES}


def identify(row: ForeignName) -> str:
    return f"{row.software.partition(',')[0]}-{row.names[0]}"


def error_of(kind: str, name: str) -> str:
    with pytest.raises(UserError) as caught:
        registry.parse(kind, name)
    return str(caught.value)


# --- The table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", {(row.kind, row.spec): row for row in TABLE if row.spec}.values(), ids=identify)
def test_every_spec_of_the_table_is_one(row: ForeignName) -> None:
    registry.parse(row.kind, row.spec)
    if row.spacing:
        registry.parse("spacing", row.spacing)


def test_a_row_without_an_equivalent_says_so() -> None:
    assert all(row.note for row in TABLE if not row.spec)
    assert not any(row.shown_by for row in TABLE if not row.spec or row.spec.startswith("diffusers/"))
    nearest = [row for row in TABLE if row.spec and not row.spec.startswith("diffusers/") and not row.shown_by]
    assert all(row.note for row in nearest), "how does it differ?"


def test_no_name_stands_for_two_methods() -> None:
    found: dict[tuple[str, str], str] = {}
    for row in TABLE:
        for key in {(row.kind, foreign_names.normalised(name)) for name in row.names}:
            assert found.setdefault(key, row.spec) == row.spec, key


def test_every_sampler_of_diffusers_has_a_row() -> None:
    named = {row.names[0] for row in TABLE if row.software == DIFFUSERS and row.kind == "sampler"}
    assert {spec.partition(":")[0] for spec in test_scheduler_predictions.SAMPLERS} <= named


@cache
def of_the_papers(name: str) -> list[dict[str, Any]]:
    """The parameters of a sampler that are compared with the algorithms of the papers."""
    specs = [spec for spec in test_solvers_agree.PAPERS if spec.partition(":")[0] == name]
    return [registry.parse("sampler", spec).parameters for spec in specs]


TESTED = {(row.spec, row.shown_by): row for row in TABLE if row.shown_by.startswith("test_")}


@pytest.mark.parametrize("row", TESTED.values(), ids=identify)
def test_what_a_row_refers_to_tests_its_spec(row: ForeignName) -> None:
    file, _, function = row.shown_by.partition("::")
    source = (TESTS / file).read_text("utf-8")
    assert re.search(rf"^def {function}\(", source, re.MULTILINE)
    if function == "test_same_as_the_paper":
        assert registry.parse("sampler", row.spec).parameters in of_the_papers(row.spec.partition(":")[0])
    else:
        assert row.spec.partition(":")[0] in source


# --- The same images ------------------------------------------------------------------------------------------------


@cache
def the_model() -> ExactModel:
    return exact("mixture", shape="2x2x2")


@pytest.fixture
def model() -> ExactModel:
    return the_model()


@cache
def on_a_spacing(spec: str, spacing: str) -> Tensor:
    model = the_model()
    return ours(model, spec, make_grid(registry.parse("spacing", spacing), model.levels, STEPS))


SAME = {(row.spec, row.shown_by): row for row in TABLE if row.shown_by.startswith("diffusers/")}


@pytest.mark.parametrize("row", SAME.values(), ids=identify)
def test_images_are_those_of_diffusers(row: ForeignName) -> None:
    """On the same timesteps, with the same noise; its tables are float32."""
    spacing = "leading" if "timestep_spacing=leading" in row.shown_by else "trailing"
    theirs = on_a_spacing(row.shown_by, spacing)
    found = on_a_spacing(row.spec, spacing)
    assert difference(found, theirs) <= 1e-4 * float(theirs.abs().max())
    assert difference(found, on_a_spacing("dpm-solver:order=3", spacing)) > 1e-3  # not every method is near


@pytest.mark.parametrize(
    ("spec", "same"), [("ddim", "pf-ode:solver=euler"), ("ddpm", "ddim:eta=1")], ids=["euler", "euler a"]
)
def test_the_other_spec_of_a_note_gives_the_same_images(spec: str, same: str) -> None:
    row = next(row for row in TABLE if row.spec == spec and same in row.note)
    assert difference(on_a_spacing(row.spec, "karras"), on_a_spacing(same, "karras")) <= 1e-12


NEAREST = [
    row
    for row in TABLE
    if row.software == DIFFUSERS and not row.shown_by and not row.spec.startswith("diffusers/")
    if row.names[0] not in ("DPMSolverSDEScheduler", "IPNDMScheduler")  # the adapter refuses them
]


@pytest.mark.parametrize("row", NEAREST, ids=identify)
def test_a_nearest_method_is_another_one(row: ForeignName) -> None:
    """Else the row could say that they are the same."""
    theirs = on_a_spacing(f"diffusers/{row.names[0]}", "trailing")
    assert difference(on_a_spacing(row.spec, "trailing"), theirs) > 1e-3


# --- The same grids -------------------------------------------------------------------------------------------------


def of_comfyui(name: str, levels: Tensor, steps: int) -> list[float]:
    """Timesteps of ComfyUI's schedules, descending, for T noise levels."""
    top, total = len(levels) - 1, len(levels)
    return {
        "normal": [top - top * i / (steps - 1) for i in range(steps)],
        "sgm_uniform": [top - top * i / steps for i in range(steps)],
        "simple": [float(top - int(i * total / steps)) for i in range(steps)],
        "ddim_uniform": [float(t) for t in range(1, total, total // steps)][::-1],
    }[name]


def timesteps(model: ExactModel, spec: str, steps: int) -> list[int]:
    grid = make_grid(registry.parse("spacing", spec), model.levels, steps)[:-1]
    return [int((model.levels == level).nonzero()) for level in grid]


@pytest.mark.parametrize(
    ("name", "apart"), [("simple", 0.0), ("ddim_uniform", 0.0), ("normal", 0.5), ("sgm_uniform", 1.5)]
)
def test_schedules_of_comfyui(model: ExactModel, name: str, apart: float) -> None:
    row = foreign_names.lookup("spacing", name, KNOWN["spacing"])
    assert row is not None
    assert bool(row.shown_by) == (apart == 0)
    for steps in (2, 4, 10, 20, 50, 125):  # divisors of T, as the notes require
        expected, found = of_comfyui(name, model.levels, steps), timesteps(model, row.spec, steps)
        assert len(found) == len(expected)
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= apart


def test_simple_and_ddim_uniform_need_a_divisor(model: ExactModel) -> None:
    assert of_comfyui("simple", model.levels, 30) != timesteps(model, "trailing", 30)
    assert len(of_comfyui("ddim_uniform", model.levels, 30)) > 30


@pytest.mark.parametrize("rho", [1.0, 2.5])
def test_exponential_is_that_of_k_diffusion(model: ExactModel, rho: float) -> None:
    """log σ = log σ_min + r^ρ log(σ_max/σ_min), r from 1 to 0."""
    low, high = model.levels[0].log(), model.levels[-1].log()
    ramp = torch.linspace(1, 0, STEPS, dtype=torch.float64) ** rho
    grid = make_grid(registry.parse("spacing", f"exponential:rho={rho}"), model.levels, STEPS)
    torch.testing.assert_close(grid[:-1], (low + ramp * (high - low)).exp())
    assert grid[-1] == 0


# --- The error ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("sampler", "dpmpp_2m", "it is called dpm++ here."),
        ("sampler", "sample_dpmpp_2m", "it is called dpm++ here."),
        ("sampler", "k_dpmpp_2m_ka", "it is called dpm++ here, with the spacing karras."),
        ("sampler", "DPM++ 2M Karras", "it is called dpm++ here, with the spacing karras."),
        ("sampler", "Heun Karras", "it is called heun here, with the spacing karras."),
        ("sampler", "dpmpp_2m:eta=1", "it is called dpm++ here."),
        ("sampler", "dpmpp_2m_sde_gpu", "it is called dpm++:sde=true here (for the same normal draws)."),
        ("sampler", "euler", "it is called ddim here (pf-ode:solver=euler gives the same images; without churn)."),
        ("sampler", "Euler a", "it is called ddpm here (ddim:eta=1 gives the same images)."),
        ("sampler", "dpm-solver++", "it is called dpm++ here."),
        (
            "sampler",
            "UniPCMultistepScheduler",
            "it is called unipc:order=2 here; the code of diffusers is diffusers/UniPCMultistepScheduler.",
        ),
        ("sampler", "lcm", "it is called consistency here (it requires a consistency-distilled model)."),
        ("sampler", "DPM2 a Karras", "use diffusers/KDPM2AncestralDiscreteScheduler:use_karras_sigmas=true."),
        ("sampler", "MadeUpScheduler", "use diffusers/MadeUpScheduler."),
        ("sampler", "dpmpp_3m_sde", "the nearest one here is dpm++:sde=true,order=3 (they use half of the "),
        ("sampler", "ddim_cfgpp", "it is called ddim:cfg_pp=true here (with the guidance cfg:scale=0.6)."),
        ("sampler", "dpmpp_2m_cfg_pp", "CFG++ is available for ddim only."),
        ("sampler", "karras", "it is a spacing here."),
        ("spacing", "sgm_uniform", "the nearest one here is trailing (its timesteps differ by less than 1.5)."),
        ("spacing", "heun", "it is a sampler here."),
        ("spacing", "beta", "this schedule is not available here; list takes noise levels."),
        ("sampler", "normal", "it is the name of a spacing: the nearest one here is linspace "),
    ],
)
def test_the_error_names_the_equivalent(kind: str, name: str, says: str) -> None:
    message = error_of(kind, name)
    assert message.startswith(f'no {kind} "{name.partition(":")[0]}": {says}')
    assert "\n" not in message


@pytest.mark.parametrize("ending", ["karras", "exponential"])
def test_what_the_error_names_is_a_spec(ending: str) -> None:
    """With an ending that names a spacing too, which diffusers' schedulers have as a parameter."""
    names = [f"{row.names[-1]} {ending}" for row in TABLE if (row.software, row.kind) == (K_DIFFUSION, "sampler")]
    found = [foreign_names.lookup("sampler", name, KNOWN["sampler"]) for name in names]
    for spec in {row.spec for row in found if row is not None and "_sigmas" in row.spec}:
        registry.parse("sampler", spec)
    assert len(found) - found.count(None) > 15


@pytest.mark.parametrize(("word", "meant"), [("ddmi", "ddim"), ("UniPC", "unipc"), ("dpm_solver", "dpm-solver")])
def test_other_spellings_of_our_names_are_suggested_as_before(word: str, meant: str) -> None:
    assert f'no sampler "{word}". Did you mean "{meant}"? Known: ' in error_of("sampler", word)


def test_a_foreign_name_is_not_an_alias_and_a_plugin_may_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "euler" not in registry.aliases("sampler")
    mine = registry.Entry("sampler", "euler", "mine:Mine", "mine", "1.0")
    entries = registry.entries
    monkeypatch.setattr(
        registry, "entries", lambda kind: [*entries(kind), mine] if kind == "sampler" else entries(kind)
    )
    assert registry.find("sampler", "euler") == mine


def test_a_method_that_is_not_installed_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = registry.entries
    monkeypatch.setattr(registry, "entries", lambda kind: [e for e in entries(kind) if e.name != "dpm++"])
    assert "dpm++" not in error_of("sampler", "dpmpp_2m")


@pytest.mark.parametrize(
    "command",
    [
        "run --sampler dpmpp_2m --steps 2 --model exact:gaussian --metric gap",
        "show dpmpp_2m",
        "check dpmpp_2m",
        "sample out.png --sampler dpmpp_2m --steps 2",
    ],
)
def test_every_command_names_the_equivalent(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 2
    assert '"dpmpp_2m": it is called dpm++ here.\n' in capsys.readouterr().err


def test_a_suite_and_python_name_the_equivalent(tmp_path: Path) -> None:
    file = tmp_path / "suite.toml"
    file.write_text('[[grid]]\nsamplers = ["ddim"]\nspacings = ["sgm_uniform"]\nsteps = [5]\n')
    with pytest.raises(UserError, match=r':3: no spacing "sgm_uniform": the nearest one here is trailing '):
        load_suite(file)
    with pytest.raises(UserError, match=r'no sampler "dpmpp_2m": it is called dpm\+\+ here\.'):
        samplerbench.evaluate("dpmpp_2m", steps=1, model="exact:gaussian", metrics=["gap"], n=2, device="cpu")
