"""`samplerbench check` has teeth: each broken plugin is caught by the check that is meant for it, and no sound one is.

Each broken plugin is one change to a sound twin. `also` names the other checks that its fault may rightly fail.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from samplerbench import cli, registry, testing
from samplerbench.errors import UserError
from samplerbench.options import Configurable
from samplerbench.sampling import (
    Denoiser,
    Guidance,
    Noise,
    Prediction,
    Sampler,
    Sigma,
    Spacing,
    Step,
    intervals,
    option,
)
from samplerbench.testing.checks import CheckFailedError, Result, checks_for, run_check, run_checks


def failures(plugin: Configurable) -> dict[str, str]:
    """The checks that fail, with what they say."""
    return {r.name: r.figure for r in run_checks(plugin) if r.passed is False}


def assert_caught(plugin: Configurable, by: str, says: str, also: set[str]) -> None:
    found = failures(plugin)
    assert by in found, f"{by} lets it pass; these fail: {found}"
    assert says in found[by]
    assert found.keys() <= {by} | also, found


# --- Samplers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sound(Sampler):
    """DDIM written by hand (Song et al. 2021, eq. 12): the sound twin of the broken ones below."""

    eta: float = option(0.0, "0 is deterministic, 1 is ancestral", ge=0.0, le=1.0)

    def convergence(self) -> int | None:
        return 1 if self.eta == 0 else None

    def advance(self, x: Tensor, x0: Tensor, s: float, t: float, noise: Noise) -> Tensor:
        u = self.eta * t * math.sqrt(1 - (t / s) ** 2)
        x = x0 + (math.sqrt(t**2 - u**2) / s) * (x - x0)
        return x + u * noise() if u > 0 else x

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            x = self.advance(x, x0, s, t, noise)
            yield Step(t, x, x0)


@dataclass(frozen=True)
class SoundMultistep(Sampler):
    """DPM-Solver++ 2M written by hand (Lu et al. 2022b, algorithm 2): the sound twin of those with a history."""

    def convergence(self) -> int:
        return 2

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        before = None
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            blend = x0
            if before is not None and t > 0:
                blend = x0 + math.log(s / t) / (2 * math.log(before[0] / s)) * (x0 - before[1])
            before = (s, x0)
            x = (t / s) * x + (1 - t / s) * blend
            yield Step(t, x, x0)


class WrongOrder(Sound):
    """Says it is of order 2 and is Euler's method (Nobody 2022)."""

    def convergence(self) -> int:
        return 2


class WrongWeight(SoundMultistep):
    """2M with a third where a half belongs (Nobody 2022)."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        before = None
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            blend = x0 if before is None or t == 0 else x0 + (x0 - before) / 3
            before = x0
            x = (t / s) * x + (1 - t / s) * blend
            yield Step(t, x, x0)


class NoiseInTheLastStep(Sound):
    """Adds √(1-ᾱ) z after the last step too, as a published scheduler does (Nobody 2022)."""

    def advance(self, x: Tensor, x0: Tensor, s: float, t: float, noise: Noise) -> Tensor:
        return super().advance(x, x0, s, t, noise) + (s / math.sqrt(1 + s**2) * noise() if t == 0 else 0)


class EtaSquared(Sound):
    """Makes room for η noise and adds η² (Nobody 2022)."""

    def advance(self, x: Tensor, x0: Tensor, s: float, t: float, noise: Noise) -> Tensor:
        u = self.eta * t * math.sqrt(1 - (t / s) ** 2)
        return x0 + (math.sqrt(t**2 - u**2) / s) * (x - x0) + (self.eta * u * noise() if u > 0 else 0)


class NoRoomForNoise(Sound):
    """Adds the noise and keeps the deterministic mean (Nobody 2022)."""

    def advance(self, x: Tensor, x0: Tensor, s: float, t: float, noise: Noise) -> Tensor:
        u = self.eta * t * math.sqrt(1 - (t / s) ** 2)
        return x0 + (t / s) * (x - x0) + (u * noise() if u > 0 else 0)


class GlobalRandn(Sound):
    """Draws from torch's global generator (Nobody 2022)."""

    def advance(self, x: Tensor, x0: Tensor, s: float, t: float, noise: Noise) -> Tensor:
        return super().advance(x, x0, s, t, lambda: torch.randn(x.shape, dtype=x.dtype))  # type: ignore[arg-type]


