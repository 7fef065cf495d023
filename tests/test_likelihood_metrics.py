"""`vlb` and `nll` as metrics of a run: their values, counts, reasons, protocol, and runs that are shared or killed."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import samplerbench
from samplerbench import registry
from samplerbench.bench import engine
from samplerbench.bench.estimate import estimate
from samplerbench.bench.evaluate import batches_between
from samplerbench.bench.prepare import make_session, measure_reference, prepare
from samplerbench.bench.request import Request, one_grid
from samplerbench.cli.app import main
from samplerbench.errors import Stopped, UserError
from samplerbench.metrics import Metric
from samplerbench.models.exact import exact
from samplerbench.report.load import load
from samplerbench.report.table import NO_VALUE
from samplerbench.results.groups import group
from samplerbench.results.store import Store

SMALL: dict[str, Any] = {"model": "exact:gaussian,shape=1x2x3", "dtype": "fp64"}


def records(samplers: Any, metrics: Any, steps: Any = 3, **options: Any) -> list[dict[str, Any]]:
    return samplerbench.evaluate(samplers, metrics=metrics, steps=steps, **options).records


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["run", *arguments])
    return int(ended.value.code or 0)


# --- Values and counts ------------------------------------------------------------------------------------------------


def test_the_metrics_are_the_values_of_likelihood() -> None:
    """The same images, labels, noise and terms as `samplerbench likelihood`, beside a metric of samples."""
    found = records(["ddpm", "pf-ode"], ["nearest", "vlb:images=5", "nll:images=5,repeats=2"], n=5, seed=5)
    for record, name, method in zip(found, ("vlb", "nll"), ("vlb", "nll"), strict=True):
        spec = record["sampler"]
        repeats = 2 if name == "nll" else 1
        (alone,) = samplerbench.likelihood(spec, 3, method=method, n=5, seed=5, repeats=repeats, training=False)  # type: ignore[arg-type]
        entry = record["metrics"][name]
        assert entry["value"] == pytest.approx(alone.bits_per_dim, rel=1e-9)
        assert entry["standard_error"] == pytest.approx(alone.standard_error, rel=1e-9)
        assert entry["prior"] == pytest.approx(alone.prior, rel=1e-9)
        assert entry["nfe"] == alone.nfe
        assert entry.get("network_backward", 0) == alone.network_backward
        assert (entry["images"], entry["data"], entry["unit"]) == (5, "digits:split=held-out", "bits/dim")
        # The evaluations of sampling are counted apart.
        assert record["nfe"] == (3 if name == "vlb" else 5)
        assert record["network_backward"] == 0
        assert record["metrics"]["nearest"]["value"] > 0


@pytest.mark.slow
def test_the_bound_of_a_gaussian_is_above_its_entropy_and_the_likelihood_equals_it() -> None:
    model = exact("gaussian", shape="1x2x3")
    entropy = float(0.5 * (2 * math.pi * math.e * model.problem.variances).log2().mean())
    (ode,) = records("pf-ode:solver=rk4", "nll:probes=exact", steps=30, n=100, **SMALL)
    (bound,) = records("ddpm", "vlb", steps=30, n=100, **SMALL)
    assert abs(ode["metrics"]["nll"]["value"] - entropy) < 4.5 * ode["metrics"]["nll"]["standard_error"]
    assert bound["metrics"]["vlb"]["value"] > ode["metrics"]["nll"]["value"]
    assert ode["metrics"]["nll"]["network_backward"] == 6 * ode["metrics"]["nll"]["nfe"]
    assert (ode["n"], ode["nfe"], bound["metrics"]["vlb"]["nfe"]) == (100, 0, 30)


def test_blocks_have_different_images_and_the_mean_of_the_whole() -> None:
    (parts,) = records("ddpm", "vlb", n=30, blocks=3, **SMALL)
    (whole,) = records("ddpm", "vlb", n=90, **SMALL)
    entry = parts["metrics"]["vlb"]
    assert len(set(entry["blocks"])) == 3
    assert entry["sd"] > 0
    assert entry["value"] == pytest.approx(whole["metrics"]["vlb"]["value"], rel=1e-12)
    assert entry["standard_error"] == pytest.approx(whole["metrics"]["vlb"]["standard_error"], rel=0.05)
    assert (entry["images"], entry["nfe"]) == (30, 3)


def test_the_images_of_a_metric_are_spread_over_the_samples() -> None:
    for images, n, chunk, size in ((256, 1000, 100, 64), (355, 20, 7, 64), (5, 100, 1, 2)):
        found = [b for first in range(0, n, chunk) for b in batches_between(images, n, first, first + chunk, size)]
        assert [i for start, end in found for i in range(start, end)] == list(range(images))
        assert all(end - start == size for start, end in found[:-1])


def test_the_number_of_images_is_that_of_the_samples_up_to_256() -> None:
    assert records("ddpm", "vlb", n=12, **SMALL)[0]["metrics"]["vlb"]["images"] == 12
    assert records("ddpm", "vlb", n=300, **SMALL)[0]["metrics"]["vlb"]["images"] == 256
    (default,) = records("ddpm", "vlb", **SMALL)
    assert default["metrics"]["vlb"]["images"] == default["n"] == 256


@pytest.mark.slow
def test_labels_and_guidance_are_those_of_the_run() -> None:
    """A guided chain is a chain of Gaussian steps too: at scale 1 it is the conditional one."""

    def of(guidances: Any, labels: Any) -> list[float]:
        found = samplerbench.evaluate(
            "ddpm", metrics="vlb:images=6", steps=2, n=6, guidances=guidances, labels=labels
        ).records
        return [record["metrics"]["vlb"]["value"] for record in found]

    unguided, one, three = of(["none", "cfg:scale=1", "cfg:scale=3"], None)
    assert one == pytest.approx(unguided, rel=1e-5)
    assert three != pytest.approx(unguided, rel=1e-3)
    assert of("none", "none")[0] != pytest.approx(unguided, rel=1e-3)
    assert of("none", "4")[0] > unguided  # the labels of the images are better than a wrong one


# --- Samplers without a value -----------------------------------------------------------------------------------------


def test_a_sampler_without_a_kernel_has_a_dash_and_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    options = ["-m", "exact:gaussian,shape=1x2x3", "--n", "8", "--steps", "2,4", "--out", str(out)]
    assert run("-s", "ddpm", "-s", "ddim", *options, "--metric", "vlb") == 0
    printed = capsys.readouterr().out
    reason = "ddim reverses a forward process without noise, so its bound is infinite"
    assert printed.count(f"– no value: {reason}") == 1
    line = next(line for line in printed.splitlines() if line.startswith("│ ddim"))
    assert line.count(NO_VALUE) == 2
    assert "mean ± standard error over images" in printed
    assert "VLB ↓ (bits/dim, 8 images of exact/gaussian" in printed
    by_sampler = {(r["sampler"], r["steps"]): r for r in load(out).records}
    assert by_sampler["ddim", 4]["inapplicable"] == {"vlb": reason}
    assert by_sampler["ddim", 4]["metrics"] == {}
    assert "inapplicable" not in by_sampler["ddpm", 4]
    with pytest.raises(SystemExit):
        main(["report", str(out), "--format", "md,csv,json,latex,html"])
    markdown = (out / "report/report.md").read_text("utf-8")
    assert "| ddim | – | – |" in markdown
    assert reason in markdown
    value = by_sampler["ddpm", 2]["metrics"]["vlb"]
    assert f"{value['value']:.1f} ± {value['standard_error']:.1f}" in markdown
    table = json.loads((out / "report/report.json").read_text("utf-8"))["groups"][0]["tables"][0]
    assert (table["columns"], table["no_value"]) == (["2", "4"], ["ddim"])
    rows = {(r["sampler"], r["steps"]): r for r in csv.DictReader((out / "report/cells.csv").open(encoding="utf-8"))}
    assert float(rows["ddpm", "2"]["vlb.standard_error"]) == value["standard_error"]
    assert (rows["ddpm", "4"]["vlb.nfe"], rows["ddpm", "4"]["nfe"]) == ("4", "0")
    assert rows["ddim", "4"]["vlb.no_value"] == reason
    assert "ddim & -- & --" in (out / "report/tables.tex").read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"samplers": ["ddim", "dpm++"]}, "the metric vlb has no value for any sampler of this run: ddim reverses"),
        ({"metrics": ["fid", "nll"]}, "the metric nll has no value for any sampler of this run: ddpm does not solve"),
        ({"samplers": "real"}, "real is a generator and has no noise levels"),
        ({"model": "exact:points"}, "the metric vlb: the model does not say which images were held out"),
        ({"model": "exact:points"}, "name them with vlb:data=NAME."),
        ({"model": "exact:gaussian,shape=1x2x3", "metrics": "vlb:data=digits"}, "use other images with vlb:data=NAME."),
        ({"metrics": "vlb:images=400"}, "400 images are required, and digits:split=held-out has 355"),
        ({"blocks": 400, "n": 2}, "400 images are required, and digits:split=held-out has 355"),
        ({"metrics": "vlb:images=-1"}, "it must be at least 0"),
        ({"metrics": "nll:probes=0"}, 'probes must be a whole number from 1 to 100,000, or "exact"'),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_sampled(options: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as raised:
        samplerbench.evaluate(**{"samplers": "ddpm", "metrics": "vlb", "steps": 2, "n": 8, "model": "digits"} | options)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_latent_model_and_data_without_grey_levels_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    latent = replace(exact("gaussian", shape="1x2x3"), autoencoder=object())  # type: ignore[arg-type]
    metric: Metric = registry.parse("metric", "vlb")
    with pytest.raises(UserError, match="its decoder has no density"):
        metric.evaluated(latent, 4, 1)
    data = samplerbench.data.load_data("digits:split=held-out")
    monkeypatch.setattr(
        "samplerbench.likelihoods.images.load_data", lambda _: replace(data, name="mine", grey_levels=None)
    )
    with pytest.raises(UserError, match=r"^the metric vlb: the number of grey levels of .* with vlb:data=NAME\.$"):
        records("ddpm", "vlb", n=4)


def test_the_divergence_is_not_taken_through_the_gradients_of_a_guidance() -> None:
    metric: Metric = registry.parse("metric", "nll")
    sampler, model = registry.parse("sampler", "pf-ode"), exact("mixture")
    assert metric.inapplicable(sampler, None, model) is None
    assert metric.inapplicable(sampler, registry.parse("guidance", "cfg"), model) is None
    reason = metric.inapplicable(sampler, registry.parse("guidance", "classifier"), model)
    assert reason == "the divergence is not computed through the gradients of classifier"


# --- Protocol and plans -----------------------------------------------------------------------------------------------


def test_another_number_of_images_or_data_set_is_another_protocol() -> None:
    specs = ["vlb:images=4", "vlb:images=5", "vlb:images=4,data=digits:split=train"]
    found = [records("ddpm", spec, steps=1, n=8)[0] for spec in specs]
    assert len({record["protocol"] for record in found}) == 3
    assert len(group(found)) == 3
    # The images are in the protocol, not only the spec.
    (source,) = found[0]["protocol_fields"]["metric sources"].values()
    assert re.fullmatch(r"digits:split=held-out 4 images of each block, sha256 [0-9a-f]{16}", source)


def test_results_that_differ_only_in_a_metric_of_data_are_one_row() -> None:
    both, alone = (records("ddpm", metrics, steps=1, n=8)[0] for metrics in (["nearest", "vlb:images=4"], ["nearest"]))
    (merged,) = group([alone, both])
    assert [set(record["metrics"]) for record in merged.records] == [{"nearest", "vlb"}]
    without = [record | {"metrics": {"nearest": record["metrics"]["nearest"]}} for record in (alone, both)]
    without[1]["inapplicable"] = {"vlb": "a reason"}
    (merged,) = group(without)
    assert merged.records[0]["inapplicable"] == {"vlb": "a reason"}


def test_the_dry_run_counts_the_evaluations() -> None:
    grid = one_grid(["ddpm", "ddim", "pf-ode"], [4])
    model, metrics = SMALL["model"], ["gap:images=1", "vlb:images=6", "nll:images=6,probes=3"]
    request = Request([grid], model=model, n=20, metrics=metrics)
    rows = [row for row in estimate(prepare(request, "cpu")).rows if row.of_data]
    found = {(row.cell.method.spec, row.metrics[0]): (row.nfe, row.backward, row.images) for row in rows}
    measured = {r["sampler"]: r["metrics"] for r in records(["ddpm", "pf-ode"], metrics, steps=4, n=20, model=model)}
    nll = measured["pf-ode"]["nll"]
    assert found == {
        ("ddpm", "vlb"): (measured["ddpm"]["vlb"]["nfe"], 0, 6),
        ("pf-ode", "nll"): (nll["nfe"], nll["network_backward"], 6),
    }
    assert all(row.seconds > 0 for row in rows)


# --- Runs that are stopped, killed and shared -------------------------------------------------------------------------


def test_stopped_after_any_checkpoint_the_bits_are_the_same(tmp_path: Path) -> None:
    grid = one_grid(["ddpm"], [3])
    request = Request([grid], model=SMALL["model"], n=40, blocks=2, batch_size=8, metrics=["vlb"])
    prepared = prepare(request, "cpu")
    measured = measure_reference(prepared)
    found = {}
    for name in ("whole", "stopped"):
        store = Store(tmp_path / name)
        store.prepare()
        session = make_session(prepared, measured, 0, store)
        calls = 0

        def stop() -> bool:
            nonlocal calls
            calls += 1
            return calls % 3 == 0

        session.execution.stop = stop if name == "stopped" else lambda: False
        for _ in range(20):
            try:
                found[name] = engine.run_cell(session, prepared.cells[0]).record
                break
            except Stopped:
                assert list((tmp_path / name).glob("*.partial.safetensors"))
    assert found["stopped"]["resumed"] >= 2
    assert found["stopped"]["metrics"] == found["whole"]["metrics"]
    assert found["whole"]["metrics"]["vlb"]["nfe"] == 3
    assert found["whole"]["metrics"]["vlb"]["images"] == 40


SHARED = ["-s", "ddpm", "-s", "pf-ode", "-s", "dpm++", "--steps", "10", "--n", "64", "-b", "8"]
SHARED += ["--metric", "vlb", "--metric", "nll:images=24", "--metric", "nearest"]


def start(out: Path, *launcher: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(launcher or ("-m", "samplerbench")), "run", *SHARED, "--device", "cpu"]
    command += ["--out", str(out)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", env=environment
    )


def values(out: Path) -> dict[str, Any]:
    found = {}
    for file in sorted(out.glob("*.json")):
        record = json.loads(file.read_text("utf-8"))
        found[file.name] = {k: record.get(k) for k in ("sampler", "nfe", "metrics", "inapplicable")}
    return found


@pytest.mark.slow
def test_two_processes_a_kill_and_two_runs_at_once_give_the_same_bits(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole")
    assert whole.wait(timeout=120) == 0, whole.stderr and whole.stderr.read()
    expected = values(tmp_path / "whole")
    assert len(expected) == 3
    # Killed after a checkpoint, then resumed by two processes, while another run takes cells of the same folder.
    out = tmp_path / "killed"
    killed = start(out)
    until = time.monotonic() + 60
    while not list(out.glob("*.partial.safetensors")) and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert list(out.glob("*.partial.safetensors"))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "samplerbench")
    team, other = start(out, *torchrun), start(out)
    for process in (team, other):
        printed = process.communicate(timeout=240)[1]
        assert process.returncode == 0, printed
    assert values(out) == expected
