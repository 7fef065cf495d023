"""The checks of methods for inverse problems, against the exact posterior of a Gaussian."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from samplerbench.models.exact import ExactModel, exact
from samplerbench.models.posterior import exact_posterior
from samplerbench.models.sample import bind, sample_states
from samplerbench.sampling import SVD, Guidance, Inputs, LinearOperator, Regime, Sampler, Task, coefficient
from samplerbench.sampling.guidance import bind_guidance
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.spacing import make_grid, pick_spacing
from samplerbench.testing.checks import NotApplicableError
from samplerbench.testing.common import LeftHalf, require, same

_LEVELS = (0.05, 0.5, 3.0, 40.0)
_STEPS, _SAMPLES = (50, 200), 1000


class _Dense(LinearOperator):
    """A is a matrix without structure."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape, self.observed = shape, (math.prod(shape) // 2,)
        size = torch.arange(math.prod(shape), dtype=torch.float64)
        self.matrix = torch.cos(3.1 * (size + 1) * (size[: self.observed[0], None] + 0.7))
        self.u, self.s, self.vh = torch.linalg.svd(self.matrix, full_matrices=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.to(x.dtype).T

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.matrix.to(y.dtype)).reshape(-1, *self.shape)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return ((y @ self.u.to(y.dtype)) / self.s.to(y.dtype) @ self.vh.to(y.dtype)).reshape(-1, *self.shape)

    def solve(self, r: Tensor, scale: float | Tensor, shift: float | Tensor) -> Tensor:
        divisor = coefficient(scale, r) * self.s.to(r.dtype) ** 2 + coefficient(shift, r)
        return (r @ self.u.to(r.dtype)) / divisor @ self.u.to(r.dtype).T

    def svd(self) -> SVD:
        return SVD(
            self.s,
            u_adjoint=lambda y: y @ self.u.to(y.dtype),
            v_adjoint=lambda x: x.flatten(1) @ self.vh.to(x.dtype).T,
            v=lambda c: (c @ self.vh.to(c.dtype)).reshape(-1, *self.shape),
        )


@dataclass(frozen=True)
class _Mixed(Task):
    """Sums of all pixels with fixed weights are observed (this work)."""

    def operator(self, shape: tuple[int, int, int]) -> LinearOperator:
        return _Dense(shape)


class _Identity(LinearOperator):
    """A = I."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = self.observed = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()

    def adjoint(self, y: Tensor) -> Tensor:
        return y.clone()

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return y.clone()

    def solve(self, r: Tensor, scale: float | Tensor, shift: float | Tensor) -> Tensor:
        divisor = torch.as_tensor(coefficient(scale, r) + coefficient(shift, r), dtype=r.dtype)
        return torch.where(divisor > 0, r / divisor, 0.0)

    def svd(self) -> SVD:
        return SVD(torch.ones((), dtype=torch.float64), torch.clone, torch.clone, torch.clone)


@dataclass(frozen=True)
class _Everything(Task):
    """The image itself is observed (this work)."""

    def operator(self, shape: tuple[int, int, int]) -> LinearOperator:
        return _Identity(shape)


def _regime(method: Guidance | Sampler) -> Regime:
    """The regime that the method claims. Raises NotApplicableError if there is none."""
    if not method.needs_task:
        raise NotApplicableError("it does not require a task")
    regime = method.posterior_regime()
    if regime is None:
        raise NotApplicableError("it claims no regime in which it is exact (posterior_regime)")
    require(isinstance(regime, Regime), f"posterior_regime returned a {type(regime).__name__}, not a Regime")
    return regime


def _problem(regime: Regime, task: Task, shape: str, images: int) -> ExactModel:
    """A Gaussian and a task of the regime."""
    model = exact("gaussian", shape=shape)
    if regime.equal_variances or regime.variance is not None:
        model.problem.variances.fill_(0.5 if regime.variance is None else regime.variance)
    return model.observed(task, model.real(images)[0])


def _problems(regime: Regime, shape: str, images: int) -> Iterator[ExactModel]:
    """A Gaussian with each task of the regime."""
    noises = (0.3, 0.0) if regime.noise else (0.0,)
    for kind in (LeftHalf, _Mixed) if regime.any_task else (LeftHalf,):
        for sigma in noises:
            model = _problem(regime, kind(sigma=sigma), shape, images)
            assert model.observation is not None
            if regime.measurements is None or math.prod(model.observation.operator.observed) <= regime.measurements:
                yield model


def _predicted(guidance: Guidance, model: ExactModel) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The noise levels, states, predictions and observations at several noise levels."""
    index = torch.arange(6)
    inputs = model.inputs(index, Inputs(6))
    bound = bind_guidance(guidance, model)
    for number, sigma in enumerate(_LEVELS):
        x = model.real(12)[0][6:] + sigma * normal(1, Purpose.PRIOR, index, number, model.shape)
        with torch.no_grad():
            made = model.denoiser(inputs, bound)(x, sigma)
        yield torch.full((6,), sigma, dtype=torch.float64), x, made, inputs.tensors["observation"]