class OwnGenerator(Sound):
    """Draws from a generator of its own, seeded by the clock (Nobody 2022)."""

    def advance(self, x: Tensor, x0: Tensor, s: float, t: float, noise: Noise) -> Tensor:
        generator = torch.Generator()
        generator.seed()
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return super().advance(x, x0, s, t, lambda: z)  # type: ignore[arg-type]


class OneSeedForAll(Sound):
    """Draws from a generator of its own with a fixed seed, for the whole batch at once (Nobody 2022)."""

    def advance(self, x: Tensor, x0: Tensor, s: float, t: float, noise: Noise) -> Tensor:
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(int(1e3 * t)), dtype=x.dtype)
        return super().advance(x, x0, s, t, lambda: z)  # type: ignore[arg-type]


class StateInTheClass(SoundMultistep):
    """Keeps its history in the class (Nobody 2022)."""

    before: ClassVar[list[Any]] = []

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            blend = x0
            if self.before and self.before[0] > s and t > 0 and self.before[1].shape == x0.shape:
                blend = x0 + math.log(s / t) / (2 * math.log(self.before[0] / s)) * (x0 - self.before[1])
            self.before[:] = [s, x0]
            x = (t / s) * x + (1 - t / s) * blend
            yield Step(t, x, x0)


class StateInSelf(Sound):
    """Counts its steps in an attribute, past the freezing (Nobody 2022)."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for step in super().steps(denoise, x, sigmas, noise):
            object.__setattr__(self, "taken", getattr(self, "taken", 0) + 1)
            yield step


class OneMoreEvaluation(Sound):
    """Evaluates once more at the end, and does not say so (Nobody 2022)."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for step in super().steps(denoise, x, sigmas, noise):
            if step.sigma == 0:
                denoise(step.x, float(sigmas[-2]))
            yield step


class BatchNorm(Sound):
    """Scales the update by a norm over the whole batch (Nobody 2022)."""

    def advance(self, x: Tensor, x0: Tensor, s: float, t: float, noise: Noise) -> Tensor:
        change = super().advance(x, x0, s, t, noise) - x
        return x + change * (1 + 1e-3 * (t / s) * change.norm() / (1 + change.norm()))


class NextLevel(Sound):
    """Asks the network at the level it is going to (Nobody 2022)."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            x0 = denoise(x, t or s)
            x = self.advance(x, x0, s, t, noise)
            yield Step(t, x, x0)


class LateLevel(Sound):
    """Asks the network at the right level first and one level late from then on (Nobody 2022)."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        asked = float(sigmas[0])
        for s, t in intervals(sigmas):
            x0 = denoise(x, asked)
            asked = s
            x = self.advance(x, x0, s, t, noise)
            yield Step(t, x, x0)


class WritesWhatItYielded(Sound):
    """Updates the state in place (Nobody 2022)."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        x = x.clone()
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            x.copy_(self.advance(x, x0, s, t, noise))
            yield Step(t, x, x0)


class WritesItsStart(Sound):
    """Scales the state it was given in place, and back (Nobody 2022)."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        yield from super().steps(denoise, x.mul_(1.0 + 1e-12), sigmas, noise)


class Doubles(Sound):
    """Returns float64 whatever it was given (Nobody 2022)."""

    def advance(self, x: Tensor, x0: Tensor, s: float, t: float, noise: Noise) -> Tensor:
        return super().advance(x, x0, s, t, noise).double()


class Halves(Sound):
    """Goes through half precision in the middle (Nobody 2022)."""

    def advance(self, x: Tensor, x0: Tensor, s: float, t: float, noise: Noise) -> Tensor:
        change = super().advance(x, x0, s, t, noise) - x
        return x + (change.half().to(x.dtype) if x.dtype == torch.float32 else change)


