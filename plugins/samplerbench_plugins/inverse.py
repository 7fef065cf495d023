"""Methods for inverse problems as guidances: each maps D(x, σ) to an approximation of E[x₀ | x, y]."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from samplerbench.models import ExactPosterior, exact_posterior
from samplerbench.sampling import (
    ConditionalDenoiser,
    Guidance,
    LinearOperator,
    ModelView,
    Observation,
    Prediction,
    Regime,
    Sigma,
    coefficient,
    option,
    per_sample,
)


@dataclass(frozen=True)
class PosteriorMethod(Guidance, ABC):
    """Base of the methods: they are given the task of the model and the observation of each sample."""

    observation: ClassVar[Observation]
    needs_task: ClassVar[bool] = True
    bayes: ClassVar[bool] = False

    def bind(self, model: ModelView) -> Self:
        return self.with_state(observation=model.observation)


@dataclass(frozen=True)
class LinearMethod(PosteriorMethod, ABC):
    """Base of the methods that require a linear operator."""

    operator: ClassVar[LinearOperator]

    def bind(self, model: ModelView) -> Self:
        assert model.observation is not None
        operator = model.observation.linear(f"guidance {self.label()}")
        return self.with_state(observation=model.observation, operator=operator)


def observed(denoise: ConditionalDenoiser, x: Tensor) -> Tensor:
    """The observations of the batch, (B, *observed), in the dtype of x."""
    return denoise.inputs.tensors["observation"].to(x.dtype)


@dataclass(frozen=True)
class ExactConditioning(LinearMethod):
    """The posterior denoiser itself, E[x₀ | x, y], on the exact problems gaussian and mixture (this work).

    A sampler with this guidance and enough steps samples the posterior, so the error of its results is that of the
    sampler alone. It takes one evaluation, like D.
    """

    differentiates: ClassVar[bool] = True  # its factorisations cannot be captured as a CUDA graph
    posterior: ClassVar[ExactPosterior]

    def posterior_regime(self) -> Regime | None:
        return Regime()

    def bind(self, model: ModelView) -> Self:
        return super().bind(model).with_state(posterior=exact_posterior(model, f"guidance {self.label()}"))

    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        x0 = self.posterior.predict(x, per_sample(sigma, x), observed(denoise, x), denoise.inputs.labels)
        return Prediction(x0.to(x.dtype))


@dataclass(frozen=True)
class DDNM(LinearMethod):
    """Denoising diffusion null-space model (Wang et al. 2023):  D + A⁺ (y - A D).

    The result agrees with y in the range of Aᵀ and with D in the null space of A. y is taken to be free of noise: the
    noise of y remains in the result. Without noise it is E[x₀ | x, y] of a Gaussian whose covariance commutes with
    A⁺ A, for example inpainting with independent pixels. One evaluation, no backward pass.
    """

    def posterior_regime(self) -> Regime | None:
        return Regime(any_task=False, noise=False)

    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        base = denoise.conditional(x, sigma)
        residual = observed(denoise, x) - self.operator.forward(base.x0)
        return Prediction(base.x0 + self.operator.pseudo_inverse(residual), base.variance)


@dataclass(frozen=True)
class DiffPIR(LinearMethod):
    """Diffusion models for plug-and-play image restoration (Zhu et al. 2023, algorithm 1).

    D becomes the minimum over u of ‖y - A u‖² + ρ ‖u - D‖² with ρ = λ σ_y²/σ², D + Aᵀ (A Aᵀ + ρ I)⁻¹ (y - A D). It is
    E[x₀ | x, y] if x₀ has the covariance σ²/λ I given x. For σ_y = 0 it is DDNM. The paper tunes λ for each task: the
    released code has 7 for deblurring and 1 for inpainting and super-resolution. One evaluation, no backward pass.
    """

    scale: float = option(7.0, "λ, weight of the prior", gt=0.0, le=1e6)

    def posterior_regime(self) -> Regime | None:
        return Regime(any_task=False, noise=False)

    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        base = denoise.conditional(x, sigma)
        residual = observed(denoise, x) - self.operator.forward(base.x0)
        rho = self.scale * self.observation.sigma**2 / per_sample(sigma, x) ** 2
        return Prediction(base.x0 + self.operator.adjoint(self.operator.solve(residual, 1.0, rho)), base.variance)


@dataclass(frozen=True)
class PiGDM(LinearMethod):
    """Pseudoinverse-guided diffusion (Song et al. 2023, eq. 7):  D + σ² Jᵀ Aᵀ (r² A Aᵀ + σ_y² I)⁻¹ (y - A D).

    J = ∂D/∂x, and r² = v σ²/(v + σ²) is the variance of x₀ given x for data of variance v; the paper has v = 1. It is
    E[x₀ | x, y] of an isotropic Gaussian of variance v. With adaptive=true the correction is multiplied by r², the
    adaptive weight of the paper's algorithm 1. That algorithm also adds the correction to the result of a DDIM step
    with the coefficient √ᾱ; here it is a part of D, so that every sampler can use it. One evaluation and one backward
    pass.
    """

    differentiates: ClassVar[bool] = True

    variance: float = option(1.0, "v, variance of the data", gt=0.0, le=1e6)
    adaptive: bool = option(False, "multiply the correction by r²")

    def posterior_regime(self) -> Regime | None:
        return None if self.adaptive else Regime(equal_variances=True, variance=self.variance)

    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        base, jacobian = denoise.pullback(x, sigma)
        square = per_sample(sigma, x) ** 2
        residual = observed(denoise, x) - self.operator.forward(base.x0)
        known = self.variance * square / (self.variance + square)
        step = self.operator.adjoint(self.operator.solve(residual, known, self.observation.sigma**2))
        weight = square * known if self.adaptive else square
        return Prediction(base.x0 + coefficient(weight, x) * jacobian(step), base.variance)


@dataclass(frozen=True)
class TMPD(LinearMethod):
    """Tweedie moment projected diffusion (Boys et al. 2023):  D + C Aᵀ (diag(A C Aᵀ 1) + σ_y² I)⁻¹ (y - A D).

    C = σ² J, with J = ∂D/∂x, is the covariance of x₀ given x, and A C Aᵀ is replaced by the diagonal matrix of its row
    sums. It is E[x₀ | x, y] of a Gaussian if A C Aᵀ is diagonal, for example for inpainting with independent pixels.
    One evaluation and two backward passes.
    """

    differentiates: ClassVar[bool] = True

    def posterior_regime(self) -> Regime | None:
        return Regime(any_task=False)

    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        base, jacobian = denoise.pullback(x, sigma)
        square = coefficient(per_sample(sigma, x) ** 2, x)
        residual = observed(denoise, x) - self.operator.forward(base.x0)
        ones = self.operator.adjoint(torch.ones_like(residual))
        rows = self.operator.forward(square * jacobian(ones, retain_graph=True))
        total = rows.clamp(min=0) + self.observation.sigma**2
        scaled = torch.where(total > 0, residual / total.where(total > 0, torch.ones_like(total)), 0.0)
        return Prediction(base.x0 + square * jacobian(self.operator.adjoint(scaled)), base.variance)


@dataclass(frozen=True)
class MMPS(LinearMethod):
    """Moment matching posterior sampling (Rozet et al. 2024):  D + C Aᵀ (A C Aᵀ + σ_y² I)⁻¹ (y - A D).

    C = σ² J, with J = ∂D/∂x, is the covariance of x₀ given x. The equation is solved by conjugate gradients without the
    matrix. With enough iterations it is E[x₀ | x, y] of any Gaussian. One evaluation, and one backward pass more than
    there are iterations.
    """

    differentiates: ClassVar[bool] = True

    iterations: int = option(1, "iterations of the conjugate gradients", ge=1, le=10_000)

    def posterior_regime(self) -> Regime | None:
        # One iteration solves an equation with a multiple of the identity, m iterations any one with m values.
        if self.iterations == 1:
            return Regime(any_task=False, equal_variances=True)
        return Regime(measurements=self.iterations)

    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        base, jacobian = denoise.pullback(x, sigma)
        square = coefficient(per_sample(sigma, x) ** 2, x)
        noise = self.observation.sigma**2
        operator = self.operator

        def apply(u: Tensor) -> Tensor:
            spread = square * jacobian(operator.adjoint(u), retain_graph=True)
            return operator.forward(spread) + noise * u

        solution = _conjugate_gradients(apply, observed(denoise, x) - operator.forward(base.x0), self.iterations)
        return Prediction(base.x0 + square * jacobian(operator.adjoint(solution)), base.variance)


def _conjugate_gradients(apply: Callable[[Tensor], Tensor], r: Tensor, iterations: int) -> Tensor:
    """Solve `apply(u) = r` for each sample (Hestenes & Stiefel 1952), starting at 0.

    A sample is finished where the residual is below the rounding error of r, or where the curvature is not positive.

    Args:
        apply: symmetric positive matrix as a function of (B, ...).
        r: right-hand sides, (B, ...).
        iterations: number of iterations.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))

    u, p, square = torch.zeros_like(r), r, dot(r, r)
    least = square * torch.finfo(r.dtype).eps ** 2
    for _ in range(iterations):
        image = apply(p)
        curvature = dot(p, image)
        going = (square > least) & (curvature > 0)
        step = torch.where(going, square / curvature.where(going, torch.ones_like(curvature)), 0.0)
        u, r = u + step * p, r - step * image
        before, square = square, dot(r, r)
        p = r + torch.where(going, square / before.where(going, torch.ones_like(before)), 0.0) * p
        square = torch.where(going, square, 0.0)
    return u


