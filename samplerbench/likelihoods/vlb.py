"""The variational bound of a chain with Gaussian steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplerbench.boundary import plugin_call, shown
from samplerbench.errors import RunError, UserError, argument
from samplerbench.likelihoods.gaussian import GaussianPrior, Variance, discretised_nll, gaussian_kl, gaussian_nll
from samplerbench.likelihoods.images import Images
from samplerbench.models.model import Model
from samplerbench.sampling import Chain, Denoiser, Inputs, Prediction, Sampler, intervals
from samplerbench.sampling.noise import Purpose, normal


@dataclass(frozen=True)
class BoundTerms:
    """The terms of the bound of each image, in nats (Ho et al. 2020, eq. 5).

    Attributes:
        prior: L_T = KL(q(x_T | x₀) ‖ p(x_T)), (n,) float64.
        denoising: L_{t-1} = KL(q(x_t' | x_t, x₀) ‖ p(x_t' | x_t)) of each step but the last, (n, N-1) float64, from the
            highest noise level to the lowest.
        reconstruction: L_0 = -log p(x₀ | x_1), (n,) float64.
    """

    prior: Tensor
    denoising: Tensor
    reconstruction: Tensor

    @property
    def total(self) -> Tensor:
        """The bound L_T + Σ L_{t-1} + L_0 ≥ -log p(x₀) of each image, (n,)."""
        return self.prior + self.denoising.sum(1) + self.reconstruction


@torch.no_grad()
def bound_terms(
    model: Model,
    sampler: Sampler,
    sigmas: Tensor,
    images: Images,
    inputs: Inputs,
    rows: Tensor,
    seed: int = 0,
    batch_size: int = 256,
) -> BoundTerms:
    """Compute the variational bound of images for the chain of a sampler (Ho et al. 2020, eq. 5; Bao et al. 2022).

    -log p(x₀) ≤ L_T + Σ L_{t-1} + L_0. Each term is estimated with one x_t ~ q(x_t | x₀), whose noise depends only on
    the seed, the image and the step. Both kernels of a term come from `Sampler.transition`, from which sampling draws:
    p with the prediction of the model, and the mean of q with D = x₀. Without grey levels, the decoder is a density.
    It takes one network evaluation per image and step.

    Args:
        model: the model.
        sampler: sampler with a Gaussian kernel, prepared by `bind`.
        sigmas: noise levels, (N+1,) float64 on the CPU, strictly decreasing, ending at 0.
        images: the images.
        inputs: labels of the images, n rows.
        rows: rows of the images to evaluate, (m,) int64.
        seed: random seed.
        batch_size: images per batch. It does not change the terms.

    Returns:
        The terms of the m images.

    Raises:
        UserError: if the sampler has no Gaussian kernel, or a deterministic one.
    """
    prior = GaussianPrior.of(model, float(sigmas[0]))
    found = []
    for part in rows.split(batch_size):
        index = part.to(model.device)
        denoise = model.denoiser(model.inputs(index, inputs.rows(part).to(model.device)))
        found.append(bound_of_batch(model, sampler, sigmas, images, denoise, part, index, prior, seed))
    return BoundTerms(
        torch.cat([terms.prior for terms in found]),
        torch.cat([terms.denoising for terms in found]),
        torch.cat([terms.reconstruction for terms in found]),
    )


@torch.no_grad()
def bound_of_batch(
    model: Model,
    sampler: Sampler,
    sigmas: Tensor,
    images: Images,
    denoise: Denoiser,
    rows: Tensor,
    index: Tensor,
    prior: GaussianPrior,
    seed: int,
) -> BoundTerms:
    """Compute the terms of one batch. See `bound_terms`.

    Args:
        model: the model.
        sampler: sampler with a Gaussian kernel, prepared by `bind`.
        sigmas: noise levels, (N+1,) float64 on the CPU.
        images: the images.
        denoise: denoiser of the batch.
        rows: rows of the images of the batch, (B,) int64 on the CPU.
        index: the same rows on the device of the model.
        prior: distribution of the initial states at the highest noise level.
        seed: random seed.
    """
    chain = Chain.of(denoise, sigmas)
    x0 = images.states(rows).to(model.device)
    denoising: list[Tensor] = []
    reconstruction = torch.zeros(len(rows), dtype=torch.float64)
    for i, (s, t) in enumerate(intervals(sigmas)):
        x = x0 + s * normal(seed, Purpose.LIKELIHOOD, index, i, model.shape)
        prediction = _double(denoise.predict(x.to(model.state_dtype), s))
        mean, variance = kernel(sampler, x, prediction, s, t, chain)
        if t > 0:
            exact, _ = kernel(sampler, x, Prediction(x0, prediction.variance), s, t, chain)
            terms = gaussian_kl(exact - mean, forward_variance(sampler, s, t), variance)
        elif images.levels is None:
            terms = gaussian_nll(x0, mean, variance)
        else:
            terms = discretised_nll(images.values[rows].to(model.device), images.levels, mean, variance)
        total = terms.flatten(1).sum(1).cpu()
        if t > 0:
            denoising.append(total)
        else:
            reconstruction = total
    stacked = torch.stack(denoising, 1) if denoising else torch.zeros(len(rows), 0, dtype=torch.float64)
    return BoundTerms(prior.kl(x0, float(sigmas[0])).cpu(), stacked, reconstruction)


def _double(prediction: Prediction) -> Prediction:
    variance = None if prediction.variance is None else prediction.variance.double()
    return Prediction(prediction.x0.double(), variance)


def kernel_problem(sampler: Sampler) -> str | None:
    """Return why a sampler has no variational bound, in one sentence without a full stop, or None if it has one."""
    if type(sampler).transition is Sampler.transition:
        return f"{sampler.spec} has no Gaussian reverse kernel"
    if not _forward_variance(sampler, 2.0, 1.0) > 0:
        return f"{sampler.spec} reverses a forward process without noise, so its bound is infinite"
    return None


def check_kernel(sampler: Sampler) -> None:
    """Check that a sampler has a variational bound, before anything is evaluated.

    Raises:
        UserError: if the sampler has no Gaussian kernel, or a deterministic one.
    """
    if type(sampler).transition is Sampler.transition:
        raise _no_kernel(sampler)
    forward_variance(sampler, 2.0, 1.0)


def _no_kernel(sampler: Sampler) -> UserError:
    return UserError(
        f"sampler {sampler.spec} has no Gaussian reverse kernel, so it has no variational bound; use ddpm, ddim:eta=1 "
        f"or analytic-dpm, or {argument('method', 'nll')} with pf-ode."
    )


def kernel(
    sampler: Sampler, x: Tensor, prediction: Prediction, s: float, t: float, chain: Chain
) -> tuple[Tensor, Variance]:
    """Return `Sampler.transition` after a check.

    Raises:
        UserError: if the sampler has no Gaussian kernel, or its variance is 0.
    """
    with plugin_call(sampler, "in transition"):
        found = sampler.transition(x, prediction, s, t, chain)
    if found is None:
        raise _no_kernel(sampler)
    if not _is_kernel(found, x):
        raise RunError(
            f"sampler {sampler.label()}: transition returned {shown(found)}; it must be None, or a mean and a variance "
            f"of the shape {tuple(x.shape)}, where the variance may be a number."
        )
    mean, variance = found
    if not isinstance(variance, Tensor) and not variance > 0:
        raise UserError(
            f"sampler {sampler.spec}: the variance of its step from σ = {s:g} to {t:g} is 0, so its variational bound "
            "is infinite; use another sampler, such as ddpm."
        )
    return mean, variance


def _is_kernel(found: Any, x: Tensor) -> bool:
    if not isinstance(found, tuple) or len(found) != 2:
        return False
    mean, variance = found
    if not isinstance(mean, Tensor) or mean.shape != x.shape:
        return False
    if isinstance(variance, Tensor):
        return variance.shape == x.shape
    return isinstance(variance, float | int) and not isinstance(variance, bool)


def forward_variance(sampler: Sampler, s: float, t: float) -> float:
    """Return `Sampler.forward_variance` after a check.

    Raises:
        UserError: if it is 0: the forward process is deterministic, and the bound is infinite.
    """
    variance = _forward_variance(sampler, s, t)
    if not variance > 0:
        raise UserError(
            f"sampler {sampler.spec} reverses a forward process without noise, so its variational bound is infinite; "
            "use a stochastic process, such as ddpm, ddim:eta=1 or analytic-dpm:form=ddpm, or "
            f"{argument('method', 'nll')} with pf-ode."
        )
    return variance


def _forward_variance(sampler: Sampler, s: float, t: float) -> float:
    with plugin_call(sampler, "in forward_variance"):
        variance = sampler.forward_variance(s, t)
    if isinstance(variance, bool) or not isinstance(variance, float | int):
        raise RunError(f"sampler {sampler.label()}: forward_variance returned {shown(variance)}; it must be a number.")
    return variance
