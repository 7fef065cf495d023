"""The noise levels at which a sampler evaluates D on a grid, found by running it on a small random tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.models.timesteps import timestep_at
from samplerbench.sampling import VARIANCE_PRESERVING, Denoiser, Noise, Prediction, PredictionType, Sampler, Sigma, Step
from samplerbench.sampling.process import Process
from samplerbench.sampling.sampler import start_steps


def refuse(sampler: Sampler, why: str) -> NoReturn:
    """Raise UserError: the sampler cannot be a scheduler."""
    raise UserError(f"sampler {sampler.label()} cannot be a diffusers scheduler: {why}.")


@dataclass(frozen=True)
class Subject:
    """A sampler, and the properties of the model that a scheduler knows.

    Attributes:
        sampler: the sampler.
        levels: (T,) float64, the noise levels of the model.
        learned: whether the network predicts a variance.
        prediction: prediction type of the network.
        process: forward process. The state in the pipeline is α(σ) x.
        time: the timestep that the pipeline is given for a noise level. None for the timesteps of `levels`.
    """

    sampler: Sampler
    levels: Tensor
    learned: bool
    prediction: PredictionType = "epsilon"
    process: Process = VARIANCE_PRESERVING
    time: Callable[[float], float] | None = None

    def refuse(self, why: str) -> NoReturn:
        """Raise UserError: the sampler cannot be a scheduler."""
        refuse(self.sampler, why)

    def check(self, sigmas: Tensor | None = None) -> Plan:
        """A plan for ten levels. Raises UserError if the sampler cannot be a scheduler on any grid.

        Args:
            sigmas: the grid, (N+1,) float64. None for ten of `levels`.
        """
        if type(self.sampler).bind is not Sampler.bind or getattr(self.sampler, "needs", None):
            self.refuse("it requires more from the model than D, and a scheduler has only the network's output")
        if self.sampler.nfe(1) is None:
            self.refuse("it chooses its noise levels from the image, and a pipeline requires all timesteps in advance")
        if sigmas is not None:
            return self.plan(sigmas)
        index = torch.linspace(len(self.levels) - 1, 0, 10).round().long().unique().flip(0)
        return self.plan(torch.cat([self.levels[index], self.levels.new_zeros(1)]))

    def plan(self, sigmas: Tensor) -> Plan:
        """The evaluations on a grid (N+1,) float64. Raises UserError if they differ between two inputs."""
        first, second = (_Rehearsal(self, sigmas, scale) for scale in (1.0, 0.3))
        for rehearsal in (first, second):
            for _ in rehearsal.walk():
                pass
        if not first.steps:
            self.refuse("it yielded no step")
        if not first.evaluations:
            self.refuse("it never asks the network")
        if first.evaluations != second.evaluations:
            self.refuse("its noise levels depend on the image")
        if first.moved:
            self.refuse("it changes the state before its first evaluation, and a pipeline evaluates the network first")
        return Plan(self, sigmas, first.evaluations, first.entries, first.costs())


@dataclass(frozen=True)
class Plan:
    """A grid, and the evaluations of a sampler on it.

    Attributes:
        subject: the sampler and the model.
        sigmas: (N+1,) float64, the grid.
        evaluations: the noise level of each evaluation, one for each entry of `timesteps`.
        entries: for each evaluation, the index of the interval that starts with it, at the state with which the
            previous interval ended; None for all other evaluations.
        costs: the number of evaluations of each interval.
    """

    subject: Subject
    sigmas: Tensor
    evaluations: list[float]
    entries: list[int | None]
    costs: list[int]

    @property
    def order(self) -> int:
        """Evaluations per step, apart from the last step; 1 if the steps differ."""
        return self.costs[0] if len(set(self.costs[:-1] or self.costs)) == 1 else 1

    @cached_property
    def timesteps(self) -> Tensor:
        """The timestep of each evaluation: int64 if all are timesteps of the model, else float32.

        For a rectified flow, whose time is continuous, always float32.
        """
        if self.subject.time is not None:
            return torch.tensor([self.subject.time(sigma) for sigma in self.evaluations], dtype=torch.float32)
        levels = self.subject.levels.tolist()
        times = [timestep_at(levels, sigma) for sigma in self.evaluations]
        return torch.tensor(times, dtype=torch.int64 if all(t.is_integer() for t in times) else torch.float32)

    @cached_property
    def times(self) -> list[float]:
        """`timesteps` as Python floats."""
        return self.timesteps.tolist()

    def first(self, timestep: Any, announced: int | None) -> int:
        """The entry of `timesteps` at which a run starts. An interval of the grid must start there.

        Args:
            timestep: the first timestep of the pipeline.
            announced: the entry passed to `set_begin_index`, or None.

        Raises:
            UserError: no interval starts there, or the sampler evaluates at other levels if it starts there.
        """
        if announced is not None:
            index = announced
        else:
            value = float(timestep)
            found = [k for k, t in enumerate(self.times) if t == value]
            index = next((k for k in found if self.entries[k] is not None), found[0] if found else 0)
        if not 0 <= index < len(self.times) or (index and self.entries[index] is None):
            raise UserError(
                f"sampler {self.subject.sampler.label()} cannot start at entry {index} of {len(self.times)} "
                f"timesteps: no "
                f"interval of its grid starts there. It has {self.order} timesteps per step."
            )
        if index:
            tail = self.subject.plan(self.sigmas[self.entries[index] :])
            if tail.evaluations != self.evaluations[index:]:
                self.subject.refuse("it evaluates at other noise levels if it starts at a lower one")
        return index

    @cached_property
    def remembers(self) -> bool:
        """Whether a step depends on more than its start state. Tested by restarting the sampler at every step."""
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
    """A denoiser that supports only D for the whole batch at one noise level. D is supplied by the caller."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.levels, self.prediction = subject, subject.levels, subject.prediction
        self.process = subject.process

    def level(self, sigma: Sigma) -> float:
        """The noise level as a float. Raises UserError for one level per image."""
        if isinstance(sigma, Tensor) and sigma.ndim:
            self.subject.refuse(
                "it evaluates each image at its own noise level, and a pipeline has one timestep for the batch"
            )
        return float(sigma)

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        raise NotImplementedError

    def rows(self, index: Tensor) -> Denoiser:
        self.subject.refuse("it steps each image separately, and a pipeline evaluates the whole batch")

    def __getattr__(self, name: str) -> Any:
        """Refuse a sampler that uses what only a model has."""
        if name in _OF_A_MODEL:
            self.subject.refuse("it requires more from the model than D, and a scheduler has only the network's output")
        raise AttributeError(name)


