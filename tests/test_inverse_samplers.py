"""The samplers for inverse problems: what they compute, where they are exact, and that only the protocol matters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from samplerbench_plugins.task_sampler import time_travel, time_travel_evaluations
from torch import Tensor

import samplerbench
from samplerbench import registry
from samplerbench.bench.plan import most_steps
from samplerbench.errors import UserError
from samplerbench.models import exact_posterior
from samplerbench.models.exact import ExactModel, exact
from samplerbench.models.sample import bind, sample_states, start_batch
from samplerbench.sampling import SVD, Inputs, Noise, Sampler
from samplerbench.sampling.meter import Meter
from samplerbench.sampling.sampler import bind_sampler, check_sampler_task
from samplerbench.sampling.spacing import make_grid

METHODS = ["replace", "repaint:jump_length=2,resamplings=3", "ddrm", "ddnm+", "sdedit", "ccdf:strength=0.5"]
EXACT = ["replace", "replace:eta=0", "repaint:jump_length=5,resamplings=2", "ddrm:eta=0", "ddnm+"]
"""The methods that are exact for inpainting of independent pixels without noise, in the limit of many steps."""


def sampler(spec: str) -> Sampler:
    made: Sampler = registry.parse("sampler", spec)
    return made


def observed(spec: str, model: ExactModel | None = None, n: int = 1) -> Any:
    model = exact("gaussian", shape="1x4x4") if model is None else model
    return model.observed(registry.parse("task", spec), model.real(n)[0])


def levels(model: ExactModel, steps: int, spacing: str = "leading") -> Tensor:
    return make_grid(registry.parse("spacing", spacing), model.levels, steps)


def final(spec: str, model: Any, grid: Tensor, n: int = 1) -> Tensor:
    return sample_states(model, bind(model, sampler(spec), grid), grid, torch.arange(n)).flatten(1)


class Silent(Noise):
    """Noise that is zero: the state follows the mean of the method."""

    def __call__(self) -> Tensor:
        return torch.zeros_like(super().__call__())


# --- The steps, by their definitions ----------------------------------------------------------------------------------


def matrix(model: Any) -> Tensor:
    """A as a matrix (m, d), column by column."""
    d = math.prod(model.shape)
    eye = torch.eye(d, dtype=torch.float64).reshape(d, *model.shape)
    return model.observation.operator.forward(eye).flatten(1).T


def walked(spec: str, model: Any, grid: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor, list[Tensor]]:
    """The states, the denoised states, the observation and the noise of one run of one sample, as vectors."""
    drawn: list[Tensor] = []

    class Recorded(Noise):
        def __call__(self) -> Tensor:
            drawn.append(super().__call__())
            return drawn[-1]

    index = torch.arange(1)
    noise = Recorded(0, index, model.shape, torch.float64)
    batch = start_batch(model, bind(model, sampler(spec), grid), grid, index, noise=noise)
    with torch.no_grad():
        steps = list(batch.steps())
    states = [batch.x.flatten(), *(step.x.flatten() for step in steps)]
    y = model.inputs(index, Inputs(1)).tensors["observation"].flatten()
    return states, [s.x0.flatten() for s in steps if s.x0 is not None], y, [z.flatten() for z in drawn]


@pytest.mark.parametrize("task", ["super-resolution:factor=2,sigma=0.3", "blur:width=0.6,sigma=0.3"])
def test_ddrm_is_its_equations_with_a_dense_decomposition(task: str) -> None:
    """Equations 7 and 8 of the paper with the decomposition of the matrix, coordinate by coordinate."""
    model = observed(task)
    grid = levels(model, 8)
    states, x0s, y, noises = walked("ddrm", model, grid)
    u, s, vh = torch.linalg.svd(matrix(model), full_matrices=True)
    d, eta, sigma_y = len(vh), 0.85, model.observation.sigma
    s = torch.cat([s, s.new_zeros(d - len(s))])
    target = torch.cat([u.T @ y, y.new_zeros(d - len(y))])
    seen = set()
    for k in range(1, 8):  # the state before the first step is not yielded
        x, x0, t, level = vh @ states[k], vh @ x0s[k], float(grid[k + 1]), float(grid[k])
        z = vh @ noises[k] if t > 0 else torch.zeros(d, dtype=torch.float64)
        expected = torch.empty_like(x)
        for i in range(d):
            if s[i] < 1e-9:
                expected[i] = x0[i] + math.sqrt(1 - eta**2) * t * (x[i] - x0[i]) / level + eta * t * z[i]
                seen.add("unobserved")
            elif t < sigma_y / s[i]:
                mean = math.sqrt(1 - eta**2) * t * (target[i] / s[i] - x0[i]) / (sigma_y / s[i])
                expected[i] = x0[i] + mean + eta * t * z[i]
                seen.add("below")
            else:
                expected[i] = target[i] / s[i] + torch.sqrt(t**2 - sigma_y**2 / s[i] ** 2) * z[i]
                seen.add("above")
        torch.testing.assert_close(vh @ states[k + 1], expected, atol=1e-8, rtol=0)
    assert seen >= {"below", "above"}


def test_ddnm_plus_is_its_equations_with_matrices() -> None:
    """Equations 17 to 19 of the paper in variance-preserving coordinates, with the matrices Σ_t and Φ_t."""
    model = observed("super-resolution:factor=2,sigma=0.3")
    grid = levels(model, 8)
    states, x0s, y, noises = walked("ddnm+", model, grid)
    a = matrix(model)
    _, s, vh = torch.linalg.svd(a, full_matrices=True)
    s = torch.cat([s, s.new_zeros(len(vh) - len(s))])
    inverse = torch.linalg.pinv(a)
    scaled = set()
    for k in range(8):
        before, t = 1 / (1 + float(grid[k]) ** 2), 1 / (1 + float(grid[k + 1]) ** 2)  # ᾱ of the two levels
        beta = 1 - before / t
        weight = math.sqrt(t) * beta / (1 - before)
        keep = math.sqrt(before / t) * (1 - t) / (1 - before)
        deviation = math.sqrt((1 - t) / (1 - before) * beta)
        needed = torch.where(s > 1e-9, weight * model.observation.sigma / s.clamp(min=1e-9), 0.0)
        part = torch.where(deviation >= needed, 1.0, deviation / needed.clamp(min=1e-300))
        scaled |= set((part < 1).tolist())
        gamma = (deviation**2 - needed**2).clamp(min=0)
        corrected = x0s[k] - vh.T @ torch.diag(part) @ vh @ inverse @ (a @ x0s[k] - y)
        mean = weight * corrected + keep * math.sqrt(before) * states[k]
        z = noises[k] if k < 7 else torch.zeros_like(mean)
        expected = (mean + vh.T @ torch.diag(gamma.sqrt()) @ vh @ z) / math.sqrt(t)
        torch.testing.assert_close(states[k + 1], expected, atol=1e-7, rtol=0)
    assert scaled == {True, False}


def test_without_noise_ddnm_plus_is_ddnm_with_ancestral_steps() -> None:
    model = observed("super-resolution:factor=2,sigma=0")
    grid = levels(model, 6)
    made = final("ddnm+", model, grid)
    from samplerbench.sampling.guidance import bind_guidance

    guided = bind_guidance(registry.parse("guidance", "ddnm"), model)
    ancestral = bind(model, sampler("ddim:eta=1"), grid)
    expected = sample_states(model, ancestral, grid, torch.arange(1), guidance=guided).flatten(1)
    torch.testing.assert_close(made, expected, atol=1e-9, rtol=0)


def test_the_known_pixels_are_a_noisy_observation_at_every_level() -> None:
    """√ᾱ y + √(1-ᾱ) z in the paper; y + t z in these coordinates. The others are those of the step alone."""
    model = observed("inpaint:mask=half,sigma=0")
    grid = levels(model, 5)
    for spec in ("replace:eta=0", "repaint:jump_length=9"):
        states, x0s, y, noises = walked(spec, model, grid)
        a = matrix(model)
        for k in range(5):
            t = float(grid[k + 1])
            z = noises[k if spec.startswith("replace") else 2 * k + 1] if t > 0 else torch.zeros(16).double()
            torch.testing.assert_close(a @ states[k + 1], y + t * (a @ z), atol=1e-9, rtol=0)
        hidden = torch.eye(16).double() - a.T @ a
        step = x0s[0] + float(grid[1] / grid[0]) * (states[0] - x0s[0])
        if spec == "replace:eta=0":
            torch.testing.assert_close(hidden @ states[1], hidden @ step, atol=1e-9, rtol=0)


def released_schedule(steps: int, length: int, repeats: int) -> list[int]:
    """The numbers of remaining steps that the algorithm visits, as the paper's appendix defines them."""
    jumps = dict.fromkeys(range(0, steps - length, length), repeats - 1)
    t, times = steps, []
    while t >= 1:
        t -= 1
        times.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(length):
                t += 1
                times.append(t)
    return [time + 1 for time in [*times, -1]]


