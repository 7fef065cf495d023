"""Where the steps are: every command, figure, check and scheduler takes the same grid for the same sampler."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from support.samplers import own_samplers

import samplerbench
from samplerbench import api, registry
from samplerbench.bench.prepare import prepare
from samplerbench.bench.request import Grid, Request
from samplerbench.cli.common import grid as grid_of_options
from samplerbench.cli.figure import Canvas
from samplerbench.diffusers import SamplerScheduler
from samplerbench.errors import UserError
from samplerbench.models import Model
from samplerbench.sampling.spacing import make_grid, pick_spacing
from samplerbench.testing.sampler import _grid, _problem

ROOT = Path(__file__).resolve().parents[1]
MODEL = "exact:mixture,shape=1x2x2"
NAMED = {"diffusers": "diffusers/DDIMScheduler"}
SAMPLERS = [NAMED.get(name, name) for name in own_samplers(needs_task=False)]


@pytest.mark.parametrize("spec", SAMPLERS)
@pytest.mark.parametrize("spacing", [None, "karras:rho=5"])
def test_figures_checks_and_python_take_the_grid_of_a_run(spec: str, spacing: str | None) -> None:
    sampler = registry.parse("sampler", spec)
    (run,) = prepare(Request([grid_of_options([spec], "7", None, [], spacing)], model=MODEL), "cpu").cells
    (figure,) = Canvas(Path("x.png"), {"model": MODEL}, 1, 0, 16, "cpu").scene([spec], [7], spacing=spacing).cells
    (python,) = api._prepare(Grid([sampler], [7], spacings=[spacing]), MODEL, "cpu", n=1).cells
    for cell in (figure, python):
        assert cell.spacing == run.spacing
        assert torch.equal(cell.sigmas, run.sigmas)
    if spacing is None and run.steps is not None:
        model = _problem("mixture")
        assert torch.equal(_grid(sampler, model, 7), make_grid(pick_spacing(sampler), model.levels, 7))
        assert torch.equal(run.sigmas, make_grid(pick_spacing(sampler), model.levels, 7))


@pytest.mark.parametrize("spec", ["ddim", "dpm++", "heun", "euler-maruyama"])
def test_a_scheduler_of_a_pipeline_takes_it_too(spec: str) -> None:
    assert SamplerScheduler(spec).spacing == pick_spacing(registry.parse("sampler", spec))


def test_the_samplers_own_comes_before_the_toolkits_and_what_is_named_before_both() -> None:
    ddim, pc = registry.parse("sampler", "ddim"), registry.parse("sampler", "pc")
    assert pick_spacing(ddim).spec == "leading"
    assert pick_spacing(pc).spec == registry.default("spacing")
    assert pick_spacing(ddim, "karras:rho=5").spec == "karras:rho=5"
    with pytest.raises(UserError, match='no spacing "nowhere"'):
        pick_spacing(ddim, "nowhere")


def test_no_other_place_chooses_a_spacing() -> None:
    """The default is asked for in one function, so that two commands cannot disagree."""
    folders = (Path(samplerbench.__file__).parent, ROOT / "benchmarks", ROOT / "plugins")
    found = [
        file.name
        for folder in folders
        for file in folder.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node).endswith("default('spacing')")
    ]
    assert found == ["spacing.py"]


# --- The README's sampler --------------------------------------------------------------------------------------------


def readme_sampler(folder: Path) -> str:
    """The spec of the README's example, in a file."""
    text = (ROOT / "README.md").read_text("utf-8")
    code = re.search(r"^## A sampler in fifteen lines\n+```python\n(.*?)^```$", text, re.S | re.M)
    assert code is not None
    (folder / "mine.py").write_text(code[1], "utf-8")
    assert sum(bool(line.strip()) for line in code[1].splitlines()) == 15
    return f"{folder / 'mine.py'}:DDIM"


@pytest.mark.parametrize("parameters", ["", "eta=0.5", "eta=1"])
def test_the_readmes_sampler_gives_the_images_of_ddim(parameters: str, tmp_path: Path, digits: Model) -> None:
    own, built_in = (registry.extend(spec, parameters) for spec in (readme_sampler(tmp_path), "ddim"))
    images = [samplerbench.sample(spec, 10, n=20, model=digits, quiet=True) for spec in (own, built_in)]
    assert torch.equal(*images)
