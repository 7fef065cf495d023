"""What a run costs, counted a second time; what the driver does with a sampler; and that a batch changes no image."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from conftest import CPU, Half, make_cell, run_images
from support.samplers import own_samplers
from torch import Tensor

from samplerbench.bench import engine, setup
from samplerbench.errors import RunError, UserError
from samplerbench.models import Model
from samplerbench.sampling import Denoiser, Noise, Sampler, Step, intervals
from samplerbench.sampling.driver import drive

SAMPLERS = [
    *own_samplers(needs_task=False),
    pytest.param("pf-ode:solver=rk45", marks=pytest.mark.slow),  # many evaluations
]

# --- The meter ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", ["none", "cfg"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nfe_is_what_a_hook_on_the_network_sees(
    digits: Model, labels: Tensor, make_session: Callable[..., engine.Session], sampler: str, guidance: str
) -> None:
    n, steps = 6, 3
    cell = make_cell(digits, sampler, None, steps, guidance)
    run_images(digits, sampler, None, steps, 1, labels)  # a sampler may estimate something once, which is no sampling
    rows: list[int] = []
    hook = digits.network.register_forward_hook(lambda _module, _args, output: rows.append(len(output.sample)))
    try:
        record = engine.run_cell(make_session(n=n, batch_size=4), cell).record
    finally:
        hook.remove()
    assert record["nfe"] == sum(rows) / n
    planned = cell.sampler.nfe(steps)
    if planned is not None:
        assert record["nfe"] == planned * (2 if guidance == "cfg" else 1)
    assert record["classifier_forward"] == record["classifier_backward"] == 0


def test_classifier_passes_are_reported_beside_nfe(digits: Model, make_session: Callable[..., engine.Session]) -> None:
    cell = make_cell(digits, "pf-ode:solver=heun", None, 3, "classifier")
    record = engine.run_cell(make_session(n=6, batch_size=4), cell).record
    assert (record["nfe"], record["classifier_forward"], record["classifier_backward"]) == (5, 5, 5)
    assert record["network_backward"] == 0


# --- The driver -----------------------------------------------------------------------------------------------------


Method = Callable[[Denoiser, Tensor, Tensor, Noise], Iterator[Step]]


def sampler_of(method: Method) -> Sampler:
    """A sampler whose `steps` is the given generator function."""

    @dataclass(frozen=True)
    class Scripted(Sampler):
        def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
            return method(denoise, x, sigmas, noise)

    return Scripted()


def euler(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
    for s, t in intervals(sigmas):
        x0 = denoise(x, s)
        x = x0 + (t / s) * (x - x0)
        yield Step(t, x, x0)


def run(method: Method, on_step: Callable[[int, Step], None] | None = None) -> Tensor:
    x, sigmas = torch.ones(2, 1, 4, 4), torch.tensor([8.0, 4.0, 2.0, 0.0]).double()
    noise = Noise(0, torch.arange(2), (1, 4, 4), torch.float32)
    return drive(sampler_of(method), Half(), x, sigmas, noise, on_step)


def test_the_last_state_is_the_result_and_each_step_is_told() -> None:
    told: list[tuple[int, float, float]] = []
    final = run(euler, lambda i, step: told.append((i, step.sigma, step.x[0, 0, 0, 0].item())))
    # x ← x/2 + t/(2s) x: three quarters, three quarters, a half.
    assert told == [(0, 4.0, 0.75), (1, 2.0, 0.5625), (2, 0.0, 0.28125)]
    assert torch.equal(final, torch.full((2, 1, 4, 4), 0.28125))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_stops_the_run_and_names_the_step(bad: float) -> None:
    reached: list[int] = []

    def method(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for i, step in enumerate(euler(denoise, x, sigmas, noise)):
            reached.append(i)
            spoilt = step.x.clone()
            spoilt[1, 0, 2, 3] = bad if i >= 1 else 0.0  # one pixel of one image is enough
            yield Step(step.sigma, spoilt)

    with pytest.raises(
        RunError, match=re.escape("sampler Scripted: the state is not finite after step 2 of 3 (σ = 2)")
    ):
        run(method)
    assert reached == [0, 1]


def test_an_error_in_a_sampler_is_one_line_that_names_the_step() -> None:
    def method(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        yield Step(4.0, x)
        yield Step(2.0, x)
        raise ZeroDivisionError("float division by zero")

    with pytest.raises(RunError) as caught:
        run(method)
    line = "sampler Scripted raised ZeroDivisionError in step 3 of 3: float division by zero"
    assert str(caught.value) == line
    assert caught.value.exit_code == 1
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("error", [UserError("the model learned no variance"), KeyboardInterrupt()])
def test_what_is_no_fault_of_the_sampler_passes_the_driver_unchanged(error: BaseException) -> None:
    def method(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        yield Step(4.0, x)
        raise error

    with pytest.raises(type(error)) as caught:
        run(method)
    assert caught.value is error


def test_a_state_of_another_shape_is_refused() -> None:
    def method(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        yield Step(4.0, x)
        yield Step(2.0, x[:1])

    line = "a state of shape (1, 1, 4, 4) in step 2 of 3; it must have the shape (2, 1, 4, 4)"
    with pytest.raises(RunError, match=re.escape(line)):
        run(method)


def test_a_sampler_without_a_step_is_refused() -> None:
    with pytest.raises(RunError, match="sampler Scripted yielded no step"):
        run(lambda *_: iter(()))


def test_gradients_are_off_inside_the_steps_and_as_they_were_outside() -> None:
    inside: list[bool] = []
    outside: list[bool] = []

    def method(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        weight = torch.ones((), requires_grad=True)
        for step in euler(denoise, x, sigmas, noise):
            inside.append(torch.is_grad_enabled())
            yield Step(step.sigma, step.x * weight)
        inside.append(torch.is_grad_enabled())

    final = run(method, lambda *_: outside.append(torch.is_grad_enabled()))
    assert inside == [False] * 4
    assert outside == [True] * 3
    assert not final.requires_grad
    with torch.no_grad():
        run(method, lambda *_: outside.append(torch.is_grad_enabled()))
    assert outside[3:] == [False] * 3


@pytest.mark.parametrize("how", ["nan", "shape", "on_step"])
def test_a_run_that_fails_closes_the_sampler(how: str) -> None:
    closed: list[bool] = []

    def method(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        try:
            yield Step(4.0, x)
            yield Step(2.0, {"nan": x * torch.nan, "shape": x[:1], "on_step": x}[how])
        finally:
            closed.append(True)

    def stop(i: int, _: Step) -> None:
        if how == "on_step" and i == 1:
            raise KeyboardInterrupt

    with pytest.raises((RunError, KeyboardInterrupt)) as caught:
        run(method, stop)
    assert caught.value.__traceback__ is not None  # which holds on to the driver's frame, and so to the generator
    assert closed == [True]


# --- A batch changes no image ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        ("ddim", 10),
        pytest.param("ddpm", 10, marks=pytest.mark.slow),
        pytest.param("langevin:T=3,r=0.7", 12, marks=pytest.mark.slow),
        pytest.param("pf-ode:solver=heun", 10, marks=pytest.mark.slow),
    ],
)
def test_the_same_seed_gives_the_same_images_for_every_batch_size(
    digits: Model, labels: Tensor, sampler: str, steps: int
) -> None:
    whole = run_images(digits, sampler, None, steps, 64, labels, batch_size=64)[:16]
    for batch_size, n in ((7, 16), (1, 4)):
        part = run_images(digits, sampler, None, steps, n, labels, batch_size=batch_size)
        assert (whole[:n] - part).abs().max() <= 1e-5
    other = run_images(digits, sampler, None, steps, 16, labels, batch_size=16, seed=1)
    assert (whole - other).abs().max() > 0.1


@pytest.mark.parametrize("sampler", [pytest.param("ddim", marks=pytest.mark.slow), "ddpm"])
def test_neither_the_order_of_the_work_nor_a_resumption_changes_an_image(
    digits: Model, labels: Tensor, sampler: str
) -> None:
    at_once = run_images(digits, sampler, None, 10, 20, labels)
    order = torch.tensor([19, 3, 11, 0, 7])
    shuffled = run_images(digits, sampler, None, 10, 5, labels, index=order, batch_size=2)
    assert (at_once[order] - shuffled).abs().max() <= 1e-5
    rest = run_images(digits, sampler, None, 10, 12, labels, index=torch.arange(8, 20))
    assert (at_once[8:] - rest).abs().max() <= 1e-5


@pytest.mark.slow
def test_the_adaptive_solver_steps_no_image_by_its_neighbours(labels: Tensor) -> None:
    """In float64. In float32 rounding moves an accepted step size now and then, and the image within the tolerance."""
    exact = setup.load_model("digits", CPU, "fp64")
    spec = "pf-ode:solver=rk45,rtol=1e-3,atol=1e-3"
    together = run_images(exact, spec, None, 1, 4, labels)
    apart = run_images(exact, spec, None, 1, 4, labels, batch_size=1)
    assert (together - apart).abs().max() <= 1e-9
