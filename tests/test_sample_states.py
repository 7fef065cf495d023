"""Sample i is one state, whoever samples it: the engine, a figure, a check and `sample_states` begin in one place."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, make_cell
from support.denoising import denoiser, labelled
from torch import Tensor

import samplerbench
from samplerbench import registry
from samplerbench.bench import setup
from samplerbench.bench.generate import generate
from samplerbench.bench.prepare import prepare
from samplerbench.bench.request import Grid, Request
from samplerbench.errors import UserError
from samplerbench.figures.scene import NoNoise, Scene
from samplerbench.models import Model
from samplerbench.models.sample import bind, sample_states, start_batch, start_noise, start_states
from samplerbench.sampling import Noise, Step
from samplerbench.sampling.driver import drive
from samplerbench.sampling.noise import Purpose, normal

N, STEPS, SEED = 5, 3, 3


@pytest.fixture(scope="module", params=["fp32", "fp64"])
def model(request: pytest.FixtureRequest) -> Model:
    return setup.load_model("digits", CPU, request.param)


def labels() -> Tensor:
    return torch.arange(N) % 10


def by_hand(model: Model, spec: str, index: Tensor, guidance: str = "none") -> Tensor:
    """A run written out."""
    cell = make_cell(model, spec, None, STEPS, guidance)
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    x = model.prior(normal(SEED, Purpose.PRIOR, index, 0, model.shape).to(dtype), float(cell.sigmas[0]))
    noise = Noise(SEED, index, model.shape, dtype)
    denoise = denoiser(model, labels()[index], len(index), cell.guidance)
    return drive(cell.sampler, denoise, x, cell.sigmas, noise)


@pytest.mark.parametrize(
    ("spec", "guidance"), [("ddim", "cfg:scale=3"), ("ddpm", "none"), ("heun:S_churn=10", "none"), ("dpm++", "none")]
)
def test_it_is_the_run_written_out_the_engine_s_and_the_figure_s(spec: str, guidance: str, model: Model) -> None:
    cell = make_cell(model, spec, None, STEPS, guidance)
    index = torch.arange(N)
    expected = by_hand(model, spec, index, guidance)
    given = sample_states(
        model, cell.sampler, cell.sigmas, index, labelled(labels()), guidance=cell.guidance, seed=SEED
    )
    assert torch.equal(given, expected)
    assert given.dtype == (torch.float64 if model.dtype == torch.float64 else torch.float32)
    batches = generate(model, cell, index, labelled(labels()), SEED, N, decode=False)
    assert torch.equal(torch.cat([batch.states for batch in batches]), expected)
    asked = Request([Grid([cell.sampler], [STEPS], [], [guidance], [None])], model="digits", labels="balanced")
    scene = Scene(prepare(asked, "cpu", model), N, SEED)
    assert torch.equal(scene.run(cell, scene.start(cell), labels()), expected)


def test_a_sample_has_its_own_start_and_its_own_noise_in_any_batch(model: Model) -> None:
    """On a network the last digits depend on the batch, so this is said of what goes in, not of what comes out."""
    cell = make_cell(model, "ddpm", None, STEPS)
    whole = start_batch(model, cell.sampler, cell.sigmas, torch.arange(N), labelled(labels()), seed=SEED)
    some = torch.tensor([4, 1])
    part = start_batch(model, cell.sampler, cell.sigmas, some, labelled(labels()[some]), seed=SEED)
    assert torch.equal(part.x, whole.x[some])
    assert torch.equal(part.noise(), whole.noise()[some])
    assert torch.equal(part.noise(), whole.noise()[some])
    other = start_batch(model, cell.sampler, cell.sigmas, some, labelled(labels()[some]), seed=SEED + 1)
    assert not torch.isclose(other.x, part.x).any()


def test_the_start_is_the_prior_s(model: Model) -> None:
    index = torch.tensor([7, 2])
    z = start_noise(model, index, SEED)
    assert torch.equal(start_states(model, 1.5, index, SEED), model.prior(z, 1.5))
    assert z.shape == (2, *model.shape)
    assert start_states(model, 1.5, index, dtype=torch.float64).dtype == torch.float64
    assert torch.equal(start_noise(model, index, SEED, torch.float64).to(z.dtype), z)


def test_a_start_and_a_noise_that_are_given_are_used(model: Model) -> None:
    cell = make_cell(model, "ddpm", None, STEPS)
    x = start_states(model, float(cell.sigmas[0]), torch.arange(N), SEED + 1)
    batch = start_batch(model, cell.sampler, cell.sigmas, torch.arange(N), labelled(labels()), seed=SEED, x=x)
    assert batch.x is x
    assert torch.equal(batch.noise(), start_batch(model, cell.sampler, cell.sigmas, torch.arange(N), seed=SEED).noise())
    silent = start_batch(
        model, cell.sampler, cell.sigmas, torch.arange(N), labelled(labels()), x=x, noise=NoNoise(cell.sampler)
    )
    with pytest.raises(UserError, match="sampler ddpm draws noise on its way"):
        silent.states()


def test_a_run_can_be_watched_and_taken_step_by_step(model: Model) -> None:
    cell = make_cell(model, "ddpm", None, STEPS)
    seen: list[Step] = []

    final = sample_states(
        model,
        cell.sampler,
        cell.sigmas,
        torch.arange(N),
        labelled(labels()),
        seed=SEED,
        on_step=lambda i, step: seen.append(step),
    )
    with torch.no_grad():
        steps = list(
            start_batch(model, cell.sampler, cell.sigmas, torch.arange(N), labelled(labels()), seed=SEED).steps()
        )
    assert [step.sigma for step in steps] == cell.sigmas[1:].tolist()
    assert all(torch.equal(a.x, b.x) for a, b in zip(seen, steps, strict=True))
    assert torch.equal(final, steps[-1].x)


def test_runs_begin_in_one_place() -> None:
    """No other module of the core drives a sampler on a model, or draws the noise that a run begins with.

    Two have a reason: a likelihood begins at an image, and a stock pipeline asks for its initial noise itself.
    """
    root = Path(samplerbench.__file__).parent
    own = {root / "models" / "sample.py", root / "sampling" / "driver.py"}
    own |= {root / "likelihoods" / "ode.py", root / "diffusers" / "own_noise.py"}
    found = []
    for file in sorted(root.rglob("*.py")):
        if file in own:
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            called = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("drive", "walk")
            drawn = isinstance(node, ast.Attribute) and node.attr == "PRIOR"
            if called or (drawn and file.parent.name != "testing"):  # checks of a prior draw what it is made of
                found.append(f"{file.relative_to(root)}:{node.lineno}")
    assert found == []


def test_a_plugin_is_prepared_only_where_it_needs_something(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SAMPLERBENCH_CACHE", str(tmp_path))
    requested: list[str] = []
    estimates = type(model).estimates

    def watched(self: Model, name: str, **settings: int) -> Any:
        requested.append(name)
        return estimates(self, name, **settings)

    real = type(model).real
    monkeypatch.setattr(type(model), "real", lambda self, n: real(self, 16))  # as many as are quick
    monkeypatch.setattr(type(model), "estimates", watched)
    sigmas = make_cell(model, "ddim", None, STEPS).sigmas
    plain = registry.parse("sampler", "ddim")
    assert bind(model, plain, sigmas) is plain
    assert requested == []
    bound = bind(model, registry.parse("sampler", "analytic-dpm"), sigmas)
    assert requested == ["posterior-variance"]
    assert bound == registry.parse("sampler", "analytic-dpm")
    assert set(bound.variances) == set(sigmas[:-1].tolist())