class PastTheGuidance(Sound):
    """Asks for the unconditional model, which a guided denoiser has not (Nobody 2022)."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            x0 = denoise.unconditional(x, s).x0
            x = self.advance(x, x0, s, t, noise)
            yield Step(t, x, x0)


class NeedsTwoSteps(Sound):
    """Divides by the number of steps less one (Nobody 2022)."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        assert 1 / (len(sigmas) - 2)
        yield from super().steps(denoise, x, sigmas, noise)


class NeedsFewSteps(Sound):
    """Keeps a table of 500 steps (Nobody 2022)."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        table = [0.0] * 500
        for i, step in enumerate(super().steps(denoise, x, sigmas, noise)):
            table[i if len(sigmas) == len(denoise.levels) + 1 else 0] = 1.0
            yield step


@dataclass(frozen=True)
class Unbounded(Sound):
    """A number without a bound (Nobody 2022)."""

    scale: float = option(1.0, "any number at all")


@dataclass(frozen=True)
class Unexplained(Sound):
    """A parameter without help (Nobody 2022)."""

    scale: float = option(1.0, "", ge=0.0)


class Sourceless(Sound):
    """A method that names no paper and no year."""


class Silent(Sound):
    __doc__ = None


def local() -> Sampler:
    class Local(Sound):
        """Defined where pickle cannot find it (Nobody 2022)."""

    return Local()


@dataclass(frozen=True)
class EvenStepsForGranted(SoundMultistep):
    """2M with the half that belongs to even steps, whatever the steps are (Nobody 2022)."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        before = None
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            blend = x0 if before is None or t == 0 else x0 + (x0 - before) / 2
            before = x0
            x = (t / s) * x + (1 - t / s) * blend
            yield Step(t, x, x0)


class SaysEvenStepsOnly(EvenStepsForGranted):
    """2M for even steps, which says so (Nobody 2022)."""

    uniform_steps_only = True


class ThirdOrderFromAnyStart(Sound):
    """DPM-Solver++ 3M, whose first steps are of lower order, which it forgets to say (Nobody 2022)."""

    def convergence(self) -> int:
        return 3

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        yield from registry.parse("sampler", "dpm++:order=3").steps(denoise, x, sigmas, noise)


class SaysWhereItStarts(ThirdOrderFromAnyStart):
    """The same method, which says that its order is 2 from a small start (Nobody 2022)."""

    def convergence_from_any_start(self) -> int:
        return 2


