"""The likelihood of the probability-flow ODE, by the instantaneous change of variables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from samplerbench.errors import RunError, UserError, argument
from samplerbench.likelihoods.gaussian import GaussianPrior
from samplerbench.models.model import Model
from samplerbench.sampling import Denoiser, Inputs, Noise, Prediction, Sampler, Sigma, Step
from samplerbench.sampling.denoiser import per_sample
from samplerbench.sampling.driver import drive
from samplerbench.sampling.noise import Purpose, normal

Probe = Literal["rademacher", "gaussian"]

EXACT_SIGMA_MIN = 1e-6
"""Where the ODE of a closed-form denoiser ends. It is defined at every noise level."""


@dataclass(frozen=True)
class Divergence:
    """How the trace of ∂D/∂x is computed.

    Attributes:
        probes: number K of random vectors of Hutchinson's estimator. None: the exact trace, with one backward pass for
            each dimension.
        distribution: distribution of the random vectors.
    """

    probes: int | None = 1
    distribution: Probe = "rademacher"

    def vectors(self, seed: int, index: Tensor, shape: tuple[int, ...], repeat: int = 0) -> list[Tensor]:
        """The random vectors ε of some images, K tensors (B, *shape) float64. Empty for the exact trace."""
        found = []
        for k in range(self.probes or 0):
            z = normal(seed, Purpose.PROBE, index, repeat * (self.probes or 0) + k, shape)
            found.append(z if self.distribution == "gaussian" else torch.where(z < 0, -1.0, 1.0).double())
        return found


class LikelihoodDenoiser(Denoiser):
    """A denoiser of states with the integral of the divergence as one more value, for a solver of the ODE.

    The state is (x, ℓ), (B, d+1, 1, 1). In the coordinates y and τ of `Ode`, the solver integrates the slope
    (y - D)/τ, so that D_ℓ = ℓ - div with div = d - tr ∂D/∂y gives dℓ/dτ = div((y - D)/τ). The value of log p(y)
    at the start is that at the end plus ℓ (Chen et al. 2018, eq. 8; Song et al. 2021, eq. 39).

    Args:
        inner: denoiser D(x, σ) of the batch.
        shape: shape (C, H, W) of x.
        end: noise level at which the integral ends.
        vectors: vectors of Hutchinson's estimator, each (B, C, H, W). Empty for the exact trace.
    """

    def __init__(self, inner: Denoiser, shape: tuple[int, int, int], end: float, vectors: list[Tensor]) -> None:
        self.inner, self.shape, self.vectors = inner, shape, vectors
        self.process, self.prediction = inner.process, inner.prediction
        self.levels = torch.tensor([end], dtype=torch.float64)

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        state, integral = x[:, :-1, 0, 0].reshape(-1, *self.shape), x[:, -1, 0, 0]
        x0, trace = self.traced(state, sigma)
        ratio = self.ratio(per_sample(sigma, x))
        integral = integral / ratio - (x.shape[1] - 1 - ratio * trace)
        return Prediction(torch.cat([x0.flatten(1), integral[:, None]], 1)[:, :, None, None])

    def traced(self, x: Tensor, sigma: Sigma) -> tuple[Tensor, Tensor]:
        """D, (B, C, H, W), and the trace of ∂D/∂x, (B,)."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            x0 = self.inner.predict(leaf, sigma).x0
            d = x[0].numel()
            trace = torch.zeros(len(x), dtype=x.dtype, device=x.device)
            for k in range(len(self.vectors) or d):
                last = k + 1 == (len(self.vectors) or d)
                if self.vectors:
                    v = self.vectors[k]
                    (product,) = torch.autograd.grad(x0, leaf, v, retain_graph=not last)
                    trace += (product * v).flatten(1).sum(1) / len(self.vectors)
                else:
                    (product,) = torch.autograd.grad(x0.flatten(1)[:, k].sum(), leaf, retain_graph=not last)
                    trace += product.flatten(1)[:, k]
        return x0.detach(), trace

    def ratio(self, sigma: Tensor) -> Tensor:
        """σ/τ of the ODE's coordinates y = (τ/σ) x: 1 + σ for a rectified flow, otherwise 1."""
        return 1 + sigma if self.process.ends else torch.ones_like(sigma)

    def rows(self, index: Tensor) -> LikelihoodDenoiser:
        vectors = [v[index] for v in self.vectors]
        return LikelihoodDenoiser(self.inner.rows(index), self.shape, float(self.levels[0]), vectors)


@dataclass(frozen=True)
class OdeTerms:
    """-log p(x) of each image, in nats: its two parts by the change of variables.

    Attributes:
        prior: -log p(x_T) of the end of the ODE in coordinates y, (n,) float64.
        volume: -∫ div dτ, the change of volume, (n,) float64.
    """

    prior: Tensor
    volume: Tensor

    @property
    def total(self) -> Tensor:
        """-log p(x), (n,)."""
        return self.prior + self.volume


