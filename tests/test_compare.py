"""Differences between rows, the noise floor, and the marks of a table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from rich.console import Console

from samplerbench.metrics.frechet import frechet_distance
from samplerbench.metrics.moments import Moments
from samplerbench.report.table import column_of, row_names, steps_table
from samplerbench.results.compare import Difference, noise_floor, paired_difference, unpaired_difference


def test_the_interval_of_a_paired_difference_is_students() -> None:
    from scipy.stats import ttest_1samp

    a, b = [2.0, 2.4, 2.1, 2.6, 2.2], [1.9, 2.0, 2.0, 2.3, 1.7]
    found = paired_difference(a, b)
    interval = ttest_1samp(np.subtract(a, b), 0).confidence_interval(0.95)
    assert found.mean - found.margin == pytest.approx(interval.low)
    assert found.mean + found.margin == pytest.approx(interval.high)
    assert not found.tied
    assert paired_difference(a, [x + d for x, d in zip(a, (0.1, -0.1, 0.2, -0.2, 0.0), strict=True)]).tied


def test_a_difference_needs_two_blocks() -> None:
    with pytest.raises(ValueError, match="two blocks"):
        paired_difference([1.0], [2.0])


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of 4,000 intervals from five normal blocks 95% hold the true difference, within four standard errors."""
    draws = np.random.default_rng(0).normal(0.3, 1.0, (4000, 5))
    held = [abs((d := paired_difference(row.tolist(), [0.0] * 5)).mean - 0.3) <= d.margin for row in draws]
    assert abs(np.mean(held) - 0.95) <= 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_the_unpaired_interval_is_welchs_and_has_no_width_without_spread() -> None:
    from scipy.stats import ttest_ind

    a, b = [2.0, 2.4, 2.1, 2.6], [1.9, 2.0, 2.9]
    found = unpaired_difference(a, b)
    interval = ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (found.mean - found.margin, found.mean + found.margin) == pytest.approx((interval.low, interval.high))
    assert unpaired_difference([2.0, 2.0], [1.0, 1.0]) == Difference(1.0, 0.0)
    with pytest.raises(ValueError, match="two blocks"):
        unpaired_difference([1.0, 2.0], [2.0])


def test_the_noise_floor_is_the_distance_of_disjoint_halves() -> None:
    features = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, deviation, size = noise_floor(features, 1000, splits=3)
    values = []
    for seed in range(3):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
        values.append(frechet_distance(Moments.of(features[order[:100]]), Moments.of(features[order[100:]])))
    assert size == 100
    assert mean == pytest.approx(np.mean(values))
    assert deviation == pytest.approx(np.std(values, ddof=1))
    assert noise_floor(features, 30)[0] > mean


def record(name: str, blocks: list[float]) -> dict[str, object]:
    entry = {"value": float(np.mean(blocks)), "sd": float(np.std(blocks, ddof=1)), "blocks": blocks}
    return {
        "sampler": name,
        "guidance": None,
        "spacing": "trailing",
        "steps": 10,
        "budget": None,
        "metrics": {"fid": entry | {"better": "lower", "features": "f", "reference": "r"}},
    }


def test_ties_with_the_best_are_marked_and_others_are_not() -> None:
    rows = [record("best", [1.0, 1.2, 1.1]), record("tied", [1.05, 1.1, 1.25]), record("worse", [2.0, 2.2, 2.15])]
    console = Console(width=120)
    with console.capture() as capture:
        console.print(steps_table(rows, "fid", (3.0, 0.5, 100)))
    lines = {
        line.split("│")[1].strip(): line.split("│")[2].strip() for line in capture.get().splitlines() if "│" in line
    }
    assert lines["best"] == "* 1.10 ± 0.1000"
    assert "* the best of its column" in capture.get()
    assert lines["tied"].startswith("≈ 1.13")
    assert lines["worse"].startswith("2.12")
    assert lines["real against real, 100 each"] == "3.00 ± 0.500"
    note = " ".join(capture.get().split())
    assert "two disjoint random sets of 100 real images each; rows are measured against all" in note
    with console.capture() as capture:
        console.print(steps_table(rows, "fid"))
    assert "real" not in capture.get()


def test_a_value_that_is_no_number_is_never_the_best() -> None:
    rows = [record("first", [math.nan, math.nan]), record("best", [1.0, 1.2]), record("worse", [2.0, 2.2])]
    console = Console(width=120, force_terminal=True)
    with console.capture() as capture:
        console.print(steps_table(rows, "fid"))
    (bold,) = [line for line in capture.get().splitlines() if "\x1b[1;32m" in line]
    assert "best" in bold


def test_rows_of_one_sampler_are_told_apart_by_spacing_and_seed() -> None:
    rows = [record("a", [1.0, 2.0]) for _ in range(3)] + [record("b", [1.0, 2.0])]
    rows[1]["spacing"], rows[2]["seed"] = "karras", 1
    assert row_names(rows) == ["a, trailing, seed None", "a, karras, seed None", "a, trailing, seed 1", "b"]
    console = Console(width=120)
    with console.capture() as capture:
        console.print(steps_table(rows, "fid"))
    assert sum("│" in line for line in capture.get().splitlines()) == 4


def test_in_a_table_of_budgets_what_was_run_by_steps_stands_at_what_it_cost() -> None:
    rows = [record("a", [1.0, 2.0]), record("b", [3.0, 4.0])]
    rows[0] |= {"budget": 20, "nfe": 19}
    rows[1] |= {"nfe": 20}  # 10 steps under guidance
    assert column_of(rows[1]) == 10
    console = Console(width=120)
    with console.capture() as capture:
        console.print(steps_table(rows, "fid"))
    heading = next(line for line in capture.get().splitlines() if "NFE" in line)
    assert "20" in heading
    assert "10" not in heading
