"""Samplers: solvers that walk from a noise level to 0. A plugin; one generator method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from torch import Tensor

from samplerbench.boundary import plugin_call, shown
from samplerbench.errors import RunError
from samplerbench.limits import MAX_INTEGER
from samplerbench.options import Configurable
from samplerbench.sampling.denoiser import Denoiser
from samplerbench.sampling.noise import Noise
from samplerbench.sampling.view import ModelView


@dataclass(frozen=True)
class Step:
    """What a sampler yields after each interval of the grid.

    Attributes:
        sigma: the noise level now reached.
        x: (B, C, H, W), the state there.
        x0: (B, C, H, W), the denoised state that the step was made with.
    """

    sigma: float
    x: Tensor
    x0: Tensor | None = None


@dataclass(frozen=True)
class Sampler(Configurable, ABC):
    """Base of sampler plugins.

    A subclass is a frozen dataclass: its fields are its parameters (`option`), its docstring's first line is its
    description and names the paper, and `steps` is the method. It keeps no state in `self`, sets no gradient mode,
    draws noise only through `noise`, and never writes into a tensor it has yielded.
    """

    kind: ClassVar[str] = "sampler"
    spacing: ClassVar[str | None] = None
    """The spacing used where the user names none, by name; None is the toolkit's default."""

    own_grid: ClassVar[bool] = False
    """Whether the method has a grid of its own and takes from the given one only the number of steps."""

    even_in: ClassVar[Literal["log sigma", "sigma"]] = "log sigma"
    """The variable in which the grid is even when the order of convergence is measured."""

    uniform_steps_only: ClassVar[bool] = False
    """Whether the order of convergence is claimed on grids even in `even_in` only, as of constant multistep weights.
    A method without it must keep its order on uneven grids, where `samplerbench check` measures it too."""

    def bind(self, model: ModelView, sigmas: Tensor) -> Sampler:
        """The sampler prepared for a model and a grid: with estimates that it needs, for example. By default, itself.

        Estimates are made by `model.estimates`, which keeps them under the hash of the weights and counts their network
        evaluations apart from those of sampling.

        Args:
            model: the model that will be sampled.
            sigmas: (N+1,) float64 on the CPU, the grid.

        Returns:
            A copy made by `with_state`. The instance itself is shared between models and must not change.

        Raises:
            UserError: the model lacks what the sampler needs.
        """
        return self

    @abstractmethod
    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        """Walk the grid, yielding once per interval; the last state yielded is the sample.

        A sampler that yields fewer or more Steps than the grid has intervals fails its cell, unless `own_grid` is set
        or `nfe` returns None. Each state has the shape, dtype and device of x.

        Args:
            denoise: D(x, σ), counted.
            x: (B, C, H, W), the start, at level sigmas[0].
            sigmas: (N+1,) float64 on the CPU, strictly decreasing, the last 0 (above 0 where the order of convergence
                is measured: then the last state is one at that level).
            noise: each call gives the next z ~ N(0, I), (B, C, H, W).
        """

    def nfe(self, steps: int) -> int | None:
        """Network evaluations for a grid of so many steps, without guidance.

        For planning only: what is reported is counted. None: the solver chooses its own steps, and the requested
        number of steps has no meaning for it.
        """
        return steps

    def convergence(self) -> int | None:
        """The order of convergence that the method claims on the probability-flow ODE; None where it claims none.

        The claim is for a start at large noise, σ ≫ the data, where D hardly changes in the first steps. A multistep
        method whose first steps are of lower order needs that; what it claims from any other start is
        `convergence_from_any_start`. `samplerbench check` measures both on exact problems, on grids even in log σ (in
        σ where `even_in` says so) and, unless `uniform_steps_only`, on uneven grids.
        """
        return None

    def convergence_from_any_start(self) -> int | None:
        """The order claimed where the start is at a noise level of the data's size: no less than this is measured.

        `convergence` unless overridden. A multistep method that starts with a step of order 1 has 2 at most: the error
        of that step, O(h²), stays to the end.
        """
        return self.convergence()


def planned_nfe(sampler: Sampler, steps: int) -> int | None:
    """`sampler.nfe(steps)`, checked.

    Raises:
        RunError: the plugin raised, or returned something else than None or a number of at least 0.
    """
    with plugin_call(sampler, f"in nfe({steps})"):
        found = sampler.nfe(steps)
    if found is not None and (isinstance(found, bool) or not isinstance(found, int) or not 0 <= found <= MAX_INTEGER):
        raise RunError(
            f"sampler {sampler.label()}: nfe({steps}) returned {shown(found)}; it must be a whole number, at least 0 "
            "and below 2**63, or None."
        )
    return found


def bind_sampler(sampler: Sampler, model: ModelView, sigmas: Tensor) -> Sampler:
    """`sampler.bind(model, sigmas)`, checked.

    Raises:
        UserError: the model lacks what the sampler needs.
        RunError: the plugin raised, or returned something else than a sampler of the same spec.
    """
    with plugin_call(sampler, "in bind"):
        bound = sampler.bind(model, sigmas.clone())
    if not isinstance(bound, Sampler) or bound != sampler:
        raise RunError(
            f"sampler {sampler.label()}: bind returned {shown(bound)}; it must be a sampler with the same parameters."
        )
    return bound


def intervals(sigmas: Tensor) -> Iterator[tuple[float, float]]:
    """The (s, t) of each interval, s > t, as Python floats (float64): `for s, t in intervals(sigmas)`."""
    return pairwise(sigmas.tolist())
