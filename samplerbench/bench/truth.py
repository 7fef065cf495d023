"""The real images that the tasks of a run observe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplerbench.bench.setup import reference_source, require_real_images
from samplerbench.data import load_data
from samplerbench.data.pixels import dequantise
from samplerbench.errors import UserError, argument
from samplerbench.models.model import Model
from samplerbench.sampling import Task


@dataclass(frozen=True)
class Truth:
    """Real images in a fixed order, which does not depend on their number.

    Attributes:
        images: Images (N, C, H, W) in [-1, 1]. Draws of an exact problem are not limited and not quantised.
        identity: Identity of the images, as recorded in the protocol.
    """

    images: Tensor
    identity: dict[str, Any]

    def observed(self, model: Model, task: Task, seed: int) -> Model:
        """Return a copy of the model whose samples have observations of these images.

        Args:
            model: The model.
            task: The task.
            seed: Seed of the noise of the observations.
        """
        return model.observed(task, self.images[: task.images or len(self.images)], seed)


def load_truth(model: Model, data: str | None, n: int, tasks: Sequence[Task]) -> Truth:
    """Load the real images that the tasks observe.

    Args:
        model: The model.
        data: Name or file of the real images. If None, the training data of the model, or draws of an exact problem.
        n: Number of samples. If there are fewer images, they are observed in turn.
        tasks: The tasks.

    Raises:
        UserError: If the images are not available, if there are too few for a task, or if they do not have the shape
            of the images of the model.
    """
    wanted = max([n, *(task.images for task in tasks)])
    if not (source := reference_source(model, data)):
        return Truth(model.real(wanted)[0], {"name": str(model.identity["source"]), "split": "draws"})
    require_real_images(model, data, f"the task {tasks[0].label()}")
    found = load_data(source)
    if found.shape != model.image_shape:
        real, own = ("x".join(map(str, shape)) for shape in (found.shape, model.image_shape))
        raise UserError(
            f"the images of {found.name} are {real}, and the model's are {own}; name others with {argument('data')}."
        )
    if many := next((task for task in tasks if task.images > len(found)), None):
        raise UserError(
            f"{argument('task', many.spec)}: {found.name} has {len(found):,} images; use images={len(found)} or fewer."
        )
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:wanted]
    return Truth(dequantise(found.images[order]), found.identity)
