"""Learned schedules on the other kinds of models, and in a run of two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.pipelines import save_pipelines
from support.text_flows import flux
from test_edm import saved, unet

import samplerbench
from samplerbench.bench.prepare import prepare
from samplerbench.bench.request import Grid, Request
from samplerbench.models import Model
from samplerbench.sampling import SIGMA_INFINITY

KINDS = ("ve", "edm", "latent", "transformer", "text", "flux")
GITS, GAP_OPTIMAL, DMN = "gits:points=9,images=4", "gap-optimal:images=4,runs=12,tol=0.01", "dmn"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root = save_pipelines(tmp_path_factory.mktemp("models"))
    saved(root / "edm", unet())
    flux(root / "made", guidance_embeds=False).save_pretrained(root / "flux")
    prompts = {kind: str(root / "prompts.txt") for kind in ("text", "flux")}
    sizes = {"flux": (16, 16)}
    return {
        kind: samplerbench.load_model(root / kind, device="cpu", prompts=prompts.get(kind), image_size=sizes.get(kind))
        for kind in KINDS
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "spacing"),
    [
        *((kind, GITS) for kind in KINDS),
        *((kind, DMN) for kind in KINDS[:-1]),
        ("ve", GAP_OPTIMAL),
        ("text", GAP_OPTIMAL),
    ],
)
def test_levels_are_learned_for_every_kind_of_model(
    models: dict[str, Model], kind: str, spacing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMPLERBENCH_CACHE", str(tmp_path))
    model = models[kind]
    guidance = "cfg:scale=3" if kind in ("transformer", "text") else "none"
    request = Request([Grid(["ipndm"], [3], guidances=[guidance], spacings=[spacing])], n=4, metrics=["gap"])
    cell = prepare(request, "cpu", model).cells[0]
    first, *levels, last = cell.sigmas.tolist()
    assert last == 0
    assert sorted(levels, reverse=True) == levels
    assert float(model.levels.min()) <= levels[-1]
    assert first == SIGMA_INFINITY if kind == "flux" else levels[0] < first <= float(model.levels.max()) * (1 + 1e-9)
    assert (cell.spacing.bound_evaluations > 0) is (spacing != DMN)


@pytest.mark.slow
def test_two_processes_learn_one_schedule_and_give_the_numbers_of_one_process(tmp_path: Path) -> None:
    command = ("run", "-m", "exact/mixture:shape=1x2x2", "-s", "ddim", "--steps", "3", "--spacing", GITS, "--n", "8")
    records = []
    for name, start in (
        ("one", ("-m", "samplerbench")),
        ("two", ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "samplerbench")),
    ):
        out, cache = tmp_path / name, tmp_path / f"cache-{name}"
        environment = {**os.environ, "SAMPLERBENCH_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *start, *command, "--metric", "gap", "--device", "cpu", "--out", str(out)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert len(list(cache.glob("gits-*.json"))) == 1
        (file,) = out.glob("*.json")
        records.append(json.loads(file.read_text("utf-8")))
    one, two = records
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["bound_evaluations"] == two["bound_evaluations"] == 8 * 4
    # The levels are the same to the last bit. The mean over images is summed in another order.
    assert one["protocol_fields"]["sigmas"] == two["protocol_fields"]["sigmas"]
    assert two["metrics"]["gap"]["value"] == pytest.approx(one["metrics"]["gap"]["value"], rel=1e-14)
