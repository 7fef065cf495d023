"""Which label each sample gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from samplerbench.errors import UserError, argument
from samplerbench.untrusted import shorten


def balanced_labels(n: int, counts: Sequence[int] | Sequence[float]) -> Tensor:
    """Labels (n,) int64 in proportion to `counts`, so evenly that every prefix is in proportion too.

    Sample i gets the class that is furthest behind its share of the first i+1 samples (the lowest such class). The
    label is thus a function of i alone, and for n = Σ counts each class k occurs exactly counts[k] times.
    """
    shares = torch.tensor(counts, dtype=torch.float64)
    shares = shares / shares.sum()
    given = torch.zeros_like(shares)
    labels = torch.empty(n, dtype=torch.int64)
    for i in range(n):
        behind = shares * (i + 1) - given
        # A margin far below any real difference makes ties go to the lowest class on every machine.
        k = int((behind >= behind.max() - 1e-9).nonzero()[0])
        labels[i] = k
        given[k] += 1
    return labels


def parse_label(mode: str) -> int | Literal["balanced", "none"]:
    """What a user writes for the labels: a mode, or one label for all. Raises UserError for anything else."""
    if mode in ("balanced", "none"):
        return cast(Literal["balanced", "none"], mode)
    try:
        return int(mode)
    except ValueError:
        raise UserError(f'{argument("labels", shorten(mode))}: give "balanced", "none" or one label.') from None


def make_labels(mode: str, n: int, classes: int | None, counts: Sequence[int] | None) -> Tensor | None:
    """The labels of a run: "balanced" as in the data, "none", or one label for all.

    Args:
        classes: how many labels there are to choose from, None for a model (and classifier) without.
        counts: images of each class in the data; None is uniform.

    Raises:
        UserError: another mode, a label out of range, or labels where there are none.
    """
    label = parse_label(mode)
    if label == "none":
        return None
    given = argument("labels", label if isinstance(label, int) and len(mode) < 40 else shorten(mode))
    if classes is None:
        raise UserError(
            f"{given}: the model has no classes; use {argument('labels', 'none')}, or guide it by a classifier."
        )
    if label == "balanced":
        return balanced_labels(n, counts or [1] * classes)
    if not 0 <= label < classes:
        raise UserError(f"{given}: the model has the labels 0 to {classes - 1}.")
    return torch.full((n,), label)
