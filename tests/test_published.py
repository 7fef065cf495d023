"""Published tables as suites: they run with stand-in checkpoints, and stand beside what is measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from samplerbench import registry
from samplerbench.bench.plan import most_steps
from samplerbench.bench.setup import pick_guidance
from samplerbench.bench.suite import load_suite
from samplerbench.cli.app import main
from samplerbench.errors import UserError
from samplerbench.models.edm import EDMPreconditioned
from samplerbench.models.noise_classifier import NoiseConditionalClassifier

SUITES = Path(__file__).parent.parent / "benchmarks" / "suites"
PUBLISHED = sorted(f for f in SUITES.glob("*.toml") if "[grid.published]" in f.read_text("utf-8"))
UNET: dict[str, Any] = {
    "sample_size": 4,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
    "add_attention": False,
}


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["run", *arguments])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """For each suite, the options that name random checkpoints of the classes it asks for."""
    root = tmp_path_factory.mktemp("stand-ins")
    torch.manual_seed(0)
    plain = DDPMScheduler()
    DDPMPipeline(UNet2DModel(**UNET), plain).save_pretrained(root / "unconditional")
    learned = DDPMScheduler(variance_type="learned_range", beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(UNet2DModel(**UNET | {"out_channels": 6}), learned).save_pretrained(root / "adm")
    classes = UNET | {"out_channels": 6, "num_class_embeds": 4}
    DDPMPipeline(UNet2DModel(**classes), learned).save_pretrained(root / "adm-conditional")
    with_null = UNET | {"num_class_embeds": 5}
    DDPMPipeline(UNet2DModel(**with_null), plain).save_pretrained(root / "cfg")
    (root / "cfg" / "samplerbench.json").write_text(json.dumps({"classes": 4, "null_label": 4}))
    for name in ("adm", "adm-conditional"):
        NoiseConditionalClassifier(3, 4, (8,)).save_pretrained(root / name / "classifier")
    EDMPreconditioned({**UNET}).save_pretrained(root / "edm")
    images = root / "images"
    images.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (80, 4, 4, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(images / f"{i:02d}.png")
    models = {
        "ddim-table1-cifar10": "unconditional",
        "ddim-table1-celeba": "unconditional",
        "classifier-guidance-imagenet256": "adm",
        "classifier-guidance-imagenet256-conditional": "adm-conditional",
        "classifier-free-guidance-imagenet64": "cfg",
        "few-nfe-cifar10": "edm",
    }
    shared = ["--data", str(images), "--features", "digits-cnn", "--n", "20", "-b", "20", "--device", "cpu"]
    return {name: ["--model", str(root / folder), *shared] for name, folder in models.items()}


@pytest.mark.parametrize("suite", PUBLISHED, ids=lambda f: f.stem)
def test_a_published_table_is_valid_and_every_cell_has_its_value(
    suite: Path, stand_ins: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    request = load_suite(suite)
    cells = sum(len(g.samplers) * len(g.guidances) * len(g.steps or g.nfe) for g in request.grids)
    absent = suite.read_text("utf-8").count("nan")
    assert sum(len(g.published) for g in request.grids) == cells * len(request.metrics) - absent
    assert run([str(suite), *stand_ins[suite.stem], "--dry-run"]) == 0
    listed = re.search(r"(\d+) cells? of 20 images", capsys.readouterr().out)
    assert listed is not None
    # Two budgets that the same number of steps is the most for are one cell.
    runs = {
        (sampler, guidance, most_steps(sampler, 1, length) if g.nfe else length)
        for g in request.grids
        for sampler in g.samplers
        for guidance in g.guidances
        for length in g.steps or g.nfe
    }
    assert int(listed.group(1)) == len(runs)


@pytest.mark.slow
@pytest.mark.parametrize("suite", [f for f in PUBLISHED if "ddim-table1" not in f.stem], ids=lambda f: f.stem)
def test_a_published_table_runs_end_to_end_and_shows_published_measured_and_difference(
    suite: Path, stand_ins: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([str(suite), *stand_ins[suite.stem], "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.split("Published and measured")[1]
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    expected = [p for g in load_suite(suite).grids for p in g.published]
    assert len(rows) == len(expected)
    records = [json.loads(f.read_text("utf-8")) for f in tmp_path.glob("*.json")]
    for (name, spacing, column, metric, published, measured, difference), p in zip(rows, expected, strict=True):
        sampler, _, guidance = name.partition(" + ")  # with the defaults of what the rows vary
        assert registry.parse("sampler", sampler) == p.sampler
        assert pick_guidance(guidance or "none") == p.guidance
        assert (int(column), metric) == (p.column, p.metric)
        assert spacing in ("karras", "linspace", "trailing")
        assert float(published) == pytest.approx(p.value, abs=0.05)
        gap = float(difference.split()[0])
        assert gap == pytest.approx(float(measured) - p.value, abs=0.2)
        assert any(r["metrics"][metric]["value"] == pytest.approx(float(measured), abs=0.06) for r in records)
    assert load_suite(suite).grids[0].published[0].source in shown.replace("\n", " ")


GRID = """\
model = "exact:mixture"
n = 16
[[grid]]
samplers = ["ddim"]
parameters = { eta = [0.0, 1.0] }
steps = [2, 3]

[grid.published]
source = "A paper, table 1"
fid = [[10.0, nan], [30.0, 20.0]]
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("fid = [[10.0, nan], [30.0, 20.0]]", "fid = [[10.0, nan]]", 10, "this grid needs [2, 2]: one row for each"),
        ("[30.0, 20.0]", "[30.0]", 10, "this grid needs [2, 2]: one row for each"),
        ("fid =", "fidd =", 10, 'no metric "fidd"'),
        ('source = "A paper, table 1"', "", 8, "source"),
        ("steps = [2, 3]", 'steps = [2, 3]\nspacings = ["karras", "trailing"]', 11, "belong to one spacing"),
        ("[30.0, 20.0]", '["x", 20.0]', 10, "number"),
    ],
)
def test_a_published_table_that_does_not_fit_names_its_line(
    tmp_path: Path, old: str, new: str, line: int, says: str
) -> None:
    file = tmp_path / "suite.toml"
    file.write_text(GRID.replace(old, new), "utf-8")
    with pytest.raises(UserError) as refused:
        load_suite(file)
    assert str(refused.value).startswith(f"{file}:{line}: ")
    assert says in str(refused.value)


def test_a_value_that_is_not_published_has_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "suite.toml"
    file.write_text(GRID, "utf-8")
    assert run([str(file), "--out", str(tmp_path / "out"), "--n", "70"]) == 0
    shown = capsys.readouterr().out.split("Published and measured")[1]
    assert [line.split("│")[3].strip() for line in shown.splitlines() if line.startswith("│")] == ["2", "2", "3"]
    assert "A paper, table 1" in shown
    # An option beside a suite goes before what the suite says.
    assert {json.loads(f.read_text("utf-8"))["n"] for f in (tmp_path / "out").glob("*.json")} == {70}
