"""Generators: methods that make images by index without walking noise levels. A plugin; one method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from samplerbench.boundary import plugin_call, shown
from samplerbench.errors import RunError
from samplerbench.options import Configurable
from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.view import ModelView


@dataclass(frozen=True)
class Generator(Configurable, ABC):
    """Base of generator plugins: a row of a table that has neither steps nor spacing nor guidance.

    A GAN, a normalising flow or the prior of an autoencoder is a generator. It stands beside the samplers of a model
    and is compared on the same images, labels and metrics.
    """

    kind: ClassVar[str] = "generator"
    needs_labels: ClassVar[bool] = False
    """Whether each sample must have a class label."""

    def bind(self, model: ModelView) -> Generator:
        """The generator prepared for a run beside a model: with its weights loaded, for example. By default, itself.

        Args:
            model: the model of the run, whose device and images the generator's must match.

        Returns:
            A copy made by `with_state`. The instance itself is shared between models and must not change.

        Raises:
            UserError: the generator cannot stand beside this model.
        """
        return self

    @property
    def identity(self) -> dict[str, str]:
        """What the protocol records of a bound generator besides its parameters, as the hash of its weights."""
        return {}

    @property
    def network(self) -> nn.Module | None:
        """The network of a bound generator, whose evaluations are counted as NFE; None where there is none."""
        return None

    @abstractmethod
    def images(self, index: Tensor, inputs: Inputs, seed: int) -> Tensor:
        """The images of one batch. Image i must be a function of the seed, i and its inputs alone.

        Args:
            index: (B,) int64 on the model's device, which samples; `Noise(seed, index, shape, dtype)` is their noise.
            inputs: their labels, prompts and other inputs.
            seed: of all noise.

        Returns:
            (B, C, H, W) in [-1, 1], of the model's image shape.
        """


def bind_generator(generator: Generator, model: ModelView) -> Generator:
    """`generator.bind(model)`, checked.

    Raises:
        UserError: the generator cannot stand beside this model.
        RunError: the plugin raised, or returned something else than a generator of the same spec.
    """
    with plugin_call(generator, "in bind"):
        bound = generator.bind(model)
    if not isinstance(bound, Generator) or bound != generator:
        raise RunError(
            f"generator {generator.label()}: bind returned {shown(bound)}; it must be a generator with the same "
            "parameters."
        )
    return bound
