"""Real images as a row of a table: what each metric gives for images that no model made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from samplerbench.data import ImageSet, load_data
from samplerbench.models import Model
from samplerbench.sampling import Generator, Inputs, ModelView, UserError, option


@dataclass(frozen=True)
class RealImages(Generator):
    """Images of a data set in the place of samples: the floor of a metric, real against real.

    Sample i is image π(i) of the data set, with π a permutation that depends on the seed (Heusel et al. 2017 evaluate
    real images in this way). No image occurs twice. The requested labels have no effect: metrics use the data's own
    labels, so that label accuracy is the classifier's accuracy on real images.
    """

    own_labels = True
    images_of: ClassVar[ImageSet]

    data: str = option("", "data set, as in `real:data=digits:split=held-out`; empty is the training data of the model")

    def bind(self, model: ModelView) -> Self:
        source = self.data or (model.data if isinstance(model, Model) else None)
        if not source:
            raise UserError("generator real needs a data set: name one, as in real:data=mnist.")
        found = load_data(source)
        if found.shape != model.image_shape:
            here, there = ("x".join(map(str, shape)) for shape in (found.shape, model.image_shape))
            raise UserError(f"{source} has images of {here}, and the model makes {there}; name another data set.")
        return self.with_state(images_of=found)

    @property
    def identity(self) -> dict[str, str]:
        return {"real images": self.images_of.sha256}

    def images(self, index: Tensor, inputs: Inputs, seed: int) -> Tensor:
        chosen = self.images_of.images[self._rows(index, seed)]
        return (chosen.to(index.device).float() / 127.5 - 1).clamp(-1, 1)

    def labels(self, index: Tensor, seed: int) -> Tensor | None:
        labels = self.images_of.labels
        return None if labels is None else labels[self._rows(index, seed)]

    def _rows(self, index: Tensor, seed: int) -> Tensor:
        """π(i) for each index, (B,) on the CPU."""
        count = len(self.images_of)
        if int(index.max()) >= count:
            raise UserError(f"generator real: the data set has {count:,} images, too few for this run; use fewer.")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed % 2**63))
        return order[index.cpu()]