@pytest.mark.parametrize(("steps", "length", "repeats"), [(250, 10, 10), (20, 10, 10), (7, 1, 3), (9, 4, 2), (5, 8, 5)])
def test_the_jumps_are_those_of_repaint(steps: int, length: int, repeats: int) -> None:
    visited = [steps]
    for move in time_travel(steps, length, repeats):
        here, there = steps - move.start, steps - move.end
        visited += range(here + 1, there + 1) if there > here else [there]
    assert visited == released_schedule(steps, length, repeats)
    denoising = [m for m in time_travel(steps, length, repeats) if m.end > m.start]
    assert len(denoising) == time_travel_evaluations(steps, length, repeats)
    assert [m.end for m in denoising if m.last] == list(range(1, steps + 1))


def test_repaint_counts_every_resampling() -> None:
    """250 steps with j = 10 and r = 10: 24 groups of ten steps are made nine more times."""
    assert sampler("repaint").nfe(250) == 250 + 24 * 9 * 10
    assert sampler("repaint").nfe(10) == 10
    model = observed("inpaint")
    with Meter(model.network) as meter:
        final("repaint:jump_length=2,resamplings=3", model, levels(model, 6), 3)
    assert meter.network == 3 * (6 + 2 * 2 * 2)


def test_sdedit_starts_at_the_noisy_first_guess() -> None:
    model = observed("blur:sigma=0.1")
    grid = levels(model, 10)
    states, x0s, y, _ = walked("sdedit:strength=0.4", model, grid)
    guess = torch.linalg.pinv(matrix(model)) @ y
    z = states[0] / math.sqrt(1 + float(grid[0]) ** 2)
    torch.testing.assert_close(states[6], guess + float(grid[6]) * z, atol=1e-8, rtol=0)
    assert len(x0s) == 4
    assert [sampler(f"sdedit:strength={s}").nfe(n) for s, n in ((0.4, 10), (0.29, 100), (0.01, 5), (1, 7))] == [
        *(4, 29, 1, 7)
    ]


