"""Runs of inverse problems: what is observed, the metrics, and that nothing but the protocol changes a result."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

import samplerbench
from samplerbench import cli, registry
from samplerbench.bench.prepare import make_session, measure_reference, prepare
from samplerbench.bench.request import Request, one_grid
from samplerbench.bench.suite import load_suite
from samplerbench.errors import UserError
from samplerbench.metrics import Batch, Context
from samplerbench.models import exact_posterior
from samplerbench.models.exact import exact
from samplerbench.results.store import Store
from samplerbench.sampling import Inputs

METRICS = ["psnr", "ssim", "data-fidelity"]
SETTINGS: dict[str, Any] = {"model": "exact:gaussian", "steps": 6, "n": 24, "metrics": METRICS, "quiet": True}


def evaluate(guidances: Any, tasks: Any, **more: Any) -> list[dict[str, Any]]:
    return list(samplerbench.evaluate("ddim", guidances=guidances, tasks=tasks, **(SETTINGS | more)))


def values(record: dict[str, Any]) -> dict[str, float]:
    return {name: float(entry["value"]) for name, entry in record["metrics"].items()}


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_there_is_a_row_for_each_task_and_method(tmp_path: Path) -> None:
    records = evaluate(["exact", "dps"], ["inpaint:mask=half", "blur"], out=tmp_path)
    assert [(r["task"], r["guidance"]) for r in records] == [
        (task, guidance) for task in ("inpaint:mask=half", "blur") for guidance in ("exact", "dps")
    ]
    assert len({r["protocol"] for r in records}) == 4
    assert [(r["nfe"], r["network_backward"]) for r in records] == [(6, 0), (6, 6)] * 2
    assert {r["labels"] for r in records} == {"none"}
    (again,) = evaluate("dps", "blur", out=tmp_path)
    assert again["finished"] == records[3]["finished"]  # it was not run again


@pytest.mark.slow
def test_the_protocol_has_the_task_and_the_images() -> None:
    (one,) = evaluate("ddnm", "denoise:sigma=0.1", metrics="psnr")
    (other,) = evaluate("ddnm", "denoise:sigma=0.2", metrics="psnr")
    task = one["protocol_fields"]["task"]
    assert task["name"] == "denoise"
    assert task["parameters"] == {"sigma": 0.1, "images": 0}
    assert task["images"] == {"name": "exact/gaussian", "split": "draws"}
    assert len(task["source"]) == 16
    assert one["protocol"] != other["protocol"]
    (plain,) = samplerbench.evaluate("ddim", **(SETTINGS | {"metrics": "label-accuracy", "model": "exact:mixture"}))
    assert "task" not in plain
    assert "task" not in plain["protocol_fields"]


@pytest.mark.parametrize(
    "spec", [pytest.param("inpaint:mask=random,rate=0.5", marks=pytest.mark.slow), "blur:images=5"]
)
def test_the_batch_size_changes_nothing(spec: str) -> None:
    (one,) = evaluate("tmpd", spec, batch_size=24)
    (two,) = evaluate("tmpd", spec, batch_size=7)
    for name, value in values(one).items():
        assert values(two)[name] == pytest.approx(value, rel=1e-9), name


def test_a_stopped_run_resumes_to_the_same_result(tmp_path: Path) -> None:
    """Stopped after the first of two chunks, in one folder; run at once in the other."""
    from samplerbench.bench.run import Observer, Run
    from samplerbench.errors import Stopped

    grid = one_grid(["ddim:eta=1"], [5], guidances=["mmps"])
    task = "super-resolution:factor=2,images=3"
    request = Request([grid], model="exact:mixture", n=20, batch_size=10, metrics=["posterior", "psnr"], tasks=[task])

    class Once(Observer):
        def stop(self) -> bool:
            return True

    records = []
    for name in ("whole", "parts"):
        run = Run(prepare(request, "cpu"), Store(tmp_path / name))
        if name == "parts":
            with pytest.raises(Stopped):
                run.run(Once())
            run = Run(prepare(request, "cpu"), Store(tmp_path / name))
        run.run()
        (record,) = run.records
        records.append(record)
    assert [record["resumed"] for record in records] == [0, 1]
    whole, parts = (record["metrics"] for record in records)
    assert whole == parts


@pytest.mark.slow
def test_two_processes_change_nothing(tmp_path: Path) -> None:
    import subprocess
    import sys

    arguments = ["run", "--model", "exact:gaussian", "--task", "inpaint:images=2", "-g", "exact", "-s", "ddim"]
    arguments += ["--steps", "4", "--n", "40", "--batch-size", "10", "--metric", "posterior", "--metric", "psnr"]
    one, two = tmp_path / "one", tmp_path / "two"
    alone = [sys.executable, "-m", "samplerbench", *arguments, "--out", str(one)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "samplerbench"]
    subprocess.run(alone, check=True, capture_output=True)
    subprocess.run([*launch, *arguments, "--out", str(two)], check=True, capture_output=True)
    first, second = (
        json.loads(next(f for f in folder.glob("*.json") if "sampler" in f.read_text("utf-8")).read_text("utf-8"))
        for folder in (one, two)
    )
    assert first["protocol"] == second["protocol"]
    assert second["processes"] == 2
    for name, entry in first["metrics"].items():
        assert second["metrics"][name]["value"] == pytest.approx(entry["value"], rel=1e-12)


@pytest.mark.slow
def test_an_observation_does_not_depend_on_the_number_of_samples(tmp_path: Path) -> None:
    found = []
    for n in (6, 11):
        request = Request([one_grid(["ddim"], [1])], model="digits", n=n, metrics=["psnr"], tasks=["blur"])
        prepared = prepare(request, "cpu")
        measured = measure_reference(prepared)
        session = make_session(prepared, measured, 3, Store(tmp_path), task=prepared.tasks[0])
        index = torch.arange(6)
        found.append(session.measurement.model.inputs(index, Inputs(6)).tensors)
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_more_samples_than_images_observe_them_in_turn() -> None:
    model = exact("gaussian")
    observed = model.observed(registry.parse("task", "denoise"), model.real(4)[0])
    given = observed.inputs(torch.arange(9), Inputs(9)).tensors
    assert given["image"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert torch.equal(given["observation"][1], given["observation"][5])


# --- The metrics -----------------------------------------------------------------------------------------------------


def measured(spec: str, images: Tensor, truth: Tensor, model: Any = None, states: Tensor | None = None) -> float:
    metric = registry.parse("metric", spec)
    accumulator = metric.start(Context(None, model=model))  # type: ignore[arg-type]
    index = torch.arange(len(images))
    given = Inputs(len(images)).extended(truth=truth)
    if model is not None:
        given = model.inputs(index, given)
    final = images.double() / 127.5 - 1 if states is None else states
    accumulator.update(Batch(images, torch.empty(len(images), 0), None, index, final, False, given))
    return float(accumulator.result()["value"])


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    a = torch.randint(0, 256, (5, *shape), generator=generator, dtype=torch.uint8)
    b = (a.double() + 30 * torch.randn(a.shape, generator=generator)).clamp(0, 255).round().to(torch.uint8)
    return a, b


def test_psnr_is_that_of_the_pixels() -> None:
    a, b = pair(3, 16, 16)
    errors = ((a.double() - b.double()) ** 2).mean((1, 2, 3))
    expected = float((10 * torch.log10(255**2 / errors)).mean())
    assert measured("psnr", a, b.double() / 127.5 - 1) == pytest.approx(expected, rel=1e-12)
    assert measured("psnr", a, a.double() / 127.5 - 1) == 60


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_that_of_torchmetrics(channels: int) -> None:
    a, b = pair(channels, 20, 24)
    _, values_of = structural_similarity_index_measure(
        a.double(), b.double(), data_range=255.0, reduction="none", return_full_image=True
    )
    inside = values_of[:, :, 5:-5, 5:-5]  # torchmetrics pads the images
    assert measured("ssim", a, b.double() / 127.5 - 1) == pytest.approx(float(inside.mean()), abs=1e-6)
    assert measured("ssim", a, a.double() / 127.5 - 1) == pytest.approx(1, abs=1e-12)


def test_the_data_fidelity_of_the_truth_is_that_of_the_noise() -> None:
    model = exact("gaussian")
    observed = model.observed(registry.parse("task", "inpaint:sigma=0.3"), model.real(200)[0])
    truth = observed.observation.images
    blank = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
    found = measured("data-fidelity", blank, truth, observed, truth)
    # E of the mean of √(χ²_m/m) is 1 - 1/(4m).
    assert found == pytest.approx(1 - 1 / (4 * 48), abs=5 * math.sqrt(1 / (2 * 48 * 200)))
    shifted = truth + 0.3
    assert measured("data-fidelity", blank, truth, observed, shifted) == pytest.approx(math.sqrt(2), rel=0.02)


def test_exact_draws_are_at_the_floor_of_the_posterior_distance() -> None:
    """Moved draws have the error of the mean, and the same covariance."""
    model = exact("mixture")
    observed = model.observed(registry.parse("task", "inpaint:mask=half,images=1"), model.real(1)[0])
    y = observed.inputs(torch.arange(1), Inputs(1)).tensors["observation"][0]
    posterior = exact_posterior(observed, "a test")
    draws = posterior.draws(y, 400, seed=77).reshape(400, *model.shape)
    results = []
    for states in (draws, draws + 0.3):
        context = Context(None, n=400, model=observed)  # type: ignore[arg-type]
        accumulator = registry.parse("metric", "posterior").start(context)
        index = torch.arange(400)
        given = observed.inputs(index, Inputs(400))
        # Two batches in another order, which have to be sorted again.
        for rows in (index[200:], index[:200]):
            empty = torch.empty(200, 0)
            accumulator.update(Batch(empty, empty, None, rows, states[rows], False, given.rows(rows)))
        results.append(accumulator.result())
    near, far = results
    assert near["value"] == pytest.approx(near["floor"], rel=0.2)
    assert near["mean_error"] < 1.5 / math.sqrt(400) * 1.5
    assert far["floor"] == near["floor"]
    moments = posterior.moments(y)
    offset = 0.3 * math.sqrt(64) / math.sqrt(float(moments.covariance.trace()))
    assert far["mean_error"] == pytest.approx(offset, rel=0.1)
    assert far["covariance_error"] == pytest.approx(near["covariance_error"], rel=1e-9)


@pytest.mark.slow
def test_a_sampler_with_the_exact_posterior_is_at_the_floor() -> None:
    more: dict[str, Any] = {
        "model": "exact:mixture",
        "steps": 60,
        "n": 300,
        "metrics": "posterior",
        "spacing": "karras",
    }
    exact_one, free = samplerbench.evaluate(
        "dpm++:order=3", guidances=["exact", "none"], tasks="blur:images=1", **(SETTINGS | more)
    )
    entry, other = (record["metrics"]["posterior"] for record in (exact_one, free))
    assert entry["value"] == pytest.approx(entry["floor"], rel=0.1)
    assert other["value"] > 2 * other["floor"]


# --- Suites and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_suite_has_tasks(tmp_path: Path) -> None:
    file = tmp_path / "suite.toml"
    text = 'model = "exact:gaussian"\ntasks = ["denoise", "inpaint:mask=half"]\n'
    text += '[[grid]]\nsamplers = ["ddim"]\nsteps = [1]\n'
    file.write_text(text, "utf-8")
    assert [task.spec for task in load_suite(file).tasks] == ["denoise", "inpaint:mask=half"]
    file.write_text(text.replace("denoise", "denois"), "utf-8")
    with pytest.raises(UserError, match=r'suite\.toml:2: no task "denois"\. Did you mean "denoise"\?'):
        load_suite(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task", "inpaint:size=9"], "--task inpaint:size=9: a box of 9x9 pixels does not fit into images of"),
        (["--task", "colourise"], "--task colourise: the images of this model are grey; use a model of"),
        (["--task", "denoise:sigma=-1"], "task denoise: sigma=-1: it must be at least 0. Parameters of"),
        (["--task", "clip", "-g", "pigdm"], "guidance pigdm requires a linear task, and clip is not linear."),
        (
            ["--task", "blur", "--task", "clip", "-g", "tmpd"],
            "guidance tmpd requires a linear task, and clip is not linear.",
        ),
        (["-g", "dps"], "guidance dps requires a task, such as --task inpaint."),
        (
            ["--task", "denoise", "-g", "exact", "--model", "digits"],
            "guidance exact requires a problem whose posterior",
        ),
        (["--task", "denoise:images=2000", "--model", "digits"], "digits has 1,442 images; use images=1442"),
        (
            ["--metric", "psnr"],
            "the metric psnr needs the truth behind each sample, and this model has no such input; name a",
        ),
        (["--task", "inpant"], 'no task "inpant". Did you mean "inpaint"?'),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", "exact:gaussian", *arguments, "-s", "ddim", "--steps", "1", "--n", "4", "--out", str(tmp_path)]
    given += [] if "--metric" in arguments else ["--metric", "psnr"]
    assert command("run", *given) == 2
    captured = capsys.readouterr().err
    assert says in captured
    assert captured.count("\n") == 1


def test_a_posterior_distance_without_several_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the metric posterior .*needs several samples of each observation; set images"
    ):
        evaluate("exact", "denoise", metrics="posterior")


@pytest.mark.slow
def test_a_dry_run_counts_the_tasks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--model", "exact:gaussian", "--task", "denoise", "--task", "blur", "-g", "dps", "-s", "ddim"]
    assert command("run", *arguments, "--steps", "2,3", "--n", "4", "--metric", "psnr", "--dry-run") == 0
    assert "4 cells of 4 images" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_prints_a_table_for_each_task(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--model", "exact:gaussian", "--task", "denoise", "--task", "blur", "-g", "ddnm", "-s", "ddim"]
    arguments += ["--nfe", "2", "--n", "4", "--metric", "psnr", "--out", str(tmp_path)]
    assert command("run", *arguments) == 0
    out = capsys.readouterr().out
    assert out.index("task denoise") < out.index("task blur")
    assert np.char.count(out, "psnr ↑") == 2