class _NoNoise(Noise):
    """The noise source of a solver, which must not draw."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.draws = sampler, 0

    def __call__(self) -> Tensor:
        raise RunError(f"sampler {self.sampler.spec} draws noise, although it is a solver of the ODE.")


def increasing_grid(sampler: Sampler, model: Model, sigmas: Tensor) -> Tensor:
    """The noise levels of the ODE from data to noise: those of the grid, with σ_min in place of 0.

    σ_min is the smallest level of the model, and 10⁻⁶ for a distribution with a closed-form denoiser. A grid that
    contains σ_min has one interval less.

    Args:
        sampler: the sampler. One that chooses its own steps only gets the two ends.
        model: the model.
        sigmas: noise levels, (N+1,) float64, strictly decreasing, ending at 0.

    Raises:
        UserError: if the sampler is not a solver of the probability-flow ODE in both directions.
    """
    if not sampler.reversible:
        raise UserError(
            f"sampler {sampler.spec} does not solve the probability-flow ODE from data to noise, so it has no "
            f"likelihood; use pf-ode, or {argument('method', 'vlb')} for a sampler with Gaussian steps."
        )
    least = EXACT_SIGMA_MIN if model.draws else float(model.levels[0])
    inner = [s for s in sigmas.tolist() if s > least * (1 + 1e-9)]
    return torch.tensor([least, *reversed(inner)], dtype=torch.float64)


def ode_terms(
    model: Model,
    sampler: Sampler,
    sigmas: Tensor,
    x: Tensor,
    inputs: Inputs,
    rows: Tensor,
    divergence: Divergence,
    seed: int = 0,
    repeat: int = 0,
    batch_size: int = 256,
) -> OdeTerms:
    """Compute -log p(x) of states by the probability-flow ODE: d log p(x_σ)/dσ = -div((x - D)/σ).

    The ODE is solved from σ_min to σ_T by a sampler that integrates in both directions (`Sampler.reversible`). The
    states are float64; the network keeps its dtype. The integral of the divergence is part of the state of the
    solver (Chen et al. 2018; Grathwohl et al. 2019; Song et al. 2021, section 4.3).

    Args:
        model: the model.
        sampler: the solver.
        sigmas: increasing noise levels σ_min … σ_T of `increasing_grid`.
        x: states at σ_min, (m, *shape) float64.
        inputs: labels of all images.
        rows: row of each state among the images, (m,) int64: its probes depend on it.
        divergence: how the divergence is computed.
        seed: random seed of the probes.
        repeat: index of the repetition, which draws other probes.
        batch_size: images per batch.

    Returns:
        The two parts of -log p(x).

    Raises:
        RunError: if the solver fails.
    """
    prior = GaussianPrior.of(model, float(sigmas[-1]))
    parts: list[OdeTerms] = []
    for part, states in zip(rows.split(batch_size), x.split(batch_size), strict=True):
        index = part.to(model.device)
        inner = model.denoiser(model.inputs(index, inputs.rows(part).to(model.device)))
        parts.append(ode_of_batch(model, sampler, sigmas, states, inner, index, prior, divergence, seed, repeat))
    return OdeTerms(torch.cat([p.prior for p in parts]), torch.cat([p.volume for p in parts]))


def ode_of_batch(
    model: Model,
    sampler: Sampler,
    sigmas: Tensor,
    x: Tensor,
    inner: Denoiser,
    index: Tensor,
    prior: GaussianPrior,
    divergence: Divergence,
    seed: int = 0,
    repeat: int = 0,
) -> OdeTerms:
    """Compute -log p(x) of one batch. See `ode_terms`.

    Args:
        model: the model.
        sampler: the solver.
        sigmas: increasing noise levels σ_min … σ_T of `increasing_grid`.
        x: states at σ_min, (B, *shape) float64.
        inner: denoiser of the batch.
        index: rows of the images of the batch on the device of the model, (B,) int64.
        prior: distribution of the initial states at σ_T.
        divergence: how the divergence is computed.
        seed: random seed of the probes.
        repeat: index of the repetition, which draws other probes.
    """
    start, end, d = float(sigmas[0]), float(sigmas[-1]), x[0].numel()
    vectors = divergence.vectors(seed, index, model.shape, repeat)
    denoise = LikelihoodDenoiser(inner, model.shape, end, vectors)
    state = x.to(model.device).double().flatten(1)
    state = torch.cat([state, state.new_zeros(len(state), 1)], 1)[:, :, None, None]
    reached: list[Step] = []

    def keep(_: int, step: Step) -> None:
        if step.sigma > 0:  # an adaptive solver ends with the step to 0, which is no part of the ODE
            reached[:] = [step]

    drive(sampler, denoise, state, sigmas, _NoNoise(sampler), keep)
    final = reached[0].x[:, :, 0, 0]
    first, last = (float(denoise.ratio(sigmas.new_tensor(level))) for level in (start, end))
    # Densities in coordinates y = x/ratio.
    at_end = prior.nll(final[:, :-1].reshape(-1, *model.shape)) - d * math.log(last)
    volume = d * math.log(first) - final[:, -1] / last
    return OdeTerms(at_end.cpu(), volume.cpu())


__all__ = ["Divergence", "LikelihoodDenoiser", "OdeTerms", "increasing_grid", "ode_of_batch", "ode_terms"]
