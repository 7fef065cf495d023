"""Compatibility with samplers for version 0.1, which used denoiser methods instead of `Sampler.bind`."""

from __future__ import annotations

from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.models.model import Model
from samplerbench.models.posterior_variance import posterior_variances
from samplerbench.sampling.denoiser import Denoiser, Prediction, Sigma
from samplerbench.sampling.sampler import Sampler


def check_legacy(sampler: Sampler, model: Model) -> None:
    """Raise UserError if a version 0.1 sampler declares in `needs` an autoencoder that the model does not have."""
    if "autoencoder" in getattr(sampler, "needs", frozenset()) and model.autoencoder is None:
        raise UserError(
            f"sampler {sampler.label()} requires an autoencoder, but this model works in pixel space; use a latent "
            "model, or remove the sampler."
        )


def bind_legacy(sampler: Sampler, model: Model, sigmas: Tensor) -> Sampler:
    """Prepare a version 0.1 sampler according to its class attribute `needs`. Return other samplers unchanged.

    Args:
        sampler: the sampler.
        model: model to sample from.
        sigmas: noise levels of the grid, (N+1,) float64 on the CPU.

    Raises:
        UserError: if the model does not meet the requirements of the sampler.
    """
    check_legacy(sampler, model)
    if "posterior variance" not in getattr(sampler, "needs", frozenset()):
        return sampler
    variances, evaluations = posterior_variances(model, sigmas)
    return sampler.with_state(legacy_variances=variances, bound_evaluations=evaluations)


class LegacyDenoiser(Denoiser):
    """A denoiser with the two additional methods of version 0.1.

    Args:
        inner: the denoiser.
        model: the model.
        sampler: sampler prepared by `bind_legacy`.
    """

    def __init__(self, inner: Denoiser, model: Model, sampler: Sampler) -> None:
        self.inner, self.model, self.sampler = inner, model, sampler
        self.levels, self.process, self.prediction = inner.levels, inner.process, inner.prediction
        self.observation = inner.observation

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        return self.inner.predict(x, sigma)

    def rows(self, index: Tensor) -> Denoiser:
        return LegacyDenoiser(self.inner.rows(index), self.model, self.sampler)

    def posterior_variance(self, sigma: float) -> float:
        """Return κ(σ) of `samplerbench.models.posterior_variances`."""
        variances: dict[float, float] = getattr(self.sampler, "legacy_variances", {})
        return variances[sigma]

    def scale_latents(self, z: Tensor) -> Tensor:
        """Convert latents z of the autoencoder, (B, *shape), to states: (z - shift)·scale."""
        autoencoder = self.model.autoencoder
        assert autoencoder is not None
        return (z - autoencoder.shift) * autoencoder.scale