class _Rehearsal(Bare):
    """A run on two small random states in float64, with a fixed function in place of D."""

    def __init__(self, subject: Subject, sigmas: Tensor, scale: float) -> None:
        super().__init__(subject)
        self.sigmas = sigmas
        z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.x = z * scale * subject.process.prior_scale(float(sigmas[0]))
        self.noise = _Dice(z)
        self.steps = 0
        self.evaluations: list[float] = []
        self.entries: list[int | None] = []
        self.moved = False
        self._at: list[int] = []

    def walk(self) -> Iterator[Step]:
        """Run the sampler and yield its steps."""
        self.here = self.x
        run = start_steps(self.subject.sampler, self, self.x, self.sigmas, self.noise)
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
        i, scaled = self.steps, x * self.alpha(level)
        if not self.evaluations:
            start = self.x * self.alpha(float(self.sigmas[0]))
            # With a tolerance: a sampler with its own grid computes this level differently.
            self.moved = not torch.allclose(scaled, start, rtol=1e-5, atol=1e-5)
        first = not self._at or self._at[-1] < i
        begins = first and i < len(self.sigmas) - 1 and level == float(self.sigmas[i]) and torch.equal(x, self.here)
        self.evaluations.append(level)
        self.entries.append(i if begins else None)
        self._at.append(i)
        return Prediction(torch.tanh(scaled + 0.3), torch.sigmoid(scaled) if self.subject.learned else None)

    def costs(self) -> list[int]:
        """The number of evaluations of each interval."""
        return [self._at.count(i) for i in range(self.steps)]


class _Dice(Noise):
    """Cheap noise for a rehearsal: a function of the number of the draw."""

    def __init__(self, z: Tensor) -> None:
        self._z = z
        self.draws = 0

    def __call__(self) -> Tensor:
        self.draws += 1
        return torch.sin(self._z * (40 + self.draws))
