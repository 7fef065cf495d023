"""The images whose likelihood is computed: the held-out data of a model, the training data, or draws."""

from __future__ import annotations

import typing
from dataclasses import dataclass

import torch
from torch import Tensor

from samplerbench import registry
from samplerbench.data import ImageSet, load_data
from samplerbench.errors import UserError, argument
from samplerbench.models.model import Model
from samplerbench.options import parameters_of
from samplerbench.sampling.noise import Purpose, uniform, uniforms

DEFAULT_IMAGES = 256
"""Maximum number of images if no number is given."""


@dataclass(frozen=True)
class Images:
    """Images in a fixed order. Image i is the same for every number of images.

    Attributes:
        name: the data set, `digits:split=held-out`, or the model itself for draws of an exact distribution.
        values: grey levels k, (n, C, H, W) int64, or the states themselves for draws, (n, C, H, W).
        labels: labels, (n,) int64. None without labels.
        levels: number of grey levels. None for draws, which have a density.
    """

    name: str
    values: Tensor
    labels: Tensor | None
    levels: int | None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def dimensions(self) -> int:
        """Number d of values of an image."""
        return self.values[0].numel()

    def states(self, rows: Tensor) -> Tensor:
        """The states x₀ = -1 + 2k/(L-1) of some images, (B, C, H, W) float64."""
        part = self.values[rows].double()
        return part if self.levels is None else -1 + 2 * part / (self.levels - 1)

    def dequantised(self, rows: Tensor, seed: int, repeat: int) -> Tensor:
        """Continuous images x = -1 + 2(k + u)/L with u ~ U(0, 1), (B, C, H, W) float64 (Theis et al. 2016).

        Draws of an exact distribution are returned unchanged.

        Args:
            rows: rows of the images, (B,) int64. u depends only on the seed, the row and the repetition.
            seed: random seed.
            repeat: index of the repetition.
        """
        if self.levels is None:
            return self.values[rows].double()
        u = uniforms(seed, Purpose.DEQUANTISATION, rows, repeat, self.values.shape[1:])
        return -1 + 2 * (self.values[rows] + u) / self.levels


def check_pixels(model: Model) -> None:
    """Check that the states of a model are images.

    Raises:
        UserError: if it samples latents.
    """
    if model.autoencoder is not None or model.text:
        raise UserError(
            "this model samples latents, and its decoder has no density, so its images have no likelihood; use a model "
            "that works in pixel space."
        )
    if model.by_own_call:
        raise UserError("a pipeline that is run by its own call gives only images, so their likelihood is not known.")


def load_images(
    model: Model, source: str | None, n: int | None, at_most: int = DEFAULT_IMAGES, where: object = None
) -> Images:
    """Load the images of a data set for a model.

    Args:
        model: the model.
        source: data set. None: draws of the model itself, if its distribution is known exactly.
        n: number of images. None: all, but not more than `at_most`.
        at_most: maximum number of images if `n` is None.
        where: the argument that names the data set, for messages. None: `data`.

    Raises:
        UserError: if there is no data set, or not with n images of the shape of the model and known grey levels.
    """
    if source is None:
        x0, labels = model.real(n or at_most)
        return Images(str(model.identity["source"]), x0.double(), labels, None)
    where = where or argument("data")
    data = load_data(source)
    if data.shape != model.image_shape:
        here, there = ("x".join(map(str, shape)) for shape in (data.shape, model.image_shape))
        raise UserError(
            f"the images of {source} have shape {here}, but the model requires {there}; use other images with {where}."
        )
    if data.grey_levels is None:
        raise UserError(
            f"the number of grey levels of the data set {source} is not known, so its images have no bits per "
            f"dimension; use a data set with `grey_levels`, with {where}."
        )
    if n is not None and n > len(data):
        raise UserError(f"{argument('n', n)}: {source} has only {len(data)} images.")
    return _images(data, source, n or min(len(data), at_most), data.grey_levels)


def _images(data: ImageSet, source: str, n: int, levels: int) -> Images:
    order = uniform(0, Purpose.DEQUANTISATION, torch.arange(len(data))).argsort()[:n]
    values = (data.images[order].double() * ((levels - 1) / 255)).round().long()
    return Images(source, values, None if data.labels is None else data.labels[order], levels)


def held_out(model: Model, where: object = None) -> str | None:
    """The held-out data of a model: the split `held-out` or `test` of its training data.

    Args:
        model: the model.
        where: the argument that names the data set, for messages. None: `data`.

    Returns:
        The data set. None for a model whose distribution is known exactly, of which new samples are drawn.

    Raises:
        UserError: if the training data is unknown or has no other split.
    """
    if model.draws:
        return None
    if model.data is not None:
        named = registry.parse("data set", model.data)
        known = parameters_of(type(named)).get("split")
        splits = typing.get_args(known.type) if known is not None else ()
        # Of all the images, none is held out.
        trained = named.parameters.get("split")
        for split in ("held-out", "test"):
            if split in splits and trained == "train":
                return registry.parse("data set", f"{named.label()}:split={split}").spec
    where = where or argument("data")
    raise UserError(f"the model does not say which images were held out from its training; name them with {where}.")
