"""What the results of several blocks say together."""

import math

import numpy as np
import pytest

from samplerbench.metrics.summary import error_of_mean, summarise_blocks


def test_the_error_of_the_mean_of_independent_blocks_is_the_root_of_the_summed_squares_over_their_number() -> None:
    blocks = [{"value": v, "standard_error": s} for v, s in ((1.0, 3.0), (2.0, 4.0), (6.0, 12.0))]
    found = summarise_blocks(blocks)
    assert found["value"] == 3
    assert found["standard_error"] == pytest.approx(13 / 3, rel=1e-15)
    assert found["sd"] == pytest.approx(math.sqrt(7), rel=1e-15)
    assert found["blocks"] == [1, 2, 6]


def test_the_combined_error_is_the_spread_of_the_mean_over_repeats() -> None:
    """Means of 4 draws with deviations 1, 2, 3, 4, 20,000 times: √30/4, known to 0.5%."""
    deviations = np.array([1.0, 2.0, 3.0, 4.0])
    means = (np.random.default_rng(0).normal(size=(20_000, 4)) * deviations).mean(axis=1)
    assert error_of_mean(deviations.tolist()) == pytest.approx(means.std(), rel=0.02)


def test_equal_errors_fall_with_the_root_of_the_number_of_blocks() -> None:
    blocks = [{"value": float(i), "standard_error": 0.5} for i in range(25)]
    assert summarise_blocks(blocks)["standard_error"] == pytest.approx(0.1, rel=1e-14)


def test_one_block_is_its_own_result() -> None:
    result = {"value": 3, "standard_error": 0.25, "note": "text"}
    assert summarise_blocks([result]) == result


def test_other_numbers_are_averaged_and_other_values_kept_only_where_blocks_agree() -> None:
    blocks = [
        {"value": 1.0, "spread_over_splits": 0.25, "unit": "nats", "name": "a", "flag": True, "sometimes": 1.0},
        {"value": 3.0, "spread_over_splits": 0.75, "unit": "nats", "name": "b", "flag": True},
    ]
    found = summarise_blocks(blocks)
    assert found.pop("sd") == pytest.approx(math.sqrt(2))
    assert found == {"value": 2, "spread_over_splits": 0.5, "unit": "nats", "flag": True, "blocks": [1, 3]}


def test_a_block_without_a_value_leaves_none() -> None:
    assert summarise_blocks([{"value": 1.0}, {}]) == {}
    assert summarise_blocks([{}]) == {}
