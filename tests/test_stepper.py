"""The stepper: a sampler that is sent D takes the steps of a sampler that calls for it, and leaves nothing behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.denoising import denoiser
from support.samplers import own_samplers
from torch import Tensor

from samplerbench import registry
from samplerbench.errors import RunError, UserError
from samplerbench.models.exact import ExactModel, exact
from samplerbench.models.sample import bind
from samplerbench.sampling import Denoiser, Noise, Prediction, Sampler, Sigma, Step, intervals, option
from samplerbench.sampling.driver import drive
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.spacing import make_grid
from samplerbench.sampling.stepper import State, Stepper

pytestmark = pytest.mark.filterwarnings("ignore::Warning:diffusers")

BATCH, STEPS, SEED = 3, 5, 7
LABELS = torch.tensor([0, 1, 1])

BUILT_IN = own_samplers(needs_task=False)
VARIANTS = [
    *("ddim:eta=0.5", "ddpm:variance=large", "dpm++:order=3", "dpm++:sde=true", "dpm++:method=singlestep"),
    *("dpm-solver:order=3", "heun:S_churn=10", "pc:M=2", "pf-ode:solver=rk4", "pf-ode:solver=rk45", "deis:order=3"),
    *("diffusers/DDPMScheduler", "diffusers/HeunDiscreteScheduler", "diffusers/DPMSolverMultistepScheduler"),
]


@pytest.fixture(scope="module")
def model() -> ExactModel:
    return exact("mixture", shape="1x2x2")


@pytest.fixture(scope="module")
def grid(model: ExactModel) -> Tensor:
    return make_grid(registry.parse("spacing", "trailing"), model.levels, STEPS)


def start(model: ExactModel, grid: Tensor, seed: int = SEED) -> Tensor:
    return model.prior(normal(seed, Purpose.PRIOR, torch.arange(BATCH), 0, model.shape), float(grid[0]))


def noise(model: ExactModel, seed: int = SEED) -> Noise:
    return Noise(seed, torch.arange(BATCH), model.shape, torch.float64)


def bound(model: ExactModel, grid: Tensor, sampler: str | Sampler) -> Sampler:
    return bind(model, registry.parse("sampler", sampler), grid)


def stepper(model: ExactModel, grid: Tensor, sampler: str | Sampler, seed: int = SEED) -> Stepper:
    return Stepper(bound(model, grid, sampler), grid, noise(model, seed), denoiser(model, None, BATCH))


def driven(model: ExactModel, grid: Tensor, sampler: str | Sampler, seed: int = SEED) -> Tensor:
    made = bound(model, grid, sampler)
    return drive(made, denoiser(model, None, BATCH), start(model, grid, seed), grid, noise(model, seed))


@torch.no_grad()
def answer(model: ExactModel, state: State) -> Prediction:
    """What the model says at the state that is asked for."""
    denoise = denoiser(model, None, BATCH)
    return (denoise if state.rows is None else denoise.rows(state.rows)).predict(state.x, state.sigma)


@torch.no_grad()
def labelled(model: ExactModel, state: State) -> Prediction:
    """What the model says there of images with different labels."""
    assert state.rows is not None
    return denoiser(model, LABELS[state.rows], len(state.rows)).predict(state.x, state.sigma)


def finish(model: ExactModel, made: Stepper, state: State) -> State:
    while not state.done:
        state = made.send(answer(model, state))
    return state


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("sampler ")]


# --- The same steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [*BUILT_IN, *VARIANTS])
def test_it_ends_where_the_driver_ends_bit_for_bit(spec: str, model: ExactModel, grid: Tensor) -> None:
    made = stepper(model, grid, spec)
    last = finish(model, made, made.start(start(model, grid)))
    assert last is made.state
    assert last.rows is None
    assert float(last.sigma) == 0
    assert torch.equal(last.x, driven(model, grid, spec))
    assert threads() == []


def test_two_of_them_interleaved_are_as_each_alone(model: ExactModel, grid: Tensor) -> None:
    """Of one sampler and of two, with as many requests and with fewer."""
    for specs in (("dpm++:order=3", "dpm++:order=3"), ("langevin", "pf-ode:solver=rk45"), ("heun", "ddpm")):
        made = [stepper(model, grid, spec, seed) for seed, spec in enumerate(specs)]
        states = [one.start(start(model, grid, seed)) for seed, one in enumerate(made)]
        assert len(threads()) == 2
        while not all(state.done for state in states):
            for k, one in enumerate(made):
                if not states[k].done:
                    states[k] = one.send(answer(model, states[k]))
        for seed, spec in enumerate(specs):
            assert torch.equal(states[seed].x, driven(model, grid, spec, seed))
    assert threads() == []


def test_every_request_is_one_call_of_the_denoiser(model: ExactModel, grid: Tensor) -> None:
    """The same states at the same levels, in the same order; nothing is asked for twice."""
    seen: list[tuple[Tensor, Sigma]] = []

    class Watching(Denoiser):
        levels, process = model.levels, model.process

        def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
            seen.append((x, sigma))
            return answer(model, State(x, sigma))

        def rows(self, index: Tensor) -> Denoiser:
            raise NotImplementedError

    drive(registry.parse("sampler", "heun"), Watching(), start(model, grid), grid, noise(model))
    made = stepper(model, grid, "heun")
    state, asked = made.start(start(model, grid)), []
    while not state.done:
        asked.append((state.x, state.sigma))
        state = made.send(answer(model, state))
    assert len(asked) == len(seen) == 2 * STEPS - 1
    assert all(torch.equal(x, y) and s == t for (x, s), (y, t) in zip(asked, seen, strict=True))


# --- Samplers made for these tests ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Euler(Sampler):
    """Euler's method, with a hook before each step."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for i, (s, t) in enumerate(intervals(sigmas)):
            self.before(i)
            x0 = denoise(x, s)
            x = x0 + (t / s) * (x - x0)
            yield Step(t, x, x0)

    def before(self, i: int) -> None:
        pass


