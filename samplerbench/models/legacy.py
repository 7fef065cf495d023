"""Samplers written for version 0.1, which asked the denoiser for what `Sampler.bind` now provides."""

from __future__ import annotations

from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.models.model import Model
from samplerbench.models.posterior_variance import posterior_variances
from samplerbench.sampling.denoiser import Denoiser, Prediction, Sigma
from samplerbench.sampling.sampler import Sampler


def check_legacy(sampler: Sampler, model: Model) -> None:
    """Raise UserError where the model lacks the autoencoder that a sampler of version 0.1 names in `needs`."""
    if "autoencoder" in getattr(sampler, "needs", frozenset()) and model.autoencoder is None:
        raise UserError(
            f"sampler {sampler.label()} needs an autoencoder, and this model works in pixel space; name a latent "
            "model, or leave the sampler out."
        )


def bind_legacy(sampler: Sampler, model: Model, sigmas: Tensor) -> Sampler:
    """The sampler with what its class attribute `needs` named in version 0.1; unchanged where there is none.

    Raises:
        UserError: the model lacks it.
    """
    check_legacy(sampler, model)
    if "posterior variance" not in getattr(sampler, "needs", frozenset()):
        return sampler
    variances, evaluations = posterior_variances(model, sigmas)
    return sampler.with_state(legacy_variances=variances, bound_evaluations=evaluations)


class LegacyDenoiser(Denoiser):
    """A denoiser with the two methods that samplers of version 0.1 could use besides D."""

    def __init__(self, inner: Denoiser, model: Model, sampler: Sampler) -> None:
        self.inner, self.model, self.sampler = inner, model, sampler
        self.levels, self.process, self.prediction = inner.levels, inner.process, inner.prediction

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        return self.inner.predict(x, sigma)

    def rows(self, index: Tensor) -> Denoiser:
        return LegacyDenoiser(self.inner.rows(index), self.model, self.sampler)

    def posterior_variance(self, sigma: float) -> float:
        """κ(σ) of `samplerbench.models.posterior_variances`."""
        variances: dict[float, float] = getattr(self.sampler, "legacy_variances", {})
        return variances[sigma]

    def scale_latents(self, z: Tensor) -> Tensor:
        """The states of the autoencoder's own latents z (B, *shape): (z - shift)·scale."""
        autoencoder = self.model.autoencoder
        assert autoencoder is not None
        return (z - autoencoder.shift) * autoencoder.scale