def test_a_budget_counts_evaluations_not_steps() -> None:
    """A sampler that skips the first steps has a finer grid at an equal budget."""
    assert most_steps(sampler("sdedit"), 1, 20, 1000) == 41
    assert most_steps(sampler("ccdf"), 1, 20, 1000) == 104
    assert most_steps(sampler("ccdf"), 1, 20, 60) == 60
    assert most_steps(sampler("ddim"), 1, 20, 1000) == 20


# --- Where they are exact ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", [pytest.param(s, marks=[] if s in ("replace:eta=0", "ddrm:eta=0") else [pytest.mark.slow]) for s in EXACT]
)
@pytest.mark.parametrize("task", ["inpaint:mask=half,sigma=0", "blur:width=0.6,sigma=0"])
def test_the_mean_is_that_of_the_posterior(spec: str, task: str) -> None:
    """Every step is affine for a Gaussian: without noise, the mean of the start ends at the posterior mean.

    Any A commutes with the covariance of an isotropic Gaussian. Ancestral steps forget the start.
    """
    model = exact("gaussian", shape="1x4x4")
    if "blur" in task:
        model.problem.variances.fill_(0.5)
    model = observed(task, model)
    grid = levels(model, 100, "karras")
    y = model.inputs(torch.arange(1), Inputs(1)).tensors["observation"]
    moments = exact_posterior(model, "a test").moments(y[0])
    start = moments.mean.reshape(1, *model.shape) + (0 if "eta=0" in spec else 10)
    noise = Silent(0, torch.arange(1), model.shape, torch.float64)
    bound = bind(model, sampler(spec), grid)
    made = start_batch(model, bound, grid, torch.arange(1), x=start, noise=noise).states().flatten()
    assert float((made - moments.mean).abs().max()) < 1e-3 * float(model.problem.variances.min().sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("spec", EXACT)
def test_the_samples_are_at_the_floor_of_the_posterior(spec: str) -> None:
    """On `exact:gaussian`, with inpainting without noise and many steps."""
    (record,) = samplerbench.evaluate(
        *(spec,),
        steps=200,
        model="exact:gaussian",
        tasks="inpaint:mask=half,sigma=0,images=1",
        n=200,
        metrics="posterior",
        spacing="karras",
        quiet=True,
    )
    entry = record["metrics"]["posterior"]
    assert entry["value"] <= 1.15 * entry["floor"]
    assert entry["mean_error"] <= 2 * entry["mean_floor"]


@pytest.mark.parametrize(
    "eta", [pytest.param(eta, marks=[] if eta == 0.85 else [pytest.mark.slow]) for eta in (0.85, 1.0)]
)
def test_the_variance_of_ddrm_is_too_small(eta: float) -> None:
    """In the limit of many steps a Gaussian of variance v ends with v (1 + √(1-η²))/2 in the unobserved directions."""
    model = exact("gaussian", shape="1x4x4")
    model.problem.variances.fill_(0.5)
    model = observed("inpaint:mask=half,sigma=0", model)
    made = final(f"ddrm:eta={eta}", model, levels(model, 400, "geometric"), 700)
    ratio = float(made.reshape(-1, 4, 4)[:, :, 2:].var(0).mean()) / 0.5
    assert ratio == pytest.approx((1 + math.sqrt(1 - eta**2)) / 2, rel=4 * math.sqrt(2 / (700 * 8)))


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["replace", "ddnm+", "ddrm:eta=0"])
def test_the_samples_are_not_exact_elsewhere(spec: str) -> None:
    """Blur with noise: no method of this file is exact, however many the steps."""
    more: dict[str, Any] = {"model": "exact:gaussian", "tasks": "blur:images=1", "n": 200, "quiet": True}
    (record,) = samplerbench.evaluate(spec, steps=200, metrics="posterior", **more)
    entry = record["metrics"]["posterior"]
    assert entry["value"] > 1.5 * entry["floor"]


