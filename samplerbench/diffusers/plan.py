"""Where a sampler asks for D on a grid. It is run on a few random numbers to find out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.models.discrete import timestep_at
from samplerbench.sampling import VARIANCE_PRESERVING, Denoiser, Noise, Prediction, PredictionType, Sampler, Sigma, Step


def refuse(sampler: Sampler, why: str) -> NoReturn:
    """Raise UserError: the sampler cannot be a scheduler."""
    raise UserError(f"sampler {sampler.label()} cannot be a diffusers scheduler: {why}.")


@dataclass(frozen=True)
class Subject:
    """A sampler, and what a scheduler knows of the model.

    Attributes:
        sampler: which method.
        levels: (T,) float64, the model's noise levels.
        learned: whether the network learned a variance.
        prediction: what the network predicts.
    """

    sampler: Sampler
    levels: Tensor
    learned: bool
    prediction: PredictionType = "epsilon"

    def refuse(self, why: str) -> NoReturn:
        """Raise UserError: the sampler cannot be a scheduler."""
        refuse(self.sampler, why)

    def check(self) -> Plan:
        """A plan for ten levels. Raises UserError for a sampler that cannot be a scheduler on any grid."""
        if type(self.sampler).bind is not Sampler.bind or getattr(self.sampler, "needs", None):
            self.refuse("it needs more of the model than D, and a scheduler sees only the network's output")
        if self.sampler.nfe(1) is None:
            self.refuse("it chooses its levels from the image, and a pipeline wants all timesteps before it begins")
        index = torch.linspace(len(self.levels) - 1, 0, 10).round().long().unique().flip(0)
        return self.plan(torch.cat([self.levels[index], self.levels.new_zeros(1)]))

    def plan(self, sigmas: Tensor) -> Plan:
        """Where the sampler asks for D on this grid: the same on two different inputs, or it is refused."""
        first, second = (_Rehearsal(self, sigmas, scale) for scale in (1.0, 0.3))
        for rehearsal in (first, second):
            for _ in rehearsal.walk():
                pass
        if not first.steps:
            self.refuse("it yielded no step")
        if not first.asked:
            self.refuse("it never asks the network")
        if first.asked != second.asked:
            self.refuse("the levels at which it asks for D depend on the image")
        if first.moved:
            self.refuse("it changes the state before it first asks for D, and a pipeline asks the network first")
        return Plan(self, sigmas, first.asked, first.entries, first.costs())


@dataclass(frozen=True)
class Plan:
    """A grid, and where the sampler asks for D on it.

    Attributes:
        subject: whose plan it is.
        sigmas: (N+1,) float64, the grid.
        asked: the level of each evaluation: an entry of `timesteps`.
        entries: for each evaluation, the interval of the grid that begins with it at the state that the last interval
            ended with; None for the others.
        costs: the evaluations of each interval.
    """

    subject: Subject
    sigmas: Tensor
    asked: list[float]
    entries: list[int | None]
    costs: list[int]

    @property
    def order(self) -> int:
        """Evaluations per step, which the last one may deviate from; 1 where they differ."""
        return self.costs[0] if len(set(self.costs[:-1] or self.costs)) == 1 else 1

    @cached_property
    def timesteps(self) -> Tensor:
        """The timestep of each evaluation: int64 where all are the model's own, else float32."""
        levels = self.subject.levels.tolist()
        times = [timestep_at(levels, sigma) for sigma in self.asked]
        return torch.tensor(times, dtype=torch.int64 if all(t.is_integer() for t in times) else torch.float32)

    @cached_property
    def times(self) -> list[float]:
        """`timesteps` as numbers."""
        return self.timesteps.tolist()

    def first(self, timestep: Any, announced: int | None) -> int:
        """The entry that a run begins with, which must be one where an interval of the grid begins.

        Args:
            timestep: what the pipeline begins with.
            announced: the entry that it said it would begin with, if it did.

        Raises:
            UserError: no interval begins there, or the rest of the run is not a run of its own.
        """
        if announced is not None:
            index = announced
        else:
            value = float(timestep)
            found = [k for k, t in enumerate(self.times) if t == value]
            index = next((k for k in found if self.entries[k] is not None), found[0] if found else 0)
        if not 0 <= index < len(self.times) or (index and self.entries[index] is None):
            raise UserError(
                f"sampler {self.subject.sampler.label()} cannot begin at entry {index} of {len(self.times)} timesteps: "
                f"no interval of its grid begins there. It has {self.order} a step."
            )
        if index:
            tail = self.subject.plan(self.sigmas[self.entries[index] :])
            if tail.asked != self.asked[index:]:
                self.subject.refuse("it asks at other levels where it begins further down")
        return index

    @cached_property
    def remembers(self) -> bool:
        """Whether a step depends on more than the state it starts from: found by starting anew at every step."""
        whole = _Rehearsal(self.subject, self.sigmas, 1.0)
        states = [(whole.x, 0)] + [(step.x, whole.noise.draws) for step in whole.walk()]
        n = len(self.sigmas) - 1
        return len(states) != n + 1 or not all(
            torch.allclose(self._one_step(i, *states[i]), states[i + 1][0], rtol=1e-9, atol=1e-12) for i in range(1, n)
        )

    def _one_step(self, i: int, x: Tensor, draws: int) -> Tensor:
        alone = _Rehearsal(self.subject, self.sigmas[i:], 1.0)
        alone.x, alone.noise.draws = x, draws
        return next(alone.walk()).x