def check_guidance_posterior(guidance: Guidance) -> str:
    """For a Gaussian prior in the regime that it claims, it is the posterior denoiser E[x₀ | x, y]."""
    regime = _regime(guidance)
    worst, compared = 0.0, 0
    for model in _problems(regime, "1x2x2", 6):
        posterior = exact_posterior(model, "the check")
        for levels, x, made, y in _predicted(guidance, model):
            worst = max(worst, same(made, posterior.predict(x, levels, y)))
            compared += 1
    if not compared:
        raise NotApplicableError("the smallest problem has more measurements than its regime")
    require(worst <= 1e-6, f"it differs from the posterior denoiser of a Gaussian by {worst:.1e}")
    return f"differ by {worst:.1e}"


def check_guidance_full_observation(guidance: Guidance) -> str:
    """If the whole image is observed without noise, the prediction is the image."""
    regime = _regime(guidance)
    shape = "1x1x2" if regime.measurements is None or regime.measurements >= 2 else "1x1x1"
    model = _problem(regime, _Everything(sigma=0.0), shape, 6)
    worst = max(same(made, y) for _, _, made, y in _predicted(guidance, model))
    require(worst <= 1e-6, f"the image is fully observed, but the prediction differs from it by {worst:.1e}")
    return f"differ by {worst:.1e}"


def _final(sampler: Sampler, model: ExactModel, steps: int, n: int) -> Tensor:
    """The final states of n samples, (n, d)."""
    grid = make_grid(pick_spacing(sampler), model.levels, steps)
    return sample_states(model, bind(model, sampler, grid), grid, torch.arange(n)).flatten(1)


def check_sampler_posterior(sampler: Sampler) -> str:
    """For a Gaussian prior in the regime that it claims, the samples have the moments of the posterior."""
    regime = _regime(sampler)
    few, many = _STEPS
    texts = []
    for model in _problems(regime, "1x4x4", 1):
        y = model.inputs(torch.arange(1), Inputs(1)).tensors["observation"][0]
        moments = exact_posterior(model, "the check").moments(y)
        # The principal directions of the posterior. Those of zero variance are fixed by y.
        variances, directions = torch.linalg.eigh(moments.covariance)
        free = variances > 1e-9 * variances.max()
        bias, ratios = 0.0, []
        for steps in _STEPS:
            away = (_final(sampler, model, steps, _SAMPLES) - moments.mean) @ directions
            fixed = float(away[:, ~free].abs().max()) if bool((~free).any()) else 0.0
            require(fixed <= 1e-6, f"values that y determines differ from it by {fixed:.1e}")
            scaled = away[:, free] / variances[free].sqrt()
            bias, ratio = float(scaled.mean(0).abs().max()), float(scaled.var(0).mean())
            ratios.append(ratio)
        # Standard errors: of a mean 1/√n in units of the deviation; of the mean variance ratio √(2/(n d)).
        error = 4.5 * math.sqrt(2 / (_SAMPLES * int(free.sum())))
        before, after = (abs(ratio - 1) for ratio in ratios)
        text = f"variance x {ratios[0]:.3f} at {few} steps, x {ratios[1]:.3f} at {many}; mean off {bias:.3f} sd"
        require(bias <= 4.5 / math.sqrt(_SAMPLES) + 0.05, f"the mean at {many} steps is off: {text}")
        if regime.covariance:
            require(after <= error + 0.2, f"the variance at {many} steps is off: {text}")
            require(after <= max(0.7 * before, error), f"the error of the variance does not shrink: {text}")
        texts.append(text)
    return "; ".join(texts)


def check_sampler_full_observation(sampler: Sampler) -> str:
    """If the whole image is observed without noise, the sample is the image."""
    regime = _regime(sampler)
    model = _problem(regime, _Everything(sigma=0.0), "1x4x4", 6)
    assert model.observation is not None
    worst = same(_final(sampler, model, 8, 6), model.observation.images.flatten(1))
    require(worst <= 1e-6, f"the image is fully observed, but the sample differs from it by {worst:.1e}")
    return f"differ by {worst:.1e}"


__all__ = [
    "check_guidance_full_observation",
    "check_guidance_posterior",
    "check_sampler_full_observation",
    "check_sampler_posterior",
]
