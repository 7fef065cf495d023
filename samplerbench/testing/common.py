"""Common parts of the checks of all kinds."""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samplerbench.options import Configurable, parameters_of
from samplerbench.sampling import SVD, Denoiser, LinearOperator, Noise, Sampler, Step, Task, coefficient, intervals
from samplerbench.testing.checks import CheckFailedError


def require(condition: bool, message: str) -> None:
    """Raise CheckFailedError if the condition is false."""
    if not condition:
        raise CheckFailedError(message)


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Context manager: fails if the global generator of Python, NumPy or torch is used."""

    def states() -> tuple[Any, ...]:
        legacy = np.random.get_state()  # noqa: NPY002 - the global state is what is looked at
        return random.getstate(), legacy[1].tolist(), legacy[2], torch.get_rng_state().tolist()  # type: ignore[index]

    before = states()
    yield
    names = ("Python's random", "numpy.random", "numpy.random", "torch's global generator")
    for name, old, new in zip(names, before, states(), strict=True):
        require(old == new, f"it draws from {name}; noise comes from `noise()` only")


def check_documented(plugin: Configurable) -> str:
    """The docstring has a description and a source. Every parameter has help text, every number bounds."""
    text = type(plugin).__doc__ or ""
    own = text and not text.startswith(f"{type(plugin).__name__}(")  # a dataclass's automatic docstring
    require(bool(own), "the class has no docstring")
    first = text.strip().split("\n")[0]
    require(len(first) > 10, f'the first line of the docstring says too little: "{first}"')
    if plugin.kind not in ("spacing", "model"):  # a model's source is in its identity
        require(
            bool(re.search(r"(19|20)\d\d|https?://|this work|unpublished", text)),
            "the docstring names no source (paper and year)",
        )
    known = parameters_of(type(plugin))
    for p in known.values():
        require(len(p.help.strip()) > 3, f"parameter {p.name} has no help")
        numeric = re.search(r"\b(int|float)\b", p.type_name)
        require(not numeric or bool(p.bounds), f"parameter {p.name} is a number without a bound")
    return f"{len(known)} parameters"


def check_picklable(plugin: Configurable) -> str:
    """A pickled copy is equal and has the same parameters."""
    copy = pickle.loads(pickle.dumps(plugin))
    require(copy == plugin and copy.parameters == plugin.parameters, "the copy differs")
    return plugin.spec


def same(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference."""
    return float((a.double() - b.double()).abs().max())


Checks = list[tuple[str, Callable[[Any], str]]]


@dataclass(frozen=True)
class Euler(Sampler):
    """Euler's method on the probability-flow ODE (Song et al. 2021): a sampler for checks of other plugins."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            x = x0 + t / s * (x - x0)
            yield Step(t, x, x0)


class _LeftColumns(LinearOperator):
    """A keeps the left half of the columns."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape, self.observed = shape, (*shape[:2], shape[2] // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.observed[2]].clone()

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.cat([y, y.new_zeros(*y.shape[:3], self.shape[2] - self.observed[2])], dim=3)

    pseudo_inverse = adjoint

    def solve(self, r: Tensor, scale: float | Tensor, shift: float | Tensor) -> Tensor:
        divisor = torch.as_tensor(coefficient(scale, r) + coefficient(shift, r), dtype=r.dtype)
        return torch.where(divisor > 0, r / divisor, 0.0)

    def svd(self) -> SVD:
        return SVD(torch.ones((), dtype=torch.float64), torch.clone, self.forward, self.adjoint)


@dataclass(frozen=True)
class LeftHalf(Task):
    """The left half of the image is observed (this work): a task for checks of other plugins."""

    def operator(self, shape: tuple[int, int, int]) -> LinearOperator:
        return _LeftColumns(shape)
