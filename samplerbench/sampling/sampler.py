"""Samplers: plugins that solve the reverse process from a noise level to 0."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from torch import Tensor

from samplerbench.boundary import plugin_call, shown
from samplerbench.errors import RunError, UserError, argument
from samplerbench.limits import MAX_INTEGER
from samplerbench.options import Configurable
from samplerbench.sampling.chain import Chain, markov_variance
from samplerbench.sampling.denoiser import Denoiser, Prediction
from samplerbench.sampling.noise import Noise
from samplerbench.sampling.process import is_infinite
from samplerbench.sampling.task import Observation, Regime
from samplerbench.sampling.view import ModelView


@dataclass(frozen=True)
class Step:
    """The value that a sampler yields after each interval of the grid.

    Attributes:
        sigma: noise level after the step.
        x: state after the step, (B, C, H, W).
        x0: denoised state used in the step, (B, C, H, W). None if it is not available.
    """

    sigma: float
    x: Tensor
    x0: Tensor | None = None


@dataclass(frozen=True)
class Sampler(Configurable, ABC):
    """Base class of sampler plugins.

    A subclass is a frozen dataclass. Its fields are its parameters (`option`). The first line of its docstring is its
    description and names the paper. `steps` implements the method. A sampler must not store state in `self`, must not
    set the gradient mode, must draw noise only from `noise`, and must not modify a tensor that it has yielded.
    """

    kind: ClassVar[str] = "sampler"
    spacing: ClassVar[str | None] = None
    """Name of the default spacing of this sampler. None selects the default of samplerbench."""

    from_infinity: ClassVar[bool] = False
    """Whether `steps` supports `SIGMA_INFINITY` as the first level: the time t = 1 of a rectified flow. If False, the
    first interval is a step of DDIM, x ← D + σ' ε, which is exact for a constant D, and `steps` gets the other ones."""

    keeps_spacing: ClassVar[bool] = False
    """Whether the default spacing of this sampler also applies to models that have a default spacing of their own."""

    own_grid: ClassVar[bool] = False
    """Whether the method defines its own grid and uses only the number of steps of the given grid."""

    even_in: ClassVar[Literal["log sigma", "sigma"]] = "log sigma"
    """The variable in which the grid is uniform when the order of convergence is measured."""

    reversible: ClassVar[bool] = False
    """Whether `steps` is a solver of the probability-flow ODE that also integrates an increasing grid, from a level
    above 0 up to `levels[0]` of the denoiser. Exact likelihoods are computed with such samplers."""

    uniform_steps_only: ClassVar[bool] = False
    """Whether the claimed order holds only on grids that are uniform in `even_in`, as for constant multistep weights.
    If False, `samplerbench check` also measures the order on non-uniform grids."""

    needs_task: ClassVar[bool] = False
    """Whether `steps` uses the observations of an inverse problem (`Denoiser.observation`)."""

    def check_task(self, observation: Observation) -> None:
        """Check that the method supports a task. By default, it supports all. Called before anything is sampled.

        Args:
            observation: the task with its operator.

        Raises:
            UserError: if the task is not supported, as by `observation.linear` and `observation.svd`.
        """
        return

    def posterior_regime(self) -> Regime | None:
        """Where the method samples the posterior of an inverse problem exactly, in the limit of many steps.

        By default, None: there is no claim. `samplerbench check` tests a claim.
        """
        return None

    def bind(self, model: ModelView, sigmas: Tensor) -> Sampler:
        """Prepare the sampler for a model and a grid, for example compute estimates. By default, return `self`.

        Compute estimates with `model.estimates`. It caches them under the hash of the weights, and counts their network
        evaluations separately from sampling.

        Args:
            model: model to sample from.
            sigmas: noise levels of the grid, (N+1,) float64 on the CPU.

        Returns:
            A copy made by `with_state`. Do not modify the instance itself, because models share it.

        Raises:
            UserError: if the model does not meet the requirements of the sampler.
        """
        return self

    @abstractmethod
    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        """Run the method and yield one Step per interval of the grid. The last state is the sample.

        The number of Steps must equal the number of intervals, unless `own_grid` is True or `nfe` returns None. Each
        state must have the shape, dtype and device of x.

        Args:
            denoise: denoiser D(x, σ). Its network evaluations are counted.
            x: initial state at noise level sigmas[0], (B, C, H, W).
            sigmas: noise levels, (N+1,) float64 on the CPU, strictly decreasing. The last level is 0, or positive when
                the order of convergence is measured.
            noise: noise source. Each call returns the next z ~ N(0, I), (B, C, H, W).
        """

    def transition(
        self, x: Tensor, prediction: Prediction, s: float, t: float, chain: Chain
    ) -> tuple[Tensor, float | Tensor] | None:
        """The Gaussian reverse kernel p(x_t | x_s) = N(mean, variance). By default, None: the method has none.

        A sampler with a Gaussian kernel draws its steps from this function, and its likelihood is computed with it. At
        t = 0 the kernel is the decoder p(x₀ | x_s): sampling takes its mean.

        Args:
            x: state x_s, (B, C, H, W).
            prediction: prediction of the model for x_s.
            s: noise level of x. It may be `SIGMA_INFINITY`.
            t: next noise level of the grid, s > t ≥ 0.
            chain: the grid and the forward process.

        Returns:
            The mean, (B, C, H, W), and the variance: a float, or a tensor (B, C, H, W). A variance of 0 is a
            deterministic step.

        Raises:
            UserError: if the prediction lacks what the kernel needs, such as a learned variance.
        """
        return None

    def forward_variance(self, s: float, t: float) -> float:
        """The variance of q(x_t | x_s, x₀), the forward process that the kernel reverses.

        The mean of q is that of `transition` for a perfect prediction, D = x₀. By default, the variance of the Markov
        process, t²(1 - t²/s²) (Ho et al. 2020, eq. 7). A method with another forward process overrides it.

        Args:
            s: noise level of the given state.
            t: next noise level, s > t > 0.
        """
        return markov_variance(s, t)

    def nfe(self, steps: int) -> int | None:
        """Planned network evaluations per sample for a number of steps, without guidance. Reported NFE are measured.

        Args:
            steps: number of steps.

        Returns:
            The number of evaluations. None if the solver chooses its own steps and ignores the requested number.
        """
        return steps

    def convergence(self) -> int | None:
        """The claimed order of convergence on the probability-flow ODE. None if there is no claim.

        The claim applies when σ at the start is much larger than the data, so that D hardly changes in the first
        steps. A multistep method with lower-order first steps requires such a start. `convergence_from_any_start` is
        the claim for other starts. `samplerbench check` measures both on exact problems, on grids that are uniform in
        `even_in` and, unless `uniform_steps_only` is True, on non-uniform grids.
        """
        return None

    def convergence_from_any_start(self) -> int | None:
        """The claimed minimum order for a start at a noise level comparable to the data. By default, `convergence`.

        A multistep method with a first step of order 1 has order 2 at most, because the O(h²) error of that step
        remains.
        """
        return self.convergence()

    def exact_for(self) -> Literal["denoiser", "consistency function"] | None:
        """The kind of D for which the samples have the distribution of the data in the limit of many steps.

        `samplerbench check` measures the mean and the variance of a stochastic sampler with this D.

        Returns:
            "denoiser" for D = E[x₀ | x], "consistency function" for the end of the probability-flow ODE from x, None if
            there is no claim.
        """
        return "denoiser"

    def convergence_from_infinity(self) -> int | None:
        """The claimed order from σ = ∞, the time t = 1 of a rectified flow, on a grid that is uniform in t.

        By default `convergence_from_any_start`, but 2 at most. A first step that treats D as constant has an error of
        O(h²). In the first steps of such a grid log σ changes by log 2, log 3/2, …, for every number of steps, so
        solvers that expand D in log σ have order 2 at most. Solvers in the time t can have a higher order.
        """
        order = self.convergence_from_any_start()
        return None if order is None else min(2, order)