class Interrupted(BaseException):
    """What is no Exception, as KeyboardInterrupt."""


RAISED: tuple[type[BaseException], ...] = (ZeroDivisionError, UserError, RunError, Interrupted)


@dataclass(frozen=True)
class Failing(Euler):
    """Raises one of `RAISED` before a step."""

    which: int = option(0, "index into `RAISED`")
    at: int = option(2, "before which step")

    def before(self, i: int) -> None:
        if i == self.at:
            raise RAISED[self.which]("mine")


CLEANED: list[str] = []


@dataclass(frozen=True)
class Cleaning(Euler):
    """Says when it is closed, and asks for one more D while it is."""

    again: bool = option(False, "whether it asks again")

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        try:
            yield from super().steps(denoise, x, sigmas, noise)
        finally:
            if self.again:
                denoise(x, float(sigmas[0]))
            CLEANED.append("cleaned")


@dataclass(frozen=True)
class Idle(Euler):
    """Yields nothing."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        return iter(())


@dataclass(frozen=True)
class Guiding(Euler):
    """Asks the denoiser for something besides D."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            x0 = denoise.unconditional(x, s).x0
            yield Step(t, x0 + (t / s) * (denoise(x, s) - x0))


@dataclass(frozen=True)
class Parts(Euler):
    """Asks for a part of the batch, and for a part of that part."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        two, last = torch.tensor([0, 2]), torch.tensor([1])
        for s, t in intervals(sigmas):
            x = x.clone()
            part = denoise.rows(two)
            x[two] += (t / s - 1) * (x[two] - part(x[two], s))
            x[2:] += (t / s - 1) * (x[2:] - part.rows(last)(x[2:], s)) / 2
            yield Step(t, x)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_sampler_works_in_the_caller_s_mode_and_without_gradients(
    mode: Any, model: ExactModel, grid: Tensor
) -> None:
    with mode():
        made = stepper(model, grid, Euler())
        last = finish(model, made, made.start(start(model, grid).requires_grad_(mode is torch.enable_grad)))
    assert last.x.is_inference() == (mode is torch.inference_mode)
    assert not last.x.requires_grad
    assert torch.equal(last.x, driven(model, grid, Euler()))


def test_a_part_of_a_part_of_the_batch_is_told_by_its_rows_in_the_batch(model: ExactModel, grid: Tensor) -> None:
    made = stepper(model, grid, Parts())
    state = made.start(start(model, grid))
    rows = []
    while not state.done:
        assert state.rows is not None
        rows.append(state.rows.tolist())
        state = made.send(labelled(model, state))
    assert rows == [[0, 2], [2]] * STEPS
    expected = drive(Parts(), denoiser(model, LABELS, BATCH), start(model, grid), grid, noise(model))
    assert torch.equal(state.x, expected)


# --- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("which", range(len(RAISED)))
def test_what_the_sampler_raises_comes_out_with_its_type(which: int, at: int, model: ExactModel, grid: Tensor) -> None:
    made = stepper(model, grid, Failing(which=which, at=at))
    with pytest.raises(RAISED[which], match=r"^mine$") as error:
        finish(model, made, made.start(start(model, grid)))
    assert type(error.value) is RAISED[which]
    assert error.traceback[-1].name == "before"
    assert threads() == []
    with pytest.raises(UserError, match="sampler Failing does not wait for D"):
        made.send(Prediction(start(model, grid)))


def test_after_an_error_the_stepper_is_freed_at_once(model: ExactModel, grid: Tensor) -> None:
    """Not when the garbage collector comes by: the error and the frame that raised it do not hold each other."""
    gc.collect()
    gc.disable()
    try:
        made = stepper(model, grid, Failing())
        gone = weakref.ref(made)
        with suppress(ZeroDivisionError):
            finish(model, made, made.start(start(model, grid)))
        del made
        assert gone() is None
    finally:
        gc.enable()


def test_a_sampler_that_yields_nothing_is_an_error(model: ExactModel, grid: Tensor) -> None:
    with pytest.raises(RunError, match=r"^sampler Idle yielded no step\.$"):
        stepper(model, grid, Idle()).start(start(model, grid))
    assert threads() == []


def test_what_is_asked_besides_d_is_answered_by_the_denoiser(model: ExactModel, grid: Tensor) -> None:
    made = stepper(model, grid, Guiding())
    last = finish(model, made, made.start(start(model, grid)))
    assert torch.equal(last.x, driven(model, grid, Guiding()))


def test_calls_out_of_turn_are_refused_and_move_nothing(model: ExactModel, grid: Tensor) -> None:
    made, x = stepper(model, grid, "dpm++"), start(model, grid)
    with pytest.raises(
        UserError, match=r"sampler dpm\+\+ does not wait for D: it was not started, or it has finished\."
    ):
        made.send(Prediction(x))
    state = made.start(x)
    with pytest.raises(
        UserError, match=r"the stepper of sampler dpm\+\+ was already started or closed; create a new Stepper"
    ):
        made.start(x)
    with pytest.raises(
        UserError, match=r"D has shape \(2, 1, 2, 2\), but sampler dpm.. requested it for a state of shap"
    ):
        made.send(Prediction(x[:2]))
    last = finish(model, made, state)
    assert torch.equal(last.x, driven(model, grid, "dpm++"))
    with pytest.raises(UserError, match="does not wait for D"):
        made.send(Prediction(x))
    with pytest.raises(UserError, match="was already started"):
        made.start(x)


# --- Ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("way", ["close", "with", "drop"])
def test_a_run_that_is_left_early_is_cleaned_up(way: str, again: bool, model: ExactModel, grid: Tensor) -> None:
    """The sampler's `finally` is executed, even where it asks for D again, and the thread is gone."""
    CLEANED.clear()
    made: Stepper | None = stepper(model, grid, Cleaning(again=again))
    assert made is not None
    if way == "with":
        with made:
            made.send(answer(model, made.start(start(model, grid))))
            assert threads() == ["sampler Cleaning"]
    else:
        made.send(answer(model, made.start(start(model, grid))))
        assert threads() == ["sampler Cleaning"]
    if way == "close":
        made.close()
    if way == "drop":
        made = None
        gc.collect()
    assert threads() == []
    # What comes after a request that nobody answers is not executed.
    assert len(CLEANED) == (0 if again else 1)
    if made is not None:
        made.close()
        with pytest.raises(UserError, match="does not wait for D"):
            made.send(Prediction(start(model, grid)))


def test_one_that_is_closed_before_it_starts_does_not_start(model: ExactModel, grid: Tensor) -> None:
    made = stepper(model, grid, "ddim")
    made.close()
    with pytest.raises(UserError, match="was already started"):
        made.start(start(model, grid))
    assert threads() == []


def test_many_of_them_leave_no_thread_and_no_tensor(model: ExactModel, grid: Tensor) -> None:
    left = []
    for i in range(60):
        x = start(model, grid)
        made = stepper(model, grid, "dpm++")
        state = made.start(x)
        if i % 2:
            state = made.send(answer(model, state))
        left.append(weakref.ref(x))
        del made, state, x
    gc.collect()
    assert threads() == []
    assert all(x() is None for x in left)
