"""The suites of text-to-image checkpoints, on small random checkpoints of the same pipeline classes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from support.encoders import save_clip
from support.pipelines import SD_BETAS, tiny_stable_diffusion
from support.text_flows import flux, sd3
from support.text_pipelines import xl

from samplerbench.bench.generate import SamplerOnModel
from samplerbench.bench.generate import prepare as prepare_cell
from samplerbench.bench.prepare import Prepared, prepare
from samplerbench.bench.request import Request
from samplerbench.bench.suite import load_suite
from samplerbench.cli.app import main
from samplerbench.report.sheet import tiles
from samplerbench.results.store import Store
from samplerbench.sampling.guidance import evaluations_of
from samplerbench.sampling.sampler import planned_nfe

pytestmark = pytest.mark.filterwarnings("ignore::Warning:diffusers")

SUITES = Path(__file__).parent.parent / "benchmarks" / "suites"
PROMPTS = ["a cat", "a dog", "a boat on a lake"]


def _sdxl(root: Path) -> Any:
    scheduler = diffusers.EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1)
    return xl(root, scheduler, force_zeros_for_empty_prompt=True)


def _sd15(root: Path) -> Any:
    return tiny_stable_diffusion(root, diffusers.PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1))


PIPELINES: dict[str, Callable[[Path], Any]] = {
    "sdxl": _sdxl,
    "sd15": _sd15,
    "sd3": sd3,
    "flux": lambda root: flux(root, True),
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the header of PartiPrompts."""
    file = tmp_path_factory.mktemp("prompts") / "parti.tsv"
    lines = ["Prompt\tCategory\tChallenge\tNote", *(f"{prompt}\tAnimals\tBasic\t" for prompt in PROMPTS)]
    file.write_text("\n".join(lines), "utf-8")
    return file


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function of the name of a suite, which returns a folder with a checkpoint of its pipeline class."""
    root = tmp_path_factory.mktemp("checkpoints")

    def saved(name: str) -> Path:
        if not (root / name / "model").exists():
            (root / name).mkdir()
            pipeline = PIPELINES[name](root / name)
            pipeline.save_pretrained(root / name / "model")
        return root / name / "model"

    return saved


def planned(name: str, model: Path, prompts: Path) -> Prepared:
    request = load_suite(SUITES / f"{name}.toml")
    size = (8, 8) if name == "flux" else None  # its default of 1024 x 1024 is too large for the small network
    return prepare(request.replace(model=str(model), prompts=str(prompts), dtype="fp32", image_size=size), "cpu")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "sdxl" else [pytest.mark.slow]) for name in PIPELINES]
)
def test_every_row_of_a_suite_is_planned_and_bound_within_its_budget(
    name: str, checkpoints: Callable[[str], Path], prompts: Path
) -> None:
    prepared = planned(name, checkpoints(name), prompts)
    assert type(prepared.model).__name__ in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux")
    assert prepared.model.prompts == tuple(PROMPTS)  # type: ignore[attr-defined]
    assert not prepared.unmet
    rows = {(c.method.spec, c.spacing and c.spacing.spec) for c in prepared.cells}
    budgets = [4, 8, 15, 25, 40] if name == "flux" else [8, 16, 30, 50, 80]
    assert len(prepared.cells) == len(rows) * len(budgets)
    per_step = 1 if name == "flux" else 2
    for cell in prepared.cells:
        cell.check()
        assert cell.budget in budgets
        evaluations = evaluations_of(cell.guidance) * (planned_nfe(cell.sampler, cell.steps or 0) or 0)
        assert 0 < evaluations <= cell.budget
        if planned_nfe(cell.sampler, 3) == 3:  # one evaluation a step: the step counts of the comment in the suite
            assert cell.steps == cell.budget // per_step
        assert isinstance(prepare_cell(prepared.model, cell), SamplerOnModel)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_commands_of_a_suite_name_its_own_file_and_valid_metrics(name: str) -> None:
    file = SUITES / f"{name}.toml"
    request = load_suite(file)
    comment = "\n".join(line[1:] for line in file.read_text("utf-8").splitlines() if line.startswith("#"))
    commands = re.findall(r"samplerbench run (\S+) ", comment)
    assert commands == [f"benchmarks/suites/{name}.toml"] * 3
    metrics = re.findall(r"--metric (\S+)", comment)
    assert [m.label() for m in request.replace(metrics=metrics).metrics] == ["clip-score", "cmmd", "lpips-gap"]
    assert [m.label() for m in request.metrics] == ["clip-score", "psnr-gap", "gap"]
    assert isinstance(request, Request)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "flux"])  # a diffusion model and a flow; all suites are planned above
def test_a_suite_runs_and_its_page_compares_the_prompts(
    name: str, checkpoints: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    """Every row runs with the metrics of the suite, and the page has one table for each prompt."""
    clip = save_clip(tmp_path / "clip")
    arguments = ["--model", str(checkpoints(name)), "--prompts", str(prompts), "--dtype", "fp32", "--n", "3"]
    arguments += ["--image-size", "8x8"] if name == "flux" else []
    metrics = ["--metric", f"clip-score:model={clip}", "--metric", "psnr-gap:images=1,tol=1e-3"]
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["run", str(SUITES / f"{name}.toml"), *arguments, *metrics, "--device", "cpu", "--out", str(out)])
    assert ended.value.code == 0
    records = [entry.record for entry in Store(out).entries()]
    assert len(records) == len({r["protocol"] for r in records if r}) > 40
    for record in records:
        assert record is not None
        assert record["shown"] == {"images": 3, "labels": [0, 1, 2], "texts": PROMPTS}
        assert record["nfe"] <= record["budget"]
        assert 0 <= record["metrics"]["clip-score"]["value"] <= 100
    with pytest.raises(SystemExit) as ended:
        main(["report", str(out), "--out", str(tmp_path / "report")])
    assert ended.value.code == 0
    text = (tmp_path / "report" / "report.html").read_text("utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    (same,) = json.loads(data[1])["same"]
    assert [sample["heading"] for sample in same][:3] == PROMPTS
    assert all(len(sample["tiles"]) == len(records) for sample in same)


def test_the_images_of_a_grid_have_the_labels_that_their_result_states(tmp_path: Path) -> None:
    """Against `sample` with the same arguments, which writes images and labels."""
    common = ["--model", "digits", "-s", "ddim", "--steps", "1", "--n", "12", "--device", "cpu"]
    for arguments in (
        ["run", *common, "--metric", "label-accuracy", "--out", str(tmp_path / "out")],
        ["sample", str(tmp_path / "grid.png"), *common, "--npz", str(tmp_path / "images.npz")],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    (entry,) = Store(tmp_path / "out").entries()
    assert entry.record is not None
    with np.load(tmp_path / "images.npz") as sampled:
        images, labels = sampled["images"], sampled["labels"]
    assert len(set(labels.tolist())) > 5
    assert entry.record["shown"] == {"images": 12, "labels": labels.tolist()}
    shown = tiles(entry.file.with_suffix(".png"), entry.record, 100)
    zoom = shown[0].width // images.shape[2]
    assert len(shown) == 12
    for tile, image in zip(shown, images, strict=True):
        assert (np.asarray(tile)[::zoom, ::zoom] == image[:, :, 0]).all()
