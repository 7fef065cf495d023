"""The grid of the first images of a cell, and its description in the record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samplerbench.bench.session import Session
from samplerbench.data.grid import grid_size
from samplerbench.data.pixels import quantise
from samplerbench.models.model import Model
from samplerbench.sampling import Inputs
from samplerbench.text import is_unicode
from samplerbench.untrusted import shorten

MAX_SHOWN_TEXT = 1_000
"""Maximum length of a prompt in the description of the sample grid, in characters."""
RESTORED = ("truth", "observation", "restored")
"""The images that the grid of a cell with a task has of each sample, in rows below each other."""


def images_in_grid(most: int, model: Model) -> int:
    """Return the number of samples in the grid of a cell.

    Args:
        most: Maximum number of samples.
        model: The model. With a task, the grid has three images of each sample.
    """
    c, h, w = model.image_shape
    return grid_size(most, (c, h if model.observation is None else len(RESTORED) * h, w))


def with_observations(model: Model, inputs: Inputs, restored: Tensor) -> tuple[Tensor, int]:
    """Return the images of the grid of a cell with a task: lines of truths, of observations, and of restored images.

    The grid has as many columns as one of the restored images alone. The last lines are filled with white images.

    Args:
        model: The model, with a task.
        inputs: Inputs of the first k samples, completed by the model.
        restored: The first k restored images (k, C, H, W), uint8.

    Returns:
        The images (3·lines·columns, C, H, W), uint8, and the number of columns.
    """
    assert model.observation is not None
    k = len(restored)
    columns = math.ceil(math.sqrt(k))
    lines = math.ceil(k / columns)
    observed = quantise(model.observation.picture(inputs.tensors["observation"].to(model.device))).cpu()
    rows = torch.stack([quantise(inputs.tensors["truth"]).cpu(), observed, restored.cpu()])
    white = rows.new_full((len(rows), lines * columns - k, *rows.shape[2:]), 255)
    full = torch.cat([rows, white], dim=1).unflatten(1, (lines, columns))
    return full.transpose(0, 1).flatten(0, 2), columns


def describe_shown(session: Session, images: int) -> dict[str, Any]:
    """Return the field of a record that describes the images of the sample grid.

    Args:
        session: The measurement and how it is executed.
        images: Number of samples in the grid.

    Returns:
        The number of samples; with a task, the images of each sample; and if the model has labels or prompts, the label
        or the index of the prompt of each sample, its prompt or the name of its class, and the id of its prompt.
    """
    model, chosen = session.measurement.model, session.measurement.inputs.chosen
    shown: dict[str, Any] = {"images": images}
    if model.observation is not None:
        shown["rows"] = list(RESTORED)
    if chosen is None:
        return shown
    labels = chosen[:images].tolist()
    prompts: Sequence[str] = getattr(model, "prompts", ()) if model.text else model.class_names
    ids: Sequence[str] = getattr(model, "prompt_ids", ()) if model.text else ()
    for name, texts in (("texts", prompts), ("ids", ids)):
        if any(texts):
            shown[name] = [shorten(texts[i], MAX_SHOWN_TEXT) if is_unicode(texts[i]) else "" for i in labels]
    return shown | {"labels": labels}
