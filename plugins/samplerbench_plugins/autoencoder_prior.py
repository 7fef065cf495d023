"""The prior of a latent model's autoencoder: the baseline that latent diffusion must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from samplerbench.models import Model
from samplerbench.sampling import Generator, Inputs, ModelView, Noise, UserError


@dataclass(frozen=True)
class AutoencoderPrior(Generator):
    """Samples of a latent model's autoencoder alone (Kingma & Welling 2014):  z ~ N(0, I), decoded in one pass.

    z has the autoencoder's own scale, not that of the diffusion's states. The diffusion network is not evaluated: the
    row shows what the decoder and its Kullback-Leibler term achieve without diffusion.
    """

    model: ClassVar[Model]

    def bind(self, model: ModelView) -> Self:
        if not isinstance(model, Model) or model.autoencoder is None:
            raise UserError(
                f"generator {self.label()} draws from an autoencoder's prior, and this model works in pixel space; "
                "name a latent model, or leave the generator out."
            )
        return self.with_state(model=model)

    def images(self, index: Tensor, inputs: Inputs, seed: int) -> Tensor:
        model, autoencoder = self.model, self.model.autoencoder
        assert autoencoder is not None
        z = Noise(seed, index, model.shape, model.state_dtype)()
        return model.decode((z - autoencoder.shift) * autoencoder.scale)
