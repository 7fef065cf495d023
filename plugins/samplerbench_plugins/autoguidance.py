"""Autoguidance: guidance by a weaker model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from torch import Tensor, nn

from samplerbench.models import Model, second_model_of
from samplerbench.sampling import (
    ConditionalDenoiser,
    Guidance,
    Inputs,
    ModelView,
    Prediction,
    Sigma,
    UserError,
    option,
)


@dataclass(frozen=True)
class Autoguidance(Guidance):
    """Guidance by a weaker model (Karras et al. 2024, "Guiding a diffusion model with a bad version of itself", eq. 3).

    D = D₂ + g (D₁ - D₂), where D₁ is the model and D₂ a second one for the same states and labels: smaller, trained for
    a shorter time, or both. g = 1 is the model itself. Both predictions have the labels of the batch, if there are any.
    The evaluations of the second model are counted separately, in the columns of a classifier, because they usually
    cost less. Further parameters are those of a second model that is registered:
    `autoguidance/exact:scale=2,problem=mixture,width=0.9`.
    """

    model: str = option("", "the second model: a checkpoint folder, a hub id or a registered name", positional=True)
    scale: float = option(2.0, "g: 1 is the model without guidance", ge=0.0)
    clip: Literal["after", "before"] = option(
        "after", "whether a model that clips x₀ clips the guided one, or the one that is guided"
    )
    config: tuple[tuple[str, str], ...] = option((), "parameters of the second model", rest=True)

    second: ClassVar[_Second]

    def bind(self, model: ModelView) -> Self:
        if not self.model:
            raise UserError("guidance autoguidance requires a second model: autoguidance:model=FOLDER.")
        parameters = ",".join(f"{name}={value}" for name, value in self.config)
        second = second_model_of(model, self.model + (f":{parameters}" if parameters else ""))
        return self.with_state(second=_Second(second))

    @property
    def identity(self) -> dict[str, str]:
        return {f"second model's {name}": str(value) for name, value in self.second.model.identity.items()}

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.second,)

    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        good = denoise.conditional(x, sigma)
        if self.scale == 1:
            return good
        weak = denoise.clipped(Prediction(self.second(x, sigma, denoise.inputs))).x0
        return Prediction(weak + self.scale * (good.x0 - weak), good.variance)


class _Second(nn.Module):
    """The second model as a module, whose evaluations are counted."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, sigma: Sigma, inputs: Inputs) -> Tensor:
        return self.model.denoiser(inputs)(x, sigma)