# --- Only the protocol matters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [pytest.param(m, marks=[] if m == "ddrm" else [pytest.mark.slow]) for m in METHODS])
def test_the_batch_size_changes_nothing(spec: str) -> None:
    more: dict[str, Any] = {"model": "exact:mixture", "tasks": "blur:images=3", "n": 12, "quiet": True}
    records = [samplerbench.evaluate(spec, steps=5, metrics="psnr", batch_size=b, **more)[0] for b in (12, 5)]
    one, two = (record["metrics"]["psnr"]["value"] for record in records)
    assert two == pytest.approx(one, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["repaint:jump_length=2,resamplings=3", "ddrm", "ccdf:strength=0.5"])
def test_a_stopped_run_resumes_to_the_same_result(spec: str, tmp_path: Path) -> None:
    from samplerbench.bench.prepare import prepare
    from samplerbench.bench.request import Request, one_grid
    from samplerbench.bench.run import Observer, Run
    from samplerbench.errors import Stopped
    from samplerbench.results.store import Store

    request = Request(
        [one_grid([spec], [5])],
        model="exact:mixture",
        n=20,
        batch_size=10,
        metrics=["posterior", "psnr"],
        tasks=["super-resolution:factor=2,images=3"],
    )

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
    assert records[0]["metrics"] == records[1]["metrics"]


