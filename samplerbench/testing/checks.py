"""The checks as a list: name, what it asserts, and the function that measures it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, get_args

from samplerbench import registry
from samplerbench.boundary import describe, restore, torch_state
from samplerbench.errors import SamplerbenchError, UserError, message_of
from samplerbench.options import Configurable

Kind = Literal["sampler", "guidance", "spacing", "generator", "metric", "model"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""The kinds that have checks."""


class CheckFailedError(AssertionError):
    """A plugin does not do what it says. The message has the measured figure and what was expected."""


@dataclass(frozen=True)
class Check:
    """One check of one plugin. Calling it returns the measured figure, or raises CheckFailedError."""

    name: str
    about: str
    plugin: Configurable
    function: Callable[[Any], str]

    def __call__(self) -> str:
        return self.function(self.plugin)

    @property
    def id(self) -> str:
        """`ddim:eta=0.5-order`: the name of the test."""
        return f"{self.plugin.spec}-{self.name}"


@dataclass(frozen=True)
class Result:
    """What a check found: passed, failed, or not applicable (passed is None), with the figure or the reason."""

    name: str
    about: str
    passed: bool | None
    figure: str


class NotApplicableError(Exception):
    """The check has nothing to measure on this plugin; the message says why."""


def checks_for(plugin: Configurable) -> list[Check]:
    """The checks of a plugin instance, in the order in which they are best read.

    Raises:
        UserError: an instance of a kind that has no checks.
    """
    if plugin.kind not in KINDS:
        raise UserError(f"there are no checks for a {plugin.kind}; there are for {', '.join(KINDS)}.")
    # Only the kind's own module: the checks of a model import more than those of a spacing.
    table: Sequence[tuple[str, Callable[[Any], str]]] = import_module(f"samplerbench.testing.{plugin.kind}").CHECKS
    return [Check(name, (function.__doc__ or "").strip().split("\n")[0], plugin, function) for name, function in table]


def run_check(check: Check) -> Result:
    """One check, its failure caught and reported."""
    state = torch_state()
    try:
        return Result(check.name, check.about, True, check())
    except NotApplicableError as reason:
        return Result(check.name, check.about, None, message_of(reason))
    except CheckFailedError as failure:
        return Result(check.name, check.about, False, str(failure))
    except SamplerbenchError as error:
        return Result(check.name, check.about, False, message_of(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin that raises has failed the check, whatever it raised
        return Result(check.name, check.about, False, f"raised {describe(error)}")
    finally:
        restore(state)


def run_checks(plugin: Configurable) -> list[Result]:
    """All checks of a plugin, none of them raising."""
    return [run_check(check) for check in checks_for(plugin)]


def _assert_checks(kind: Kind, plugin: Configurable | str) -> list[Result]:
    instance = registry.parse(kind, plugin) if isinstance(plugin, str) else plugin
    results = run_checks(instance)
    failed = [f"{r.name}: {r.figure}" for r in results if r.passed is False]
    if failed:
        raise CheckFailedError(f"{instance.spec} fails {len(failed)} of {len(results)} checks: " + "; ".join(failed))
    return results


def check_sampler(sampler: Configurable | str) -> list[Result]:
    """Run every check on a sampler (an instance or a spec). Raises CheckFailedError with all that failed."""
    return _assert_checks("sampler", sampler)


def check_guidance(guidance: Configurable | str) -> list[Result]:
    """Run every check on a guidance (an instance or a spec). Raises CheckFailedError with all that failed."""
    return _assert_checks("guidance", guidance)


def check_spacing(spacing: Configurable | str) -> list[Result]:
    """Run every check on a spacing (an instance or a spec). Raises CheckFailedError with all that failed."""
    return _assert_checks("spacing", spacing)


def check_generator(generator: Configurable | str) -> list[Result]:
    """Run every check on a generator (an instance or a spec). Raises CheckFailedError with all that failed."""
    return _assert_checks("generator", generator)


def check_metric(metric: Configurable | str) -> list[Result]:
    """Run every check on a metric (an instance or a spec). Raises CheckFailedError with all that failed."""
    return _assert_checks("metric", metric)


def check_model(model: Configurable | str) -> list[Result]:
    """Run every check on a model plugin (an instance or a spec). Raises CheckFailedError with all that failed."""
    return _assert_checks("model", model)


def parametrize_with_checks(plugins: Sequence[Configurable | str], kind: Kind = "sampler") -> Any:
    """A pytest decorator: the test is called once per plugin and check, with the check as its argument `check`.

    Args:
        plugins: instances, or specs of the given kind. A check that does not apply is skipped with its reason.
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
