"""The list of checks: name, assertion, and function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, get_args

from samplerbench import registry
from samplerbench.boundary import describe, restore, torch_state
from samplerbench.errors import SamplerbenchError, UserError, message_of
from samplerbench.options import Configurable

Kind = Literal["sampler", "guidance", "spacing", "generator", "task", "metric", "model"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""The kinds that have checks."""


class CheckFailedError(AssertionError):
    """A check failed. The message has the measured and the expected value."""


@dataclass(frozen=True)
class Check:
    """A check of a plugin. Calling it returns the measured value, or raises CheckFailedError.

    Attributes:
        name: name of the check.
        about: what the check asserts, in one sentence.
        plugin: the plugin instance.
        function: function that performs the check.
    """

    name: str
    about: str
    plugin: Configurable
    function: Callable[[Any], str]

    def __call__(self) -> str:
        return self.function(self.plugin)

    @property
    def id(self) -> str:
        """The id of the test case: `ddim:eta=0.5-order`."""
        return f"{self.plugin.spec}-{self.name}"


@dataclass(frozen=True)
class Result:
    """The result of a check.

    Attributes:
        name: name of the check.
        about: what the check asserts.
        passed: whether it passed; None if the check does not apply.
        figure: the measured value, or the reason.
        warning: whether the figure is a warning; then `passed` is None.
    """

    name: str
    about: str
    passed: bool | None
    figure: str
    warning: bool = False


class NotApplicableError(Exception):
    """The check does not apply to this plugin. The message has the reason."""


class WarningError(Exception):
    """What the check found is allowed, but makes measurements doubtful; the message says what and why."""


def checks_for(plugin: Configurable) -> list[Check]:
    """The checks of a plugin instance, in a fixed order.

    Raises:
        UserError: a kind of plugin without checks.
    """
    if plugin.kind not in KINDS:
        raise UserError(f"a {plugin.kind} has no checks; the kinds with checks are {', '.join(KINDS)}.")
    # Import only the module of this kind; the checks of a model import more than those of a spacing.
    table: Sequence[tuple[str, Callable[[Any], str]]] = import_module(f"samplerbench.testing.{plugin.kind}").CHECKS
    return [Check(name, (function.__doc__ or "").strip().split("\n")[0], plugin, function) for name, function in table]


def run_check(check: Check) -> Result:
    """Run a check. Failures and exceptions are caught and reported in the result."""
    state = torch_state()
    try:
        return Result(check.name, check.about, True, check())
    except NotApplicableError as reason:
        return Result(check.name, check.about, None, message_of(reason))
    except WarningError as warning:
        return Result(check.name, check.about, None, str(warning), warning=True)
    except CheckFailedError as failure:
        return Result(check.name, check.about, False, str(failure))
    except SamplerbenchError as error:
        return Result(check.name, check.about, False, message_of(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # any exception of the plugin fails the check
        return Result(check.name, check.about, False, f"raised {describe(error)}")
    finally:
        restore(state)


def run_checks(plugin: Configurable) -> list[Result]:
    """Run all checks of a plugin, without raising exceptions."""
    return [run_check(check) for check in checks_for(plugin)]


def _assert_checks(kind: Kind, plugin: Configurable | str) -> list[Result]:
    instance = registry.parse(kind, plugin) if isinstance(plugin, str) else plugin
    results = run_checks(instance)
    failed = [f"{r.name}: {r.figure}" for r in results if r.passed is False]
    if failed:
        raise CheckFailedError(f"{instance.spec} fails {len(failed)} of {len(results)} checks: " + "; ".join(failed))
    return results


def check_sampler(sampler: Configurable | str) -> list[Result]:
    """Run all checks on a sampler (instance or spec). Raises CheckFailedError with all failures."""
    return _assert_checks("sampler", sampler)


def check_guidance(guidance: Configurable | str) -> list[Result]:
    """Run all checks on a guidance (instance or spec). Raises CheckFailedError with all failures."""
    return _assert_checks("guidance", guidance)


def check_spacing(spacing: Configurable | str) -> list[Result]:
    """Run all checks on a spacing (instance or spec). Raises CheckFailedError with all failures."""
    return _assert_checks("spacing", spacing)


def check_generator(generator: Configurable | str) -> list[Result]:
    """Run every check on a generator (an instance or a spec). Raises CheckFailedError with all that failed."""
    return _assert_checks("generator", generator)


def check_task(task: Configurable | str) -> list[Result]:
    """Run all checks on a task (instance or spec). Raises CheckFailedError with all failures."""
    return _assert_checks("task", task)


def check_metric(metric: Configurable | str) -> list[Result]:
    """Run all checks on a metric (instance or spec). Raises CheckFailedError with all failures."""
    return _assert_checks("metric", metric)


def check_model(model: Configurable | str) -> list[Result]:
    """Run all checks on a model plugin (instance or spec). Raises CheckFailedError with all failures."""
    return _assert_checks("model", model)


def parametrize_with_checks(plugins: Sequence[Configurable | str], kind: Kind = "sampler") -> Any:
    """A pytest decorator that turns each check of each plugin into a test case, with the argument `check`.

    A check that does not apply is skipped with the reason.

    Args:
        plugins: plugin instances or specs.
        kind: kind of the specs.
    """
    import pytest

    instances = [registry.parse(kind, p) if isinstance(p, str) else p for p in plugins]
    cases = [_Skipping(check) for instance in instances for check in checks_for(instance)]
    return pytest.mark.parametrize("check", cases, ids=[case.check.id for case in cases])


@dataclass(frozen=True)
class _Skipping:
    check: Check

    def __call__(self) -> str:
        import pytest

        try:
            return self.check()
        except NotApplicableError as reason:
            pytest.skip(str(reason))
