"""Assignment of labels to samples."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from samplerbench.errors import ArgumentTypeError, UserError, argument
from samplerbench.options import did_you_mean
from samplerbench.text import is_printable
from samplerbench.untrusted import shorten

MAX_SUGGESTED = 10_000
"""Maximum number of class names that are compared with an unknown name. The comparison of more would take seconds."""


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


def parse_label(mode: str, names: Sequence[str] = ()) -> int | Literal["balanced", "none"]:
    """Parse the `labels` argument.

    Args:
        mode: "balanced", "none", a single label, or the name of a class. A whole number is always a label.
        names: Name of each class (see `named_label`). Empty for a model without class names.

    Returns:
        The mode, or the label as an integer.

    Raises:
        UserError: If `mode` is none of these, or the name of several classes.
    """
    if mode in ("balanced", "none"):
        return cast(Literal["balanced", "none"], mode)
    try:
        return int(mode)
    except ValueError:
        if any(names):
            return named_label(mode, names, 'give "balanced", "none", one label or the name of a class.')
        raise UserError(f'{argument("labels", shorten(mode))}: give "balanced", "none" or one label.') from None


def named_label(name: str, names: Sequence[str], advice: str) -> int:
    """Return the label of a class.

    An exact match is preferred. If there is none, upper and lower case are equal.

    Args:
        name: Name of a class.
        names: Name of each class. Several names of one class are separated by commas: "tench, Tinca tinca" has the
            names "tench", "Tinca tinca" and the whole text. "" for a class without a name.
        advice: What to do if no class has the name, for the error message.

    Returns:
        The label.

    Raises:
        UserError: If no class or more than one class has the name.
    """
    known = [(one, label) for label, entry in enumerate(names) for one in _synonyms(entry)]
    given = argument("labels", shorten(name))
    forms: tuple[Callable[[str], str], ...] = (str, _ignoring_case)
    for form in forms:
        wanted = form(name.strip())
        labels = sorted({label for one, label in known if form(one) == wanted})
        if len(labels) == 1:
            return labels[0]
        if labels:
            listed = ", ".join(map(str, labels[:5])) + (", …" if len(labels) > 5 else "")
            raise UserError(f"{given}: {len(labels)} classes have this name; give one of their labels: {listed}.")
    # Only names that a user can copy: a card can contain any text.
    short = [one for one, _ in known if len(one) <= 100 and is_printable(one)][:MAX_SUGGESTED]
    raise UserError(f"{given}: no class of the model has this name; {advice}{did_you_mean(shorten(name), short)}")


def _synonyms(entry: str) -> Iterator[str]:
    """Yield the names of a class: the whole text, and its parts between commas."""
    parts = entry.split(",") if "," in entry else []
    yield from (part.strip() for part in (entry, *parts) if part.strip())


def _ignoring_case(name: str) -> str:
    # File systems differ in whether an accented letter is one character or two.
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def given_labels(labels: Sequence[str | int] | Tensor, classes: int | None, names: Sequence[str] = ()) -> Tensor:
    """Check a list of labels, one for each sample.

    Args:
        labels: Labels, n whole numbers or names of classes. A text that is a whole number is a label.
        classes: Number of classes, or None if neither the model nor a classifier has classes.
        names: Name of each class (see `named_label`). Empty for a model without class names.

    Returns:
        Labels (n,), int64.

    Raises:
        ArgumentTypeError: If a label is neither a whole number nor text, or text for a model without class names.
        UserError: If a label is out of range, no or several classes have the name, or there are no classes.
    """
    if isinstance(labels, Tensor) and labels.ndim != 1:
        raise UserError(f"{argument('labels')} has the shape {tuple(labels.shape)}; give one label for each image.")
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    named = any(names)
    resolved: dict[str, int] = {}
    for i, label in enumerate(values):
        if named and isinstance(label, str):
            if label not in resolved:
                resolved[label] = _listed_label(label, names)
        elif isinstance(label, bool) or not hasattr(label, "__index__"):
            wanted = "whole numbers or names of classes" if named else "whole numbers"
            raise ArgumentTypeError(
                f"{argument('labels')}: label {i} is of type {type(label).__name__}; give {wanted}."
            )
    if classes is None:
        raise UserError(f"{argument('labels')}: the model has no classes; use {argument('labels', 'none')}.")
    numbers = [resolved[label] if isinstance(label, str) else int(label) for label in values]
    for number in numbers:
        if not 0 <= number < classes:
            raise UserError(f"{argument('labels', number)}: the model has the labels 0 to {classes - 1}.")
    return torch.tensor(numbers)


def _listed_label(label: str, names: Sequence[str]) -> int:
    """Return the label of a text in a list of labels."""
    try:
        return int(label)
    except ValueError:
        return named_label(label, names, "give labels or names of classes.")


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