def start_steps(sampler: Sampler, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
    """Start a sampler on a grid. All drivers use this function instead of `Sampler.steps`.

    The arguments are those of `Sampler.steps`. If the grid starts at σ = ∞ and the sampler does not support it
    (`from_infinity`), the first step is a step of DDIM.
    """
    if sampler.from_infinity or not is_infinite(float(sigmas[0])):
        return sampler.steps(denoise, x, sigmas, noise)
    return _after_infinity(sampler, denoise, x, sigmas, noise)


def _after_infinity(sampler: Sampler, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
    s, t = float(sigmas[0]), float(sigmas[1])
    x0 = denoise(x, s)
    x = x0 if t == 0 else x0 + (t / s) * (x - x0)
    yield Step(t, x, x0)
    if t > 0:
        yield from sampler.steps(denoise, x, sigmas[1:], noise)


def planned_nfe(sampler: Sampler, steps: int) -> int | None:
    """Return `sampler.nfe(steps)` after a check.

    Raises:
        RunError: if the plugin raises an error, or does not return None or a non-negative integer.
    """
    with plugin_call(sampler, f"in nfe({steps})"):
        found = sampler.nfe(steps)
    if found is not None and (isinstance(found, bool) or not isinstance(found, int) or not 0 <= found <= MAX_INTEGER):
        raise RunError(
            f"sampler {sampler.label()}: nfe({steps}) returned {shown(found)}; it must be a whole number, at least 0 "
            "and below 2**63, or None."
        )
    return found


def check_sampler_task(sampler: Sampler, observation: Observation | None) -> None:
    """Check that a sampler has a task if it needs one, and that it supports it.

    Args:
        sampler: the sampler.
        observation: observations of the model. None without a task.

    Raises:
        UserError: if the sampler needs a task and there is none, or if it does not support the task.
        RunError: if the plugin raises an error.
    """
    if not sampler.needs_task:
        return
    if observation is None:
        raise UserError(f"sampler {sampler.label()} requires a task, such as {argument('task', 'inpaint')}.")
    with plugin_call(sampler, "in check_task"):
        sampler.check_task(observation)


def bind_sampler(sampler: Sampler, model: ModelView, sigmas: Tensor) -> Sampler:
    """Call `sampler.bind(model, sigmas)` and check the result.

    Raises:
        UserError: if the model does not meet the requirements of the sampler.
        RunError: if the plugin raises an error, or does not return a sampler with the same parameters.
    """
    check_sampler_task(sampler, getattr(model, "observation", None))
    with plugin_call(sampler, "in bind"):
        bound = sampler.bind(model, sigmas.clone())
    if not isinstance(bound, Sampler) or bound != sampler:
        raise RunError(
            f"sampler {sampler.label()}: bind returned {shown(bound)}; it must be a sampler with the same parameters."
        )
    return bound


def intervals(sigmas: Tensor) -> Iterator[tuple[float, float]]:
    """Iterate over the intervals (s, t), s > t, as Python floats: `for s, t in intervals(sigmas)`."""
    return pairwise(sigmas.tolist())
