"""Generators: plugins that generate images directly, without a sampler or noise levels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from samplerbench.boundary import plugin_call, shown
from samplerbench.errors import RunError
from samplerbench.sampling.bound import Bindable
from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.view import ModelView


@dataclass(frozen=True)
class Generator(Bindable, ABC):
    """Base class of generator plugins. A generator has no steps, spacing or guidance.

    Examples are a GAN, a normalising flow, or the prior of an autoencoder. A generator is compared with the samplers
    of a model on the same images, labels and metrics.
    """

    kind: ClassVar[str] = "generator"
    needs_labels: ClassVar[bool] = False
    """Whether each sample requires a class label."""
    own_labels: ClassVar[bool] = False
    """Whether `labels` gives the labels of the images, because the requested labels have no effect."""

    def bind(self, model: ModelView) -> Generator:
        """Prepare the generator for a run, for example load its weights. By default, return the instance itself.

        Args:
            model: model of the run. The generator must use its device and image shape.

        Returns:
            A copy made by `with_state`. Do not modify the instance itself, because models share it.

        Raises:
            UserError: if the generator does not support this model.
        """
        return self

    @property
    def network(self) -> nn.Module | None:
        """The network of a bound generator. Its evaluations are counted as NFE. None if there is no network."""
        return None

    @abstractmethod
    def images(self, index: Tensor, inputs: Inputs, seed: int) -> Tensor:
        """Generate the images of one batch. Image i must depend only on the seed, i and the inputs of i.

        Args:
            index: sample indices, (B,) int64 on the device of the model. `Noise(seed, index, shape, dtype)` draws the
                noise for these samples.
            inputs: labels, prompts and other inputs of the samples.
            seed: random seed.

        Returns:
            Images in [-1, 1], (B, C, H, W), with the image shape of the model.
        """

    def labels(self, index: Tensor, seed: int) -> Tensor | None:
        """Labels of the images, if `own_labels` is true. Metrics use them in place of the requested labels.

        The number of images of each label is then random, so that metrics treat the images as independent draws.

        Args:
            index: sample indices, (B,) int64 on the device of the model.
            seed: random seed.

        Returns:
            Class labels, (B,) int64, at least 0 and below the number of classes. None if they are unknown.
        """
        return None


def bind_generator(generator: Generator, model: ModelView) -> Generator:
    """Call `generator.bind(model)` and check the result. A generator that is bound to the model is returned unchanged.

    Raises:
        UserError: if the generator does not support this model.
        RunError: if the plugin raises an error, or does not return a generator with the same parameters.
    """
    if generator.bound_to is model:
        return generator
    with plugin_call(generator, "in bind"):
        bound = generator.bind(model)
    name = f"generator {generator.label()}"
    if not isinstance(bound, Generator) or bound != generator:
        raise RunError(f"{name}: bind returned {shown(bound)}; it must be a generator with the same parameters.")
    with plugin_call(generator, "in network"):
        network = bound.network
    if network is not None and not isinstance(network, nn.Module):
        raise RunError(f"{name}: network is {shown(network)}; it must be a torch.nn.Module or None.")
    return bound.bound_with(model)