@dataclass(frozen=True)
class DPS(PosteriorMethod):
    """Diffusion posterior sampling (Chung et al. 2023, algorithm 1):  D - ζ σ²/β(σ) ∇ₓ ‖y - A(D)‖.

    In the paper, each of the 1000 ancestral steps of DDPM (Ho et al. 2020) moves its result by -ζ ∇ ‖y - A(D)‖, with
    the gradient by the variance-preserving state. Such a step has the coefficient β/σ² of D in these coordinates, where
    β is the variance of the step on the linear schedule from 0.0001 to 0.02. Moving D by -ζ σ²/β ∇ₓ is therefore the
    same algorithm at 1000 steps, and can be used by every sampler with any number of steps. σ_y does not enter. A need
    not be linear. The paper has ζ = 1 on FFHQ; it tunes ζ for each task. One evaluation and one backward pass.
    """

    differentiates: ClassVar[bool] = True

    scale: float = option(1.0, "ζ, step size", ge=0.0, le=1e6)

    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        base, jacobian = denoise.pullback(x, sigma)
        operator = self.observation.operator
        residual = observed(denoise, x) - operator.forward(base.x0)
        norm = residual.flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
        direction = residual / coefficient(norm, residual)
        levels = per_sample(sigma, x)
        factor = coefficient(self.scale * levels**2 / _beta(levels), x)
        return Prediction(base.x0 + factor * jacobian(operator.pullback(base.x0, direction)), base.variance)


def _beta(sigma: Tensor) -> Tensor:
    """β of the linear schedule with 1000 steps from 0.0001 to 0.02 at noise levels (B,), interpolated in log σ."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device=sigma.device)
    products = (1 - betas).cumprod(0)
    logs = ((1 - products) / products).log() / 2
    wanted = sigma.double().log().clamp(float(logs[0]), float(logs[-1]))
    upper = torch.searchsorted(logs, wanted).clamp(1, len(logs) - 1)
    part = (wanted - logs[upper - 1]) / (logs[upper] - logs[upper - 1])
    return betas[upper - 1] + part * (betas[upper] - betas[upper - 1])
