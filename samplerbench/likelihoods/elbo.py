"""The evidence lower bound of a variational autoencoder, and its importance-weighted bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from samplerbench.likelihoods.gaussian import discretised_nll, gaussian_kl, gaussian_nll
from samplerbench.likelihoods.images import Images
from samplerbench.models.latent import Autoencoder
from samplerbench.sampling.noise import Purpose, normal


@dataclass(frozen=True)
class ElboTerms:
    """The negative bounds of each image, in nats.

    Attributes:
        divergence: KL(q(z | x) ‖ N(0, I)), (n,) float64.
        reconstruction: -E_q log p(x | z), the mean over the K samples, (n,) float64.
        importance_weighted: -log (1/K) Σ p(x, z_k)/q(z_k | x) (Burda et al. 2016, eq. 8), (n,) float64.
    """

    divergence: Tensor
    reconstruction: Tensor
    importance_weighted: Tensor

    @property
    def total(self) -> Tensor:
        """The negative evidence lower bound, (n,): at least -log p(x) on average."""
        return self.divergence + self.reconstruction


@torch.no_grad()
def elbo_terms(
    autoencoder: Autoencoder,
    images: Images,
    rows: Tensor,
    variance: float,
    samples: int = 16,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | None = None,
) -> ElboTerms:
    """Compute the evidence lower bound of images (Kingma & Welling 2014, eq. 3) and the importance-weighted bound.

    -log p(x) ≤ KL(q(z | x) ‖ N(0, I)) - E_q log p(x | z). p(x | z) is a Gaussian with mean Dec(z) and one variance for
    all values: its mass between the grey levels (`discretised_nll`), or its density for images without grey levels.
    The divergence is exact. Both bounds use the same K samples, which depend only on the seed, the image and k.

    Args:
        autoencoder: the autoencoder.
        images: the images.
        rows: rows of the images to evaluate, (m,) int64.
        variance: variance of the decoder.
        samples: number K of samples of each posterior.
        seed: random seed.
        batch_size: images per batch. It does not change the terms.
        device: device of the autoencoder. None for the CPU.

    Returns:
        The terms of the m images.

    Raises:
        UserError: if the encoder is deterministic.
    """
    parts = []
    for part in rows.split(batch_size):
        index, x0 = part.to(device), images.states(part).to(device)
        values = None if images.levels is None else images.values[part].to(device)
        mean, log_variance = autoencoder.posterior(x0)
        divergence = gaussian_kl(mean, log_variance.exp(), 1.0).flatten(1).sum(1)
        nlls, log_weights = [], []
        for k in range(samples):
            noise = normal(seed, Purpose.LIKELIHOOD, index, k, tuple(mean.shape[1:]))
            z = mean + (log_variance / 2).exp() * noise
            decoded = autoencoder.decode_unscaled(z).double()
            if values is None or images.levels is None:
                terms = gaussian_nll(x0, decoded, variance)
            else:
                terms = discretised_nll(values, images.levels, decoded, variance)
            nll = terms.flatten(1).sum(1)
            # log p(z) - log q(z | x), with z = mean + deviation·noise
            ratio = 0.5 * (noise.square() + log_variance - z.square()).flatten(1).sum(1)
            nlls.append(nll)
            log_weights.append(ratio - nll)
        importance_weighted = math.log(samples) - torch.stack(log_weights).logsumexp(0)
        parts.append([t.cpu() for t in (divergence, torch.stack(nlls).mean(0), importance_weighted)])
    return ElboTerms(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def optimal_variance(
    autoencoder: Autoencoder,
    images: Images,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | None = None,
) -> float:
    """Compute the optimal variance of the decoder, E_q‖x - Dec(z)‖²/d (Rybkin et al. 2021).

    Of all variances that are the same for each value, it maximises the evidence lower bound of a density.

    Args:
        autoencoder: the autoencoder.
        images: the images, each with one sample of its posterior.
        seed: random seed.
        batch_size: images per batch.
        device: device of the autoencoder. None for the CPU.

    Returns:
        The mean squared error over all images and values.

    Raises:
        UserError: if the encoder is deterministic.
    """
    total = 0.0
    for part in torch.arange(len(images)).split(batch_size):
        x0 = images.states(part).to(device)
        mean, log_variance = autoencoder.posterior(x0)
        noise = normal(seed, Purpose.ESTIMATE, part.to(device), 0, tuple(mean.shape[1:]))
        decoded = autoencoder.decode_unscaled(mean + (log_variance / 2).exp() * noise)
        total += float((x0 - decoded.double()).square().sum())
    return total / (len(images) * images.dimensions)