_OF_A_MODEL = (
    *("conditional", "unconditional", "both", "pullback", "inputs"),
    *("classifier_score", "denoised_score", "posterior_variance", "scale_latents"),
)
"""What a model's denoiser has besides D, or had in version 0.1."""


class Bare(Denoiser):
    """A denoiser that gives D for the whole batch at one level, and nothing else; D itself comes from elsewhere."""

    process = VARIANCE_PRESERVING

    def __init__(self, subject: Subject) -> None:
        self.subject, self.levels, self.prediction = subject, subject.levels, subject.prediction

    def level(self, sigma: Sigma) -> float:
        """The level as a number. Raises UserError where there is one for each image."""
        if isinstance(sigma, Tensor) and sigma.ndim:
            self.subject.refuse(
                "it asks for D at another level for each image, and a pipeline has one timestep for all"
            )
        return float(sigma)

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        raise NotImplementedError

    def rows(self, index: Tensor) -> Denoiser:
        self.subject.refuse("it steps each image alone, and a pipeline evaluates the whole batch")

    def __getattr__(self, name: str) -> Any:
        """Refuse a sampler that uses what only a model has."""
        if name in _OF_A_MODEL:
            self.subject.refuse("it needs more of the model than D, and a scheduler sees only the network's output")
        raise AttributeError(name)


class _Rehearsal(Bare):
    """A run on two small random states in float64, with a function in the place of D."""

    def __init__(self, subject: Subject, sigmas: Tensor, scale: float) -> None:
        super().__init__(subject)
        self.sigmas = sigmas
        z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.x = z * scale * math.sqrt(1 + float(sigmas[0]) ** 2)
        self.noise = _Dice(z)
        self.steps = 0
        self.asked: list[float] = []
        self.entries: list[int | None] = []
        self.moved = False
        self._at: list[int] = []

    def walk(self) -> Iterator[Step]:
        """The sampler's steps."""
        self.here = self.x
        run = self.subject.sampler.steps(self, self.x, self.sigmas, self.noise)
        while True:
            with torch.no_grad():
                step = next(run, None)
            if step is None:
                return
            self.steps += 1
            self.here = step.x
            yield step

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        level = self.level(sigma)
        i, scaled = self.steps, x * (1 + level**2) ** -0.5
        if not self.asked:
            start = self.x * (1 + float(self.sigmas[0]) ** 2) ** -0.5
            # Not exactly: a sampler with a grid of its own comes there by another way.
            self.moved = not torch.allclose(scaled, start, rtol=1e-5, atol=1e-5)
        first = not self._at or self._at[-1] < i
        begins = first and i < len(self.sigmas) - 1 and level == float(self.sigmas[i]) and torch.equal(x, self.here)
        self.asked.append(level)
        self.entries.append(i if begins else None)
        self._at.append(i)
        return Prediction(torch.tanh(scaled + 0.3), torch.sigmoid(scaled) if self.subject.learned else None)

    def costs(self) -> list[int]:
        """Evaluations of each interval."""
        return [self._at.count(i) for i in range(self.steps)]


class _Dice(Noise):
    """Noise for rehearsals: a function of the number of the draw, and much cheaper than the real one."""

    def __init__(self, z: Tensor) -> None:
        self._z = z
        self.draws = 0

    def __call__(self) -> Tensor:
        self.draws += 1
        return torch.sin(self._z * (40 + self.draws))
