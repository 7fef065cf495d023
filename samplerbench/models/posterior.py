"""The exact posterior of a Gaussian mixture under a linear task: denoiser, moments and draws in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samplerbench.errors import UserError
from samplerbench.models.exact import Denoises, ExactModel, MixtureDenoiser
from samplerbench.sampling.noise import Purpose, normal, uniform
from samplerbench.sampling.task import LinearOperator
from samplerbench.sampling.view import ModelView

MAX_DIMENSION = 4096
"""The largest number of values in an image. The posterior computes with dense matrices."""

RANK = 1e-9
"""Singular values of A below this part of the largest one count as 0."""


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a distribution of d values.

    Attributes:
        mean: mean, (d,) float64.
        covariance: covariance, (d, d) float64.
    """

    mean: Tensor
    covariance: Tensor


class ExactPosterior:
    """The posterior p(x₀ | y) of a mixture Σ_k w_k N(μ_k, C_k) with diagonal C_k, for y = A x₀ + σ_y n.

    Component k has the posterior N(μ_k + G (y - A μ_k), C_k - G A C_k) with G = C_k Aᵀ S⁻¹, S = A C_k Aᵀ + σ_y² I, and
    the weight w_k N(y; A μ_k, S) up to a common factor (Bishop 2006, section 2.3.3).

    A noisy state x = x₀ + σ z is a second observation. Given x, component k is the Gaussian with the variances
    v σ²/(v + σ²) and the means (v x + σ² μ_k)/(v + σ²), to which the same equations apply. This gives E[x₀ | x, y].

    y is projected onto the range of A, outside of which it has no information about x₀.

    Args:
        problem: denoiser of the mixture.
        operator: operator A of the task.
        sigma: σ_y ≥ 0.
        network: module that evaluates the problem, whose evaluations are counted. If None, the problem.

    Raises:
        UserError: if the images are too large, or if the problem has components of zero width and σ_y = 0.
    """

    def __init__(
        self, problem: MixtureDenoiser, operator: LinearOperator, sigma: float, network: nn.Module | None = None
    ) -> None:
        d = problem.means.shape[1]
        if d > MAX_DIMENSION:
            raise UserError(f"the exact posterior requires images of at most {MAX_DIMENSION:,} values, not {d:,}.")
        if problem.isotropic:
            raise UserError("the exact posterior is available for the problems gaussian and mixture, not for points.")
        device = problem.means.device
        self.problem, self.variance = problem, sigma**2
        self.network = problem if network is None else network
        basis = torch.eye(d, dtype=torch.float64, device=device).reshape(d, *problem.shape)
        matrix = operator.forward(basis).flatten(1).T
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        rank = int((values > RANK * values[0]).sum())
        self.left = left[:, :rank]
        self.matrix = values[:rank, None] * right[:rank]
        """A in the coordinates of its range, (r, d)."""

    def denoiser(self, observation: Tensor) -> Denoises:
        """Return the function (x, σ, labels) → E[x₀ | x, y].

        Args:
            observation: y, (B, *observed).
        """
        y = self._project(observation)

        def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
            means, _, scores = self._condition(x.double().flatten(1), sigma.double(), y)
            weights = self.problem.of_labels(scores, labels).softmax(1)
            return (weights[:, :, None] * means).sum(1).reshape(x.shape)

        return denoise

    def predict(self, x: Tensor, sigma: Tensor, observation: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compute E[x₀ | x, y] as one evaluation of the network, (B, *shape) float64.

        Args:
            x: noisy states, (B, *shape).
            sigma: noise levels, (B,).
            observation: y, (B, *observed).
            labels: class labels, (B,) int64. Only the components of the class are used. None uses all.
        """
        made: Tensor = self.network(x, sigma, labels, self.denoiser(observation))
        return made

    def components(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the Gaussians of p(x₀ | y) for one observation.

        Args:
            observation: y, (*observed).

        Returns:
            Weights (K,), means (K, d) and covariances (K, d, d), float64.
        """
        y = self._project(observation[None])
        means, gains, scores = self._condition(None, None, y)
        covariances = [
            torch.diag(v) - gain[0] @ (self.matrix * v) for v, gain in zip(self.problem.variances, gains, strict=True)
        ]
        return scores[0].softmax(0), means[0], torch.stack(covariances)

    def moments(self, observation: Tensor) -> Moments:
        """Compute the mean and the covariance of p(x₀ | y) for one observation (*observed)."""
        weights, means, covariances = self.components(observation)
        mean = weights @ means
        spread = means - mean
        return Moments(mean, torch.einsum("k,kij->ij", weights, covariances) + (weights[:, None] * spread).T @ spread)

    def draws(self, observation: Tensor, n: int, seed: int = 0) -> Tensor:
        """Draw from p(x₀ | y) for one observation.

        A draw x₀ of component k is moved to x₀ + G (y - A x₀ - σ_y n), which has the posterior distribution (Matheron's
        rule).

        Args:
            observation: y, (*observed).
            n: number of draws.
            seed: random seed.

        Returns:
            Draws, (n, d) float64.
        """
        y = self._project(observation[None])
        _, gains, scores = self._condition(None, None, y)
        index = torch.arange(n, device=y.device)
        mass = scores[0].softmax(0).cumsum(0)
        component = torch.searchsorted(mass, uniform(seed, Purpose.POSTERIOR, index, 0)).clamp(max=len(mass) - 1)
        z = normal(seed, Purpose.POSTERIOR, index, 1, (self.matrix.shape[1],))
        noise = math.sqrt(self.variance) * normal(seed, Purpose.POSTERIOR, index, 2, (len(self.matrix),))
        x = self.problem.means[component] + self.problem.variances[component].sqrt() * z
        residual = y - x @ self.matrix.T - noise
        moved = torch.stack([gain[0] for gain in gains])[component]
        return x + (moved @ residual[:, :, None])[:, :, 0]

    def _project(self, observation: Tensor) -> Tensor:
        """Return observations (B, *observed) in the coordinates of the range of A, (B, r) float64."""
        return observation.double().flatten(1) @ self.left

    def _condition(self, x: Tensor | None, sigma: Tensor | None, y: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Condition every component on y, and on noisy states.

        Args:
            x: noisy states, (B, d). None for none.
            sigma: noise levels, (B,). None without states.
            y: observations in the range of A, (B, r).

        Returns:
            Means (B, K, d); for each component the gains G, (1 or B, d, r); and the logarithms of the weights up to a
            constant, (B, K).
        """
        problem, matrix = self.problem, self.matrix
        levels = None
        if sigma is not None:
            # One factorisation serves the whole batch if all noise levels are equal.
            levels = sigma[:1, None] if bool((sigma == sigma[0]).all()) else sigma[:, None]
        identity = self.variance * torch.eye(len(matrix), dtype=torch.float64, device=y.device)
        means, gains, scores = [], [], []
        for mean, v, log_weight in zip(problem.means, problem.variances, problem.log_weights, strict=True):
            score, c, m = log_weight, v[None], mean.expand(len(y), -1)
            if x is not None and levels is not None:
                total = v + levels**2
                c, m = v * levels**2 / total, (v * x + levels**2 * mean) / total
                score = score - 0.5 * ((x - mean).square() / total + total.log()).sum(1)
            residual = y - m @ matrix.T
            factor = torch.linalg.cholesky((matrix * c[:, None]) @ matrix.T + identity)
            # A single factor solves for all samples at once, as columns of one matrix.
            columns = residual.T[None] if len(factor) == 1 else residual[:, :, None]
            white = torch.linalg.solve_triangular(factor, columns, upper=False)
            white = white[0].T if len(factor) == 1 else white[:, :, 0]
            score = score - 0.5 * white.square().sum(1) - factor.diagonal(dim1=1, dim2=2).log().sum(1)
            gain = torch.cholesky_solve(matrix * c[:, None], factor).transpose(1, 2)
            moved = gain @ columns
            means.append(m + (moved[0].T if len(factor) == 1 else moved[:, :, 0]))
            gains.append(gain)
            scores.append(score)
        return torch.stack(means, 1), gains, torch.stack(scores, 1)


def exact_posterior(model: ModelView, user: str) -> ExactPosterior:
    """Create the exact posterior of a model for its task.

    Args:
        model: the model, with a task.
        user: what requires the posterior, for the message.

    Raises:
        UserError: if the model is not an exact problem, or if its task is not linear.
    """
    if not isinstance(model, ExactModel):
        raise UserError(
            f"{user} requires a problem whose posterior is known: use the model exact:gaussian or exact:mixture."
        )
    if model.observation is None:
        raise UserError(f"{user} requires a task.")
    operator = model.observation.linear(user)
    return ExactPosterior(model.problem, operator, model.observation.sigma, model.network)
