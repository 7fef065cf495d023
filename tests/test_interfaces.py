"""A plugin for each interface, through the public path: its numbers are the closed form's."""

from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.denoising import denoiser
from support.interface_plugins import FlowGaussian, Observed

import samplerbench
from samplerbench import registry
from samplerbench.bench.estimate import estimate
from samplerbench.bench.labels import balanced_labels
from samplerbench.bench.prepare import prepare
from samplerbench.bench.request import Request, one_grid
from samplerbench.cli.app import main
from samplerbench.errors import UserError
from samplerbench.models import Model
from samplerbench.models.sample import sample_states, start_states
from samplerbench.sampling import Inputs
from samplerbench.sampling.spacing import bind_spacing, make_grid, pick_spacing
from samplerbench.testing import run_checks

FILE = Path(__file__).parent / "support" / "interface_plugins.py"
CPU = torch.device("cpu")
TINY: dict[str, Any] = {"steps": 1, "n": 4, "metrics": "label-accuracy"}


def named(cls: str) -> str:
    return f"{FILE}:{cls}"


def evaluate(samplers: Any, **more: Any) -> list[dict[str, Any]]:
    return list(samplerbench.evaluate(samplers, quiet=True, **more))


def value(record: dict[str, Any], metric: str) -> float:
    return float(record["metrics"][metric]["value"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLERBENCH_CACHE", str(tmp_path / "cache"))


def test_they_import_what_is_documented_only() -> None:
    documented = set(
        re.findall(r"^\| `(samplerbench\.\w+)` \|", (Path("docs") / "plugins.md").read_text("utf-8"), re.MULTILINE)
    )
    nodes = ast.walk(ast.parse(FILE.read_text("utf-8")))
    used = {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("sampler")}
    assert used <= documented


# --- A rectified flow: alpha -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flow() -> Model:
    return FlowGaussian().load(CPU, torch.float64)


def test_a_flow_is_the_denoiser_of_its_gaussian(flow: Model) -> None:
    m, v = 0.25, 0.04
    x = torch.linspace(-3, 3, 64, dtype=torch.float64).reshape(1, 1, 8, 8)
    for sigma in (0.01, 0.5, 3.0, 200.0):
        expected = m + v / (v + sigma**2) * (x - m)
        torch.testing.assert_close(denoiser(flow, None, 1)(x, sigma), expected, rtol=1e-9, atol=1e-10)
        assert denoiser(flow, None, 1).alpha(sigma) == pytest.approx(1 / (1 + sigma), rel=1e-15)


@pytest.mark.parametrize(("spec", "tolerance"), [("heun", 2e-3), ("dpm++:order=3", 2e-4), ("unipc", 2e-4)])
def test_solvers_end_where_the_flows_ode_ends(flow: Model, spec: str, tolerance: float) -> None:
    sampler = registry.parse("sampler", spec)
    sigmas = make_grid(pick_spacing(sampler, "karras"), flow.levels, 200)
    index = torch.arange(5)
    x = start_states(flow, float(sigmas[0]), index)
    truth = 0.25 + math.sqrt(0.04 / (0.04 + float(sigmas[0]) ** 2)) * (x - 0.25)
    final = sample_states(flow, sampler, sigmas, index, Inputs(5))
    assert float((final - truth).abs().max()) < tolerance


@pytest.mark.parametrize("spec", ["ddpm", "ddpm:variance=large", "ddim:eta=0.5", "euler-maruyama", "reverse-diffusion"])
def test_stochastic_samplers_keep_the_flows_mean_and_variance(flow: Model, spec: str) -> None:
    """The start (1+σ) z has the variance of x₀ + σ z to 2/σ, and α = 1/(1+σ) enters the large variance."""
    sampler = registry.parse("sampler", spec)
    sigmas = make_grid(pick_spacing(sampler, "logsnr"), flow.levels, 400)
    index = torch.arange(200)
    final = sample_states(flow, sampler, sigmas, index, Inputs(200))
    assert float(final.mean()) == pytest.approx(0.25, abs=0.01)
    assert float(final.var()) == pytest.approx(0.04, rel=0.05)


def test_a_flow_passes_the_checks_of_a_model() -> None:
    failed = [result for result in run_checks(FlowGaussian()) if result.passed is False]
    assert not failed


def test_a_table_of_a_flow(tmp_path: Path) -> None:
    records = evaluate(["ddim", "heun"], model=named("FlowGaussian"), steps=10, n=640, out=tmp_path)
    assert [r["nfe"] for r in records] == [10, 19]
    assert all(0 <= value(r, "fid") < 200 for r in records)


def test_a_scheduler_of_a_variance_preserving_process_is_refused_on_a_flow() -> None:
    with pytest.raises(UserError, match="variance-preserving"):
        evaluate("diffusers/DDIMScheduler", model=named("FlowGaussian"), steps=5, n=640)


# --- An observation: Inputs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def observed() -> Model:
    return Observed().load(CPU, torch.float64)


def test_each_sample_is_drawn_from_the_posterior_of_its_own_observation(observed: Model) -> None:
    """Mean (m/v + y/τ²)/(1/v + 1/τ²) and variance 1/(1/v + 1/τ²), over 200 seeds of three samples."""
    index = torch.arange(3)
    sampler = registry.parse("sampler", "dpm++:order=3")
    sigmas = make_grid(pick_spacing(sampler, "karras"), observed.levels, 40)
    finals = torch.stack([sample_states(observed, sampler, sigmas, index, seed=seed) for seed in range(200)])
    precision = 1 / 0.16 + 1 / 0.09
    y = observed.inputs(index, Inputs(3)).tensors["observation"]
    expected = (0.1 / 0.16 + y / 0.09) / precision
    error = (finals.mean(0) - expected).abs().max()
    assert float(error) < 5 * math.sqrt(1 / precision / 200)
    assert float(finals.var(0).mean()) == pytest.approx(1 / precision, rel=0.04)


def test_observations_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": named("Observed"), "metrics": named("SquaredError"), "steps": 8, "n": 24}
    (one,) = evaluate("ddim", batch_size=24, **settings)
    (two,) = evaluate("ddim", batch_size=7, **settings)
    metric = one["metrics"].keys() & two["metrics"].keys()
    assert len(metric) == 1
    (name,) = metric
    assert value(one, name) == pytest.approx(value(two, name), rel=1e-12)


def test_a_metric_is_given_the_truth_by_index() -> None:
    """A posterior sample and the truth are two independent draws: E‖x - x₀‖²/d = 2/(1/v + 1/τ²)."""
    spec = named("SquaredError")
    (record,) = evaluate("heun", model=named("Observed"), metrics=spec, steps=40, n=300, spacing="karras")
    (found,) = (entry["value"] for entry in record["metrics"].values())
    assert found == pytest.approx(2 / (1 / 0.16 + 1 / 0.09), rel=0.03)


def test_a_model_without_a_truth_is_refused_before_sampling() -> None:
    with pytest.raises(UserError, match="needs the truth behind each sample"):
        evaluate("ddim", metrics=named("SquaredError"), steps=2, n=2)


# --- A schedule bound to a model: bind -------------------------------------------------------------------------------


def test_a_bound_spacing_puts_its_levels_by_the_models_own_estimates() -> None:
    model = samplerbench.load_model("exact:gaussian", dtype="fp64")
    sampler = registry.parse("sampler", "ddim")
    spacing = registry.parse("spacing", named("ByInformation") + ":points=300")
    bound = bind_spacing(spacing, model, sampler)
    grid = make_grid(bound, model.levels, 12)
    assert bound == spacing
    assert bound.spec == spacing.spec
    # κ(σ) = mean of v σ²/(v + σ²), in closed form on the same fine grid.
    network: Any = model.network
    v = network.variances
    logs = torch.linspace(float(model.levels[0].log()), float(model.levels[-1].log()), 4000, dtype=torch.float64)
    root = (v * (2 * logs.exp().log()).exp()[:, None] / (v + (2 * logs).exp()[:, None])).mean(1).sqrt()
    mass = torch.cat([root.new_zeros(1), ((root[1:] + root[:-1]) / 2).cumsum(0)])
    expected = [logs[int(torch.searchsorted(mass / mass[-1], 1 - i / 11))].exp() for i in range(12)]
    torch.testing.assert_close(grid[:-1], torch.stack(expected).clamp(max=float(model.levels[-1])), rtol=0.05, atol=0)


def test_what_a_bound_plugin_estimates_is_reported_apart_and_kept(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"spacing": named("ByInformation"), "steps": 5, "n": 8, "metrics": "label-accuracy"}
    (first,) = evaluate("ddim", **settings)
    (again,) = evaluate("ddim", **settings)
    assert first["nfe"] == again["nfe"] == 5
    assert first["bound_evaluations"] == again["bound_evaluations"] == 9 * 64
    kept = list((tmp_path / "cache").glob("posterior-variance-*.json"))
    assert len(kept) == 1
    plain = evaluate("ddim", steps=5, n=8, metrics="label-accuracy")[0]
    assert "bound_evaluations" not in plain


# --- A generator without σ -------------------------------------------------------------------------------------------


def test_a_generator_is_a_row_beside_samplers(tmp_path: Path) -> None:
    records = evaluate([named("Grey"), "ddim"], steps=[2, 3], n=100, metrics=["label-accuracy"], out=tmp_path)
    grey = [r for r in records if "Grey" in r["sampler"]]
    assert len(records) == 3
    assert len(grey) == 1
    (row,) = grey
    assert row["nfe"] == 1
    assert (row["steps"], row["spacing"], row["guidance"]) == (None, None, None)
    assert row["protocol_fields"]["generator weights"] == "none"
    stored = json.loads(next(f for f in tmp_path.glob("*.json") if "Grey" in f.read_text("utf-8")).read_text("utf-8"))
    assert stored["metrics"] == row["metrics"]


def test_a_generators_images_do_not_depend_on_the_batch_size() -> None:
    one, two = (samplerbench.sample(named("Grey"), n=13, batch_size=size, quiet=True) for size in (13, 4))
    assert torch.equal(one, two)
    means = one.double().flatten(1).mean(1)
    labels = balanced_labels(13, samplerbench.load_model("digits").class_counts or [])
    assert torch.corrcoef(torch.stack([means, labels.double()]))[0, 1] > 0.99


def test_a_generator_that_needs_labels_is_refused_without() -> None:
    with pytest.raises(UserError, match="needs labels"):
        samplerbench.sample(named("Grey"), n=2, labels="none", quiet=True)


BROKEN_LABELS = """
from dataclasses import dataclass
import torch
from samplerbench.sampling import Generator
@dataclass(frozen=True)
class Broken(Generator):
    \"""States labels that cannot be used (unpublished).\"""
    own_labels = True
    def images(self, index, inputs, seed):
        return torch.rand(len(index), 1, 8, 8)
    def labels(self, index, seed):
        return {labels}
"""


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ("torch.zeros(2, dtype=torch.int64)", "labels returned shape (2,); it must be an int64 tensor of shape (4,)"),
        ("torch.zeros(len(index))", "labels returned shape (4,); it must be an int64 tensor of shape (4,)"),
        ("[0, 0, 0, 0]", "it must be an int64 tensor of shape (4,), or None"),
        ("index - 1", "labels returned values from -1 to 2; they must be 0 to 9"),
        ("index + 7", "labels returned values from 7 to 10; they must be 0 to 9"),
    ],
)
def test_a_generator_with_broken_labels_is_one_failed_cell(labels: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(BROKEN_LABELS.format(labels=labels), "utf-8")
    records = evaluate([f"{file}:Broken", "ddim"], steps=2, n=4, metrics="label-accuracy")
    assert says in records[0]["error"]
    assert "error" not in records[1]
    checks = {result.name: result for result in run_checks(registry.parse("generator", f"{file}:Broken"))}
    assert not checks["labels"].passed


def test_a_generator_with_broken_images_is_one_failed_cell(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from samplerbench.sampling import Generator\n"
        "@dataclass(frozen=True)\n"
        "class Broken(Generator):\n"
        '    """Gives images of another shape (unpublished)."""\n'
        "    def images(self, index, inputs, seed):\n"
        "        return torch.zeros(len(index), 1, 2, 2)\n",
        "utf-8",
    )
    records = evaluate([f"{file}:Broken", "ddim"], steps=2, n=4, metrics="label-accuracy")
    assert "it must be a tensor of shape (4, 1, 8, 8)" in records[0]["error"]
    assert "error" not in records[1]


BROKEN = """
from dataclasses import dataclass
import torch
from samplerbench.sampling import Generator, Guidance, option

def at(stage, wanted, value):
    if stage == wanted:
        raise ValueError(f"no {wanted}")
    return "wrong" if stage == f"odd {wanted}" else value

@dataclass(frozen=True)
class Row(Generator):
    '''Fails at one stage of its binding (unpublished).'''
    stage: str = option("", "where it fails")

    def bind(self, model):
        return at(self.stage, "bind", self)

    @property
    def identity(self):
        return at(self.stage, "identity", {})

    @property
    def network(self):
        return at(self.stage, "network", None)

    def images(self, index, inputs, seed):
        return torch.zeros(len(index), 1, 8, 8)

@dataclass(frozen=True)
class Guide(Guidance):
    '''Fails at one stage of its binding (unpublished).'''
    stage: str = option("", "where it fails")

    def bind(self, model):
        return at(self.stage, "bind", self)

    @property
    def identity(self):
        return at(self.stage, "identity", {})

    @property
    def networks(self):
        return at(self.stage, "networks", ())

    @property
    def classes(self):
        return at(self.stage, "classes", None)

    def predict(self, denoise, x, sigma):
        return denoise.conditional(x, sigma)
"""


@pytest.mark.parametrize("stage", ["bind", "identity", "network", "odd bind", "odd identity", "odd network"])
def test_a_generator_that_cannot_be_bound_is_one_failed_cell(stage: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(BROKEN, "utf-8")
    broken, sound, other = evaluate([f"{file}:Row:stage={stage}", f"{file}:Row", "ddim"], **TINY)
    assert stage.removeprefix("odd ") in broken["error"]
    assert "error" not in sound
    assert "error" not in other


@pytest.mark.parametrize(
    "stage", ["bind", "identity", "networks", "classes", "odd bind", "odd identity", "odd networks", "odd classes"]
)
def test_a_guidance_that_cannot_be_bound_is_one_failed_cell(stage: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(BROKEN, "utf-8")
    guidances = [f"{file}:Guide:stage={stage}", f"{file}:Guide", "none"]
    broken, sound, other = evaluate("ddim", guidances=guidances, **TINY)
    assert stage.removeprefix("odd ") in broken["error"]
    assert sound["metrics"] == other["metrics"] != {}


# --- A metric of the data --------------------------------------------------------------------------------------------


def test_a_metric_of_the_data_samples_nothing() -> None:
    """On a Gaussian the denoising error is κ(σ), the mean of v σ²/(v + σ²)."""
    model = samplerbench.load_model("exact:gaussian,width=0.1", dtype="fp64")
    network: Any = model.network
    v = network.variances
    (record,) = evaluate("ddim", model=model, metrics=named("DenoisingError"), steps=3, n=500)
    (entry,) = record["metrics"].values()
    assert entry["value"] == pytest.approx(float((v * 0.25 / (v + 0.25)).mean()), rel=0.02)
    assert record["nfe"] == 0
    assert record["images_per_second"] == 0


def test_metrics_of_data_and_of_samples_share_a_run(tmp_path: Path) -> None:
    metrics = [named("DenoisingError"), "label-accuracy"]
    one, two = (evaluate("ddim", metrics=metrics, steps=3, n=60, blocks=2, batch_size=size)[0] for size in (60, 17))
    assert one["nfe"] == 3
    assert len(one["metrics"]) == 2
    for name in one["metrics"]:
        assert value(one, name) == pytest.approx(value(two, name), rel=1e-6)
        assert len(one["metrics"][name]["blocks"]) == 2


def test_more_data_than_there_is_is_refused() -> None:
    with pytest.raises(UserError, match="needs 2,000 real images, and digits has 1,442"):
        evaluate("ddim", metrics=named("DenoisingError"), steps=2, n=1000, blocks=2)


# --- Samplers of version 0.1 -----------------------------------------------------------------------------------------

LEGACY = '''
import math
from dataclasses import dataclass
from samplerbench.sampling import Sampler, Step, intervals


@dataclass(frozen=True)
class Legacy(Sampler):
    """Analytic-DPM as it was written for version 0.1 (Bao et al. 2022)."""

    spacing = "leading"
    needs = frozenset({"posterior variance"})

    def steps(self, denoise, x, sigmas, noise):
        n = len(sigmas) - 1
        for i, (s, t) in enumerate(intervals(sigmas)):
            x0 = denoise(x, s)
            if t == 0:
                x = x0
            else:
                u2 = t**2 * (1 - (t / s) ** 2)
                c = math.sqrt(t**2 - u2) / s
                deviation = math.sqrt(u2 + (1 - c) ** 2 * denoise.posterior_variance(s))
                if i == n - 2:
                    deviation = min(deviation, 2.0 * (2 / 255) * math.sqrt(math.pi / 2))
                x = x0 + c * (x - x0) + deviation * noise()
            yield Step(t, x, x0)
'''


def test_a_sampler_file_of_version_0_1_runs_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "legacy.py"
    file.write_text(LEGACY, "utf-8")
    now = samplerbench.sample("analytic-dpm", 8, n=5, model="exact:mixture", quiet=True)
    then = samplerbench.sample(f"{file}:Legacy", 8, n=5, model="exact:mixture", quiet=True)
    assert torch.equal(now, then)


def test_a_baseline_of_version_0_1_draws_latents(tmp_path: Path) -> None:
    """It is refused on a model without autoencoder, as before."""
    file = tmp_path / "legacy.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from samplerbench.sampling import Sampler, Step\n"
        "@dataclass(frozen=True)\n"
        "class Prior(Sampler):\n"
        '    """An autoencoder\'s prior (Kingma & Welling 2014)."""\n'
        '    needs = frozenset({"autoencoder"})\n'
        "    def nfe(self, steps):\n"
        "        return 0\n"
        "    def steps(self, denoise, x, sigmas, noise):\n"
        "        yield Step(0.0, denoise.scale_latents(noise()))\n",
        "utf-8",
    )
    with pytest.raises(UserError, match="requires an autoencoder"):
        samplerbench.sample(f"{file}:Prior", 1, n=2, quiet=True)
    model = "benchmarks/models/mnist-latent"
    now = samplerbench.sample("autoencoder-prior", n=2, model=model, quiet=True)
    then = samplerbench.sample(f"{file}:Prior", 1, n=2, model=model, quiet=True)
    assert torch.equal(now, then)


# --- Several metrics of one name, several feature spaces -------------------------------------------------------------


def test_two_metrics_of_one_name_have_a_column_each() -> None:
    (record,) = evaluate("ddim", metrics=["gap:images=2", "gap:images=4"], steps=2, n=4, model="exact:gaussian")
    assert set(record["metrics"]) == {"gap:images=2", "gap:images=4"}


def test_the_command_prints_a_table_for_each_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = ["--metric", "gap:images=2", "--metric", "gap:images=4"]
    with pytest.raises(SystemExit):
        main(
            [
                "run",
                "-s",
                "ddim",
                "--steps",
                "1",
                "--n",
                "4",
                "--model",
                "exact:gaussian",
                *metrics,
                "--out",
                str(tmp_path),
            ]
        )
    printed = capsys.readouterr().out
    tables, cells = printed[: printed.index("NFE")], printed[printed.index("NFE") :]
    for parameters in (":images=2", ":images=4"):
        assert tables.count(f"Gap{parameters} ↓") == cells.count(f"gap{parameters}") == 1


def test_the_estimate_of_a_metric_of_the_data_has_no_evaluations() -> None:
    asked = Request([one_grid(["ddim"], [5])], model="exact:gaussian", n=10, metrics=[named("DenoisingError")])
    (row,) = estimate(prepare(asked, "cpu")).rows
    assert (row.nfe, row.seconds) == (0, 0)


def test_metrics_of_one_run_may_use_different_feature_spaces() -> None:
    (both,) = evaluate("ddim", metrics=["fid", "fid:features=digits-cnn"], steps=2, n=80, features="mnist-cnn")
    (alone,) = evaluate("ddim", metrics="fid", steps=2, n=80)
    assert {name: entry["features"] for name, entry in both["metrics"].items()} == {
        "fid": "mnist-cnn",
        "fid:features=digits-cnn": "digits-cnn",
    }
    assert value(both, "fid:features=digits-cnn") == pytest.approx(value(alone, "fid"), rel=1e-9)
    assert both["protocol_fields"]["feature spaces"]["digits-cnn"]["features"]["name"] == "digits-cnn"
    assert both["protocol_fields"]["features"]["name"] == "mnist-cnn"


def test_a_run_loads_the_feature_spaces_of_its_metrics_and_no_other() -> None:
    """The run's own feature space does not exist, and no metric uses it."""
    metrics = ["fid:features=digits-cnn", "kid:features=digits-cnn"]
    (record,) = evaluate("ddim", metrics=metrics, steps=2, n=80, features="no-such-space")
    assert {entry["features"] for entry in record["metrics"].values()} == {"digits-cnn"}
    assert record["protocol_fields"]["features"] is None