@pytest.mark.slow
def test_two_processes_change_nothing(tmp_path: Path) -> None:
    import json
    import subprocess
    import sys

    arguments = ["run", "--model", "exact:gaussian", "--task", "inpaint:images=2", "-s", "ddrm", "-s", "repaint"]
    arguments += ["--steps", "12", "--n", "20", "--batch-size", "5", "--metric", "psnr", "--json"]
    alone = [sys.executable, "-m", "samplerbench", *arguments, "--out", str(tmp_path / "one")]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "samplerbench"]
    subprocess.run(alone, check=True, capture_output=True)
    subprocess.run([*launch, *arguments, "--out", str(tmp_path / "two")], check=True, capture_output=True)
    one, two = (
        sorted(
            (r for r in (json.loads(f.read_text("utf-8")) for f in folder.glob("*.json")) if "sampler" in r),
            key=lambda r: r["sampler"],
        )
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert [r["protocol"] for r in one] == [r["protocol"] for r in two]
    assert {r["processes"] for r in two} == {2}
    for a, b in zip(one, two, strict=True):
        assert b["metrics"]["psnr"]["value"] == pytest.approx(a["metrics"]["psnr"]["value"], rel=1e-12)


def test_a_part_of_a_batch_keeps_its_observations() -> None:
    model = observed("denoise", n=3)
    denoise = model.denoiser(model.inputs(torch.arange(3), Inputs(3)))
    y = model.inputs(torch.arange(3), Inputs(3)).tensors["observation"]
    assert torch.equal(denoise.observation, y)
    assert torch.equal(denoise.rows(torch.tensor([2, 0])).observation, y[[2, 0]])
    assert exact("gaussian").denoiser(Inputs(2)).observation is None


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", METHODS)
def test_a_task_that_a_sampler_cannot_take_is_refused(spec: str) -> None:
    name = spec.partition(":")[0].replace("+", r"\+")
    with pytest.raises(UserError, match=rf"sampler {name} requires a task, such as task=\"inpaint\"\."):
        bind_sampler(sampler(spec), exact("gaussian"), torch.tensor([1.0, 0.0]))
    clip = observed("clip").observation
    with pytest.raises(UserError, match=rf"sampler {name} requires a linear task, and clip is not linear\."):
        check_sampler_task(sampler(spec), clip)


@pytest.mark.parametrize("spec", ["ddrm", "ddnm+"])
def test_a_task_without_singular_values_is_refused(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = observed("inpaint")
    monkeypatch.setattr(type(model.observation.operator), "svd", lambda self: None)
    name = spec.replace("+", r"\+")
    says = rf"sampler {name} requires the singular value decomposition of the task, and inpaint has none\."
    with pytest.raises(UserError, match=says):
        check_sampler_task(sampler(spec), model.observation)
    check_sampler_task(sampler("replace"), model.observation)


def test_a_wrong_decomposition_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from samplerbench_plugins.linear_operators import BlockMean

    from samplerbench.testing.checks import checks_for, run_check

    sound = BlockMean.svd

    def doubled(self: BlockMean) -> SVD:
        made = sound(self)
        return SVD(2 * made.values, made.u_adjoint, made.v_adjoint, made.v)

    monkeypatch.setattr(BlockMean, "svd", doubled)
    task = registry.parse("task", "super-resolution:factor=2,filter=average")
    results = {c.name: run_check(c) for c in checks_for(task)}
    assert [name for name, r in results.items() if r.passed is False] == ["svd"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("sdedit:strength=0", "strength=0: it must be greater than 0"),
        ("ccdf:strength=1.5", "strength=1.5: it must be at most 1"),
        ("repaint:jump_length=-1", "jump_length=-1: it must be at least 1"),
        ("repaint:resamplings=0", "resamplings=0: it must be at least 1"),
        ("ddrm:eta=1.1", "eta=1.1: it must be at most 1"),
    ],
)
def test_a_parameter_out_of_range_is_one_line(spec: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        sampler(spec)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
