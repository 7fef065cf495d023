"""Which label each sample gets."""

import random

import pytest
import torch

from samplerbench.bench.labels import balanced_labels, make_labels
from samplerbench.errors import UserError

DIGITS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def counts_of(labels: torch.Tensor, classes: int) -> list[int]:
    return torch.bincount(labels, minlength=classes).tolist()


@pytest.mark.parametrize("counts", [DIGITS, [1], [5, 5, 5], [1, 99], [0, 3, 7], [1000, 1, 1, 1]])
def test_as_many_samples_as_images_have_the_datas_own_counts(counts: list[int]) -> None:
    assert counts_of(balanced_labels(sum(counts), counts), len(counts)) == counts


def test_any_counts_are_met_exactly() -> None:
    rng = random.Random(0)
    for _ in range(20):
        counts = [rng.randrange(40) for _ in range(rng.randrange(1, 12))] + [1]
        assert counts_of(balanced_labels(sum(counts), counts), len(counts)) == counts


def test_equal_classes_take_turns() -> None:
    assert balanced_labels(8, [7, 7, 7]).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_a_label_depends_on_the_samples_number_alone() -> None:
    whole = balanced_labels(1797, DIGITS)
    for n in (1, 10, 500, 1796):
        assert torch.equal(balanced_labels(n, DIGITS), whole[:n])


def test_every_prefix_is_in_proportion() -> None:
    labels = balanced_labels(1797, DIGITS)
    given = torch.nn.functional.one_hot(labels, 10).cumsum(0).double()
    due = torch.arange(1, 1798).double()[:, None] * torch.tensor(DIGITS).double() / 1797
    assert float((given - due).abs().max()) < 1


def test_only_the_proportion_counts() -> None:
    assert torch.equal(balanced_labels(100, [2, 4, 6]), balanced_labels(100, [1, 2, 3]))
    assert torch.equal(balanced_labels(100, [0.1, 0.2, 0.3]), balanced_labels(100, [1, 2, 3]))


def test_the_modes_of_a_run() -> None:
    assert make_labels("none", 5, 10, DIGITS) is None
    assert make_labels("none", 5, None, None) is None
    balanced = make_labels("balanced", 50, 10, DIGITS)
    assert balanced is not None
    assert torch.equal(balanced, balanced_labels(50, DIGITS))
    uniform = make_labels("balanced", 4, 2, None)
    assert uniform is not None
    assert uniform.tolist() == [0, 1, 0, 1]
    for label in (0, 9):
        one = make_labels(str(label), 3, 10, DIGITS)
        assert one is not None
        assert one.tolist() == [label] * 3
        assert one.dtype == torch.int64


@pytest.mark.parametrize(
    ("mode", "classes", "reason"),
    [
        ("10", 10, "labels=10: the model has the labels 0 to 9."),
        ("-1", 10, "labels=-1: the model has the labels 0 to 9."),
        ("seven", 10, 'labels="seven": give "balanced", "none" or one label.'),
        ("--5", 10, 'labels="--5": give "balanced", "none" or one label.'),
        ("²", 10, 'labels="²": give "balanced", "none" or one label.'),
        ("1.5", 10, 'labels="1.5": give "balanced", "none" or one label.'),
        ("", 10, 'labels="": give "balanced", "none" or one label.'),
        ("balanced", None, 'labels="balanced": the model has no classes; use labels="none"'),
        ("3", None, 'labels=3: the model has no classes; use labels="none"'),
    ],
)
def test_other_labels_are_refused(mode: str, classes: int | None, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        make_labels(mode, 5, classes, None)
    assert str(caught.value).startswith(reason)
