"""Assignment of labels to samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from samplerbench.errors import ArgumentTypeError, UserError, argument
from samplerbench.untrusted import shorten


def balanced_labels(n: int, counts: Sequence[int] | Sequence[float]) -> Tensor:
    """Return labels in proportion to `counts`. Every prefix of the labels is in proportion, too.

    Sample i gets the class that is furthest below its share of the first i+1 samples. Ties go to the lowest class. The
    label of a sample therefore depends only on i. If n = Σ counts, each class k occurs exactly counts[k] times.

    Args:
        n: Number of labels.
        counts: Relative frequency of each class.

    Returns:
        Labels (n,), int64.
    """
    shares = torch.tensor(counts, dtype=torch.float64)
    shares = shares / shares.sum()
    given = torch.zeros_like(shares)
    labels = torch.empty(n, dtype=torch.int64)
    for i in range(n):
        behind = shares * (i + 1) - given
        # The margin is far below any real difference. It makes ties go to the lowest class on every machine.
        k = int((behind >= behind.max() - 1e-9).nonzero()[0])
        labels[i] = k
        given[k] += 1
    return labels


def parse_label(mode: str) -> int | Literal["balanced", "none"]:
    """Parse the `labels` argument.

    Args:
        mode: "balanced", "none" or a single label.

    Returns:
        The mode, or the label as an integer.

    Raises:
        UserError: If `mode` is none of these.
    """
    if mode in ("balanced", "none"):
        return cast(Literal["balanced", "none"], mode)
    try:
        return int(mode)
    except ValueError:
        raise UserError(f'{argument("labels", shorten(mode))}: give "balanced", "none" or one label.') from None


def given_labels(labels: Sequence[int] | Tensor, classes: int | None) -> Tensor:
    """Check a list of labels, one for each sample.

    Args:
        labels: Labels, n whole numbers.
        classes: Number of classes, or None if neither the model nor a classifier has classes.

    Returns:
        Labels (n,), int64.

    Raises:
        ArgumentTypeError: If a label is not a whole number.
        UserError: If a label is out of range, or there are no classes.
    """
    if isinstance(labels, Tensor) and labels.ndim != 1:
        raise UserError(f"{argument('labels')} has the shape {tuple(labels.shape)}; give one label for each image.")
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    for i, label in enumerate(values):
        if isinstance(label, bool) or not hasattr(label, "__index__"):
            raise ArgumentTypeError(
                f"{argument('labels')}: label {i} is of type {type(label).__name__}; give whole numbers."
            )
    if classes is None:
        raise UserError(f"{argument('labels')}: the model has no classes; use {argument('labels', 'none')}.")
    for label in values:
        if not 0 <= label < classes:
            raise UserError(f"{argument('labels', label)}: the model has the labels 0 to {classes - 1}.")
    return torch.tensor([int(label) for label in values])


def make_labels(mode: str, n: int, classes: int | None, counts: Sequence[int] | None) -> Tensor | None:
    """Create the labels of a run.

    Args:
        mode: "balanced" for the class proportions of the data, "none", or a single label for all samples.
        n: Number of samples.
        classes: Number of classes, or None if neither the model nor a classifier has classes.
        counts: Number of images of each class in the data. If None, classes are equally frequent.

    Returns:
        Labels (n,), int64. None for the mode "none".

    Raises:
        UserError: If the mode is unknown, the label is out of range, or there are no classes.
    """
    label = parse_label(mode)
    if label == "none":
        return None
    given = argument("labels", label if isinstance(label, int) and len(mode) < 40 else shorten(mode))
    if classes is None:
        raise UserError(f"{given}: the model has no classes; use {argument('labels', 'none')} or classifier guidance.")
    if label == "balanced":
        return balanced_labels(n, counts or [1] * classes)
    if not 0 <= label < classes:
        raise UserError(f"{given}: the model has the labels 0 to {classes - 1}.")
    return torch.full((n,), label)