# Noise that is not ours looks deterministic to the checks, and changes with the seed, the split and the dtype.
NOISY = {"same-seed", "batch-split", "random-state", "dtype", "guided", "no-state", "levels", "order"}
ORDERS = {"order", "order-start", "order-from-infinity", "order-uneven"}
BROKEN_SAMPLERS: list[tuple[Callable[[], Sampler], str, str, set[str]]] = [
    (WrongOrder, "order", "it claims 2", ORDERS),
    (WrongWeight, "order", "it claims 2", ORDERS),
    (EvenStepsForGranted, "order-uneven", "on alternating steps the order on the mixture is 0.9", set()),
    (ThirdOrderFromAnyStart, "order-start", "it claims 3 from any start", set()),
    (NoiseInTheLastStep, "terminal", "noise is left", set()),
    (lambda: EtaSquared(0.5), "moments", "variance", set()),
    (lambda: NoRoomForNoise(0.5), "moments", "variance", set()),
    (lambda: GlobalRandn(1.0), "random-state", "torch's global generator", NOISY),
    (lambda: OwnGenerator(1.0), "same-seed", "two runs with one seed differ", NOISY),
    (lambda: OneSeedForAll(1.0), "batch-split", "with the batch it is in", NOISY),
    (StateInTheClass, "no-state", "interleaved with another run", {"order", "batch-split", "same-seed", "guided"}),
    (StateInSelf, "no-state", "its attributes changed", set()),
    (OneMoreEvaluation, "nfe", "2 evaluations an image; nfe(1) says 1", set()),
    (BatchNorm, "batch-split", "with the batch it is in", {"order", "levels", "terminal"}),
    (NextLevel, "levels", "the first evaluation is at", {"order"}),
    (LateLevel, "levels", "off the state's own", {"order", "terminal"}),
    (WritesWhatItYielded, "no-writes", "tensors changed", {"no-state"}),
    (WritesItsStart, "no-writes", "1 tensors changed", {"no-state"}),
    (Doubles, "dtype", "yielded a state of float64 on cpu in step 1", set()),
    (Halves, "dtype", "float32 and float64 differ", set()),
    (PastTheGuidance, "guided", "", {"levels"}),
    (NeedsTwoSteps, "one-step", "ZeroDivisionError", {"nfe", "terminal"}),
    (NeedsFewSteps, "all-timesteps", "IndexError", set()),
    (local, "picklable", "Local", set()),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "by", "says", "also"), BROKEN_SAMPLERS, ids=[type(make()).__name__ for make, *_ in BROKEN_SAMPLERS]
)
def test_a_broken_sampler_is_caught_by_the_check_meant_for_it(
    make: Callable[[], Sampler], by: str, says: str, also: set[str]
) -> None:
    # What breaks the order breaks it from every start and on every grid.
    assert_caught(make(), by, says, also | ORDERS if "order" in also else also)


