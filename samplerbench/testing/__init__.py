"""Conformance checks of plugins, for `samplerbench check` and for the tests of a plugin.

from samplerbench.testing import parametrize_with_checks

@parametrize_with_checks(["mine", "mine:order=2"])  # kind="metric" for a metric, and so on
def test_mine(check):
    check()
"""

from samplerbench.testing.checks import (
    Check,
    CheckFailedError,
    Result,
    check_generator,
    check_guidance,
    check_metric,
    check_model,
    check_sampler,
    check_spacing,
    check_task,
    checks_for,
    parametrize_with_checks,
    run_checks,
)

__all__ = [
    "Check",
    "CheckFailedError",
    "Result",
    "check_generator",
    "check_guidance",
    "check_metric",
    "check_model",
    "check_sampler",
    "check_spacing",
    "check_task",
    "checks_for",
    "parametrize_with_checks",
    "run_checks",
]