@pytest.mark.parametrize(
    ("sampler", "says"),
    [
        (Unbounded(), "scale is a number without a bound"),
        (Unexplained(), "scale has no help"),
        (Sourceless(), "names no source"),
        (Silent(), "no docstring"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_sampler_that_says_too_little_is_caught(sampler: Sampler, says: str) -> None:
    (check,) = [c for c in checks_for(sampler) if c.name == "documented"]
    with pytest.raises(CheckFailedError, match=says):
        check()


@pytest.mark.parametrize(
    "sampler",
    [
        Sound(),
        *(
            pytest.param(s, marks=pytest.mark.slow)
            for s in (Sound(0.5), SoundMultistep(), SaysEvenStepsOnly(), SaysWhereItStarts())
        ),
    ],
    ids=lambda s: s.spec,
)
def test_the_sound_twins_pass(sampler: Sampler) -> None:
    assert failures(sampler) == {}


# --- Guidances ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoundGuidance(Guidance):
    """Classifier-free guidance written by hand (Ho & Salimans 2022): the sound twin of the broken ones below."""

    needs: ClassVar[frozenset[str]] = frozenset({"labels", "null"})

    scale: float = option(3.0, "1 is the conditional model", ge=0.0)

    @property
    def evaluations(self) -> int:
        return 2

    def combine(self, free: Tensor, given: Tensor) -> Tensor:
        return free + self.scale * (given - free)

    def predict(self, denoise: Denoiser, x: Tensor, sigma: Sigma) -> Prediction:
        free, given = denoise.both(x, sigma)
        return Prediction(self.combine(free.x0, given.x0))


class ScaleOffByOne(SoundGuidance):
    """Takes the scale for the paper's w, so 1 is not the conditional model (Nobody 2022)."""

    def combine(self, free: Tensor, given: Tensor) -> Tensor:
        return free + (self.scale + 1) * (given - free)


class BatchMean(SoundGuidance):
    """Shrinks the step where the batch's mean step is large (Nobody 2022)."""

    def combine(self, free: Tensor, given: Tensor) -> Tensor:
        return given + (self.scale - 1) * (given - free) / (1 + (given - free).abs().mean())


class GlobalNoise(SoundGuidance):
    """Adds a little noise from torch's global generator (Nobody 2022)."""

    def combine(self, free: Tensor, given: Tensor) -> Tensor:
        return super().combine(free, given) + 0 * torch.randn_like(free)


class LeavesAGradient(SoundGuidance):
    """Differentiates and does not let go (Nobody 2022)."""

    def predict(self, denoise: Denoiser, x: Tensor, sigma: Sigma) -> Prediction:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            return super().predict(denoise, leaf, sigma)


class WritesTheState(SoundGuidance):
    """Clamps the state in place (Nobody 2022)."""

    def predict(self, denoise: Denoiser, x: Tensor, sigma: Sigma) -> Prediction:
        return super().predict(denoise, x.clamp_(-1e3, 1e3).mul_(1.0 + 1e-15), sigma)


class SteersAway(SoundGuidance):
    """Right at scale 1, and with the wrong sign beyond (Nobody 2022)."""

    def combine(self, free: Tensor, given: Tensor) -> Tensor:
        return given - (self.scale - 1) * (given - free)


class SaysOneEvaluation(SoundGuidance):
    """Asks twice and says once (Nobody 2022)."""

    evaluations = 1  # type: ignore[assignment]


class DoublesToo(SoundGuidance):
    """Returns float64 whatever it was given (Nobody 2022)."""

    def combine(self, free: Tensor, given: Tensor) -> Tensor:
        return super().combine(free, given).double()


class SourcelessGuidance(SoundGuidance):
    """A guidance that names no paper and no year."""


BROKEN_GUIDANCES: list[tuple[Guidance, str, str, set[str]]] = [
    (ScaleOffByOne(), "scale-one", "scale 1 differs from the conditional model", set()),
    (BatchMean(), "batch-split", "with the batch it is in", set()),
    (GlobalNoise(), "random-state", "torch's global generator", set()),
    (LeavesAGradient(), "no-writes", "a gradient is left behind", set()),
    (WritesTheState(), "no-writes", "the state was written into", set()),
    (SteersAway(), "steers", "log p(label) of the denoised images falls", set()),
    (SaysOneEvaluation(), "evaluations", "2 evaluations counted; it says 1", set()),
    (DoublesToo(), "dtype", "a float32 state became torch.float64", set()),
    (SourcelessGuidance(), "documented", "names no source", set()),
]


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")
@pytest.mark.parametrize(
    ("guidance", "by", "says", "also"), BROKEN_GUIDANCES, ids=[type(g).__name__ for g, *_ in BROKEN_GUIDANCES]
)
def test_a_broken_guidance_is_caught_by_the_check_meant_for_it(
    guidance: Guidance, by: str, says: str, also: set[str]
) -> None:
    assert_caught(guidance, by, says, also)


def test_the_sound_guidance_passes() -> None:
    assert failures(SoundGuidance()) == {}


# --- Spacings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoundSpacing(Spacing):
    """Even in log σ, written by hand: the sound twin of the broken ones below."""

    def shares(self, steps: int) -> Tensor:
        return torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        grid = levels[-1] * (levels[0] / levels[-1]) ** self.shares(steps)
        return torch.cat([grid, levels.new_zeros(1)])


class NeverZero(SoundSpacing):
    """Ends at the smallest level instead of 0."""

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        return super().grid(levels, steps + 1)[:-1]


class Single(SoundSpacing):
    """Computes in float32."""

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        return super().grid(levels, steps).float()


class OneLevelShort(SoundSpacing):
    """Gives N levels for N steps."""

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        return super().grid(levels, steps)[1:]


class Rising(SoundSpacing):
    """Goes from the smallest level to the largest."""

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        grid = super().grid(levels, steps)
        return torch.cat([grid[:-1].flip(0), grid[-1:]])


class NoSingleStep(SoundSpacing):
    """Divides by N - 1."""

    def shares(self, steps: int) -> Tensor:
        return torch.tensor([i / (steps - 1) for i in range(steps)], dtype=torch.float64)


class Jittered(SoundSpacing):
    """Moves every level at random a little."""

    def shares(self, steps: int) -> Tensor:
        return super().shares(steps) * (1 - 1e-6 * torch.rand((), dtype=torch.float64))


class JitteredApart(SoundSpacing):
    """Moves every level at random a little, by a generator of its own."""

    def shares(self, steps: int) -> Tensor:
        generator = torch.Generator()
        generator.seed()
        return super().shares(steps) * (1 - 1e-6 * torch.rand((), generator=generator, dtype=torch.float64))


class BeyondTheModel(SoundSpacing):
    """Starts above the model's largest level."""

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        return super().grid(levels, steps) * 1.5


class BelowTheModel(SoundSpacing):
    """Ends below the model's smallest level."""

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        return super().grid(levels, steps) * 0.5


class OutOfItsList(SoundSpacing):
    """Runs out of timesteps with an error of its own."""

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        return torch.tensor([*[levels.tolist()[-1 - i] for i in range(steps)], 0.0], dtype=torch.float64)


BROKEN_SPACINGS: list[tuple[Spacing, str, str, set[str]]] = [
    (NeverZero(), "grid", "decreasing noise levels followed by 0", {"range"}),
    (Single(), "grid", "float32, not float64", {"range"}),
    (OneLevelShort(), "grid", "1 steps give 1 levels, not 2", {"range"}),
    (Rising(), "grid", "decreasing noise levels followed by 0", {"range"}),
    (NoSingleStep(), "grid", "ZeroDivisionError", set()),
    (Jittered(), "random-state", "torch's global generator", set()),
    (JitteredApart(), "random-state", "two calls give two grids", set()),
    (BeyondTheModel(), "range", "the model's largest is", set()),
    (BelowTheModel(), "range", "the model's smallest is", set()),
    (OutOfItsList(), "too-many", "IndexError", set()),
]


@pytest.mark.parametrize(
    ("spacing", "by", "says", "also"), BROKEN_SPACINGS, ids=[type(s).__name__ for s, *_ in BROKEN_SPACINGS]
)
def test_a_broken_spacing_is_caught_by_the_check_meant_for_it(
    spacing: Spacing, by: str, says: str, also: set[str]
) -> None:
    assert_caught(spacing, by, says, also)


def test_the_sound_spacing_passes() -> None:
    assert failures(SoundSpacing()) == {}


# --- What is built in -----------------------------------------------------------------------------------------------

KINDS = ("sampler", "guidance", "spacing")
WITH_PARAMETERS = {
    "autoguidance": "autoguidance/exact:problem=mixture,shape=1x2x2,width=0.9",
    "repaint": "repaint:jump_length=2,resamplings=2",
}
"""What has no defaults, or makes ten times as many evaluations with them."""
NAMES = [(kind, e.name) for kind in KINDS for e in registry.entries(kind) if e.distribution == registry.OWN]
BUILT_IN = [(kind, WITH_PARAMETERS.get(name, name)) for kind, name in NAMES]
VARIANTS = [
    *("ddim:eta=1", "ddpm:variance=large", "heun:S_churn=10", "pf-ode:solver=rk45", "dpm-solver:order=3"),
    *("dpm++:order=3", "dpm++:method=singlestep", "dpm++:sde=true", "unipc:variant=B1", "deis:variable=sigma"),
    *("deis:variable=log-sigma", "pc:predictor=ancestral", "pc:predictor=probability-flow", "analytic-dpm:form=ddim"),
    *("restart:K=0", "res:method=singlestep", "er-sde:phi=ode", "er-sde:phi=ode,derivatives=exact", "sa-solver:tau=0"),
    *("dpm++:sde=true,order=3", "dpm++:method=singlestep,sde=true", "dpm++:method=singlestep,ancestral=true"),
    *("diffusers/DPMSolverMultistepScheduler:timestep_spacing=trailing", "ddrm:eta=0"),
]
OTHER_VARIANTS = [
    *(("guidance", s) for s in ("cfg:scale=1", "cfg:scale=7.5", "classifier:scale=4", "classifier:conditional=true")),
    *(("guidance", s) for s in ("mmps:iterations=3", "pigdm:variance=0.2", "pigdm:adaptive=true")),
    *(("spacing", s) for s in ("list:levels=80;20;5;1;0.1", "karras:rho=3", "exponential:rho=2")),
]


QUICK = ("ddim", "dpm++")
"""The samplers that are checked in the README's command; CI checks the others besides, some seconds each."""
LEARNED = ("dmn", "gits", "gap-optimal")
"""The spacings that are learned, which takes some seconds each."""


def _slow(kind: str, spec: str) -> bool:
    return spec in LEARNED if kind == "spacing" else kind == "sampler" and spec not in QUICK


CHECKED = [*BUILT_IN, *(("sampler", v) for v in VARIANTS), *OTHER_VARIANTS]


@pytest.mark.filterwarnings("ignore::Warning:diffusers")
@pytest.mark.parametrize(
    ("kind", "spec"),
    [pytest.param(kind, spec, marks=[pytest.mark.slow] if _slow(kind, spec) else []) for kind, spec in CHECKED],
)
def test_what_is_built_in_passes(kind: str, spec: str) -> None:
    plugin = registry.parse(kind, spec)
    assert failures(plugin) == {}


def test_all_that_is_built_in_is_checked() -> None:
    assert {"ddpm", "ddim", "pc", "analytic-dpm", "diffusers", "cfg", "classifier", "karras", "list"} <= {
        name for _, name in BUILT_IN
    }


@pytest.mark.filterwarnings("ignore::Warning:diffusers")
def test_a_repeated_timestep_of_diffusers_is_caught() -> None:
    """Its default spacing asks for timestep 500 twice at 1,000 steps, and divides by the difference."""
    found = failures(registry.parse("sampler", "diffusers/DPMSolverMultistepScheduler"))
    assert found.keys() == {"all-timesteps"}
    assert "not finite after step 501 " in found["all-timesteps"]


def test_what_does_not_apply_says_why() -> None:
    def told(spec: str, name: str) -> tuple[bool | None, str]:
        (check,) = [c for c in checks_for(registry.parse("sampler", spec)) if c.name == name]
        result = run_check(check)
        return result.passed, result.figure

    assert told("ddim:eta=1", "order") == (None, "stochastic: see moments")
    assert told("ddim", "moments") == (None, "deterministic: see order")
    assert told("ddim", "order") == (True, "gaussian 1.00 ± 0.00, mixture 1.00 ± 0.00 (claims 1)")


# --- In a plugin's own tests ----------------------------------------------------------------------------------------


@testing.parametrize_with_checks(["karras", SoundSpacing()], kind="spacing")
def test_the_checks_as_a_parametrisation(check: Callable[[], str]) -> None:
    assert check()


def test_a_parametrisation_has_one_named_case_per_check() -> None:
    mark = testing.parametrize_with_checks(["ddim:eta=0.5", "dpm++"])
    name, cases = mark.args
    assert name == "check"
    assert len(cases) == 2 * len(checks_for(Sound())) == len(set(mark.kwargs["ids"]))
    assert {"ddim:eta=0.5-order", "dpm++-order", "dpm++-batch-split"} <= set(mark.kwargs["ids"])
    by_id = dict(zip(mark.kwargs["ids"], cases, strict=True))
    with pytest.raises(pytest.skip.Exception, match="stochastic: see moments"):
        by_id["ddim:eta=0.5-order"]()


def test_a_failed_case_raises_with_its_figure() -> None:
    mark = testing.parametrize_with_checks([WrongOrder()])
    case = mark.args[1][mark.kwargs["ids"].index("WrongOrder-order")]
    with pytest.raises(CheckFailedError, match=r"the order on the gaussian is 1\.00 ± 0\.00; it claims 2"):
        case()


def test_check_functions_return_results_or_raise_all_failures() -> None:
    results = testing.check_spacing("karras")
    assert all(isinstance(r, Result) and r.passed for r in results)
    assert [r.name for r in testing.check_guidance("cfg")] == [c.name for c in checks_for(SoundGuidance())]
    with pytest.raises(CheckFailedError, match=r"NeverZero fails 2 of 6 checks: grid: .*; range: "):
        testing.check_spacing(NeverZero())
    with pytest.raises(
        CheckFailedError,
        match=r"WrongOrder fails 4 of 21 checks: order: .*; order-start: .*; "
        r"order-from-infinity: .*; order-uneven: ",
    ):
        testing.check_sampler(WrongOrder())
    with pytest.raises(CheckFailedError, match="SaysOneEvaluation fails 1 of 13 checks: evaluations: "):
        testing.check_guidance(SaysOneEvaluation())


def test_there_are_no_checks_for_other_kinds() -> None:
    with pytest.raises(UserError, match="a data set has no checks; the kinds with checks are sampler, guidance, "):
        checks_for(registry.parse("data set", "digits"))


def test_what_a_plugin_raises_is_a_failed_check() -> None:
    check = dataclasses.replace(checks_for(Sound())[0], function=lambda _: 1 / 0)  # type: ignore[arg-type,return-value]
    result = run_check(check)
    assert (result.passed, result.figure) == (False, "raised ZeroDivisionError: division by zero")


# --- The command ----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


class Toy(WrongOrder):
    """Says it is of order 2 and is Euler's method (Nobody 2022); this one has a registered name."""


class ToySpacing(SoundSpacing):
    """Even in log σ; this one has a registered name."""


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third party's distribution with the sampler `broken-toy` and the spacing `sound-toy`."""
    meta = tmp_path / "toys-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text(
        f"[samplerbench.samplers]\nbroken-toy = {__name__}:Toy\n"
        f"[samplerbench.spacings]\nsound-toy = {__name__}:ToySpacing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_check_prints_what_it_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("check", "dpm++:order=3", "cfg:scale=3", "karras") == 0
    out = capsys.readouterr().out
    assert [line.strip() for line in out.splitlines() if line.startswith(KINDS)] == [
        "sampler dpm++:order=3", "guidance cfg:scale=3", "spacing karras",
    ]  # fmt: skip
    assert "gaussian 3.05 ± 0.08" in out
    assert "1→1, 2→2, 5→5, 9→9" in out
    assert "2 per prediction" in out
    assert "FAILED" not in out


@pytest.mark.usefixtures("toys")
def test_a_failed_check_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("check", "broken-toy", "sound-toy") == 1
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "FAILED" in line]
    assert [line.split()[1] for line in lines] == ["order", "order-start", "order-from-infinity", "order-uneven"]
    assert "it claims 2" in " ".join(out.split())
    assert out.rstrip().endswith("4 failed")


@pytest.mark.usefixtures("toys")
def test_json_is_all_that_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    assert command("check", "sound-toy", "broken-toy", "--json") == 1
    captured = capfd.readouterr()
    told = json.loads(captured.out)
    assert [(r["kind"], r["spec"]) for r in told] == [("spacing", "sound-toy")] * 6 + [("sampler", "broken-toy")] * 21
    assert {r["check"]: r["passed"] for r in told[6:]}["order"] is False
    assert {r["check"]: r["passed"] for r in told[6:]}["moments"] is None
    assert all(r.keys() == {"kind", "spec", "check", "passed", "figure", "asserts"} for r in told)
    assert all(r["figure"] and r["asserts"].endswith(".") for r in told)


@pytest.mark.filterwarnings("ignore::Warning:diffusers")
def test_nothing_but_the_table_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """diffusers' own notices, of which this scheduler has many, stay away."""
    assert command("check", "diffusers/DPMSolverSinglestepScheduler") == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("sampler diffusers/DPMSolverSinglestepScheduler")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (
            "ddmi",
            'no sampler, guidance, spacing, generator, task, metric or model is called "ddmi". Did you mean "ddim"?',
        ),
        ("kerras", 'Did you mean "karras"?'),
        ("ddim:eta=2", "eta=2: it must be at most 1"),
        ("cfg:size=2", 'guidance cfg has no parameter "size"'),
        ("", 'is called ""'),
    ],
)
def test_a_bad_spec_is_one_line_and_exit_code_2(spec: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("check", spec) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
    assert captured.err.count("\n") == 1
