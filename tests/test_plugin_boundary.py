"""Whatever a plugin raises, returns or changes, it is its cell's error of one line, and nobody else's."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import random
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Half, make_cell
from rich.console import Console
from torch import Tensor
from torch.overrides import TorchFunctionMode, _len_torch_function_stack, _pop_torch_function_stack
from torch.utils._python_dispatch import TorchDispatchMode, _len_torch_dispatch_stack, _pop_mode

from samplerbench import progress, registry
from samplerbench.bench import engine
from samplerbench.bench.team import Team
from samplerbench.boundary import isolated, plugin_call, torch_state
from samplerbench.cli import app
from samplerbench.cli.app import main
from samplerbench.errors import RunError, SamplerbenchError, Stopped, UserError
from samplerbench.metrics import Accumulator, Batch, Context, Metric
from samplerbench.models import Model
from samplerbench.report.table import steps_table
from samplerbench.sampling import Denoiser, Guidance, Noise, Prediction, Sampler, Sigma, Spacing, Step, driver
from samplerbench.sampling.guidance import evaluations_of, guide
from samplerbench.sampling.sampler import planned_nfe
from samplerbench.sampling.spacing import make_grid
from samplerbench.testing.checks import run_checks

GRID = torch.tensor([8.0, 4.0, 2.0, 0.0], dtype=torch.float64)
START = torch.ones(2, 1, 4, 4)

MakeSession = Callable[..., engine.Session]


@dataclass(frozen=True)
class Scripted(Sampler):
    """A sampler whose `steps` is a function, set as a class attribute."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Any:
        return SCRIPT(x, sigmas)


SCRIPT: Callable[[Tensor, Tensor], Any] = lambda x, sigmas: None  # noqa: E731


@dataclass(frozen=True)
class OwnSteps(Scripted):
    """The same, choosing its own steps."""

    def nfe(self, steps: int) -> int | None:
        return None


def drive(monkeypatch: pytest.MonkeyPatch, script: Callable[[Tensor, Tensor], Any], own: bool = False) -> Tensor:
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", script)
    noise = Noise(0, torch.arange(2), (1, 4, 4), torch.float32)
    return driver.drive(OwnSteps() if own else Scripted(), Half(), START.clone(), GRID, noise)


class Unforeseen(BaseException):
    """Neither an Exception nor Ctrl-C."""


class MuteError(Exception):
    """Its message cannot be shown."""

    def __str__(self) -> str:
        raise ValueError


class LeavingError(RuntimeError):
    """Its message ends the process."""

    def __str__(self) -> str:
        sys.exit(0)


# --- What a sampler raises ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (SystemExit(0), "raised SystemExit in step 2 of 3: 0"),
        (GeneratorExit(), "raised GeneratorExit in step 2 of 3"),
        (Unforeseen("a\nb"), "raised Unforeseen in step 2 of 3: a b"),
        (ValueError("one\n\n  two"), "raised ValueError in step 2 of 3: one two"),
        (StopIteration(3), "raised RuntimeError in step 2 of 3: generator raised StopIteration"),
        (RecursionError(), "raised RecursionError in step 2 of 3"),
        (MuteError(), "raised MuteError in step 2 of 3: (its message cannot be shown)"),
        (LeavingError(), "raised LeavingError in step 2 of 3: (its message cannot be shown)"),
        (KeyError("x" * 2000), "raised KeyError in step 2 of 3: 'xxxx"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_a_sampler_raises_is_one_line(
    error: BaseException, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(x: Tensor, _: Tensor) -> Iterator[Step]:
        yield Step(4.0, x)
        raise error

    with pytest.raises(RunError) as caught:
        drive(monkeypatch, script)
    text = str(caught.value)
    assert text.startswith(f"sampler Scripted {line}")
    assert "\n" not in text
    assert len(text) < 600
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stopped(), UserError("said by the plugin"), MemoryError()])
def test_ctrl_c_a_stop_and_a_lack_of_memory_pass_the_boundary_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, plugin_call("sampler ddim", "in step 1"):
        raise error
    assert caught.value is error


# --- What a sampler yields ------------------------------------------------------------------------------------------

YIELDS: list[tuple[str, Callable[[Tensor], Any], str]] = [
    ("a tuple", lambda x: (4.0, x), "yielded a value of type tuple in step 1 of 3; it must yield Step(sigma, x)"),
    ("None", lambda x: None, "yielded None in step 1 of 3"),
    ("a bare state", lambda x: x, "yielded a value of type Tensor in step 1 of 3"),
    ("no tensor", lambda x: Step(4.0, x.tolist()), "yielded a value of type list as state in step 1 of 3"),
    ("numpy", lambda x: Step(4.0, x.numpy()), "yielded a value of type ndarray as state in step 1 of 3"),
    ("no level", lambda x: Step(None, x), "yielded None as sigma in step 1 of 3"),  # type: ignore[arg-type]
    ("a NaN as level", lambda x: Step(math.nan, x), "yielded nan as sigma in step 1 of 3; it must be finite"),
    ("an infinite level", lambda x: Step(torch.tensor(math.inf), x), "yielded inf as sigma in step 1 of 3"),
    ("a huge level", lambda x: Step(10**400, x), "yielded 1000"),
    ("a level for each", lambda x: Step(x[:, 0, 0, 0], x), "yielded a value of type Tensor as sigma in step 1 of 3"),
    (
        "another dtype",
        lambda x: Step(4.0, x.double()),
        "a state of float64 on cpu in step 1 of 3; it must be",
    ),
    ("integers", lambda x: Step(4.0, x.int()), "a state of int32 on cpu in step 1 of 3"),
    ("another device", lambda x: Step(4.0, x.to("meta")), "a state of float32 on meta in step 1 of 3"),
    ("a sparse state", lambda x: Step(4.0, x.to_sparse()), "a state of float32 on cpu, sparse_coo in step 1 of 3"),
    (
        "another shape",
        lambda x: Step(4.0, x[0]),
        "a state of shape (1, 4, 4) in step 1 of 3; it must have the shape (2, 1, 4, 4)",
    ),
    ("another x0", lambda x: Step(4.0, x, x[:1]), "a x0 of shape (1, 1, 4, 4) in step 1 of 3"),
    ("no x0", lambda x: Step(4.0, x, 3), "yielded a value of type int as x0 in step 1 of 3"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("value", "line"), [case[1:] for case in YIELDS], ids=[case[0] for case in YIELDS])
def test_what_is_no_step_of_the_batch_is_refused(
    value: Callable[[Tensor], Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match=re.escape(line)):
        drive(monkeypatch, lambda x, _: iter([value(x), Step(2.0, x), Step(0.0, x)]))


@pytest.mark.parametrize(
    ("count", "line"),
    [
        (0, "sampler Scripted yielded no step."),
        (1, "sampler Scripted yielded 1 of 3 steps; it must yield a Step for each interval of the grid."),
        (4, "sampler Scripted yielded more than the 3 steps of its grid."),
    ],
)
def test_a_sampler_yields_one_step_for_each_interval(count: int, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=re.escape(line)):
        drive(monkeypatch, lambda x, _: iter([Step(0.0, x)] * count))


def test_an_endless_sampler_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(x: Tensor, _: Tensor) -> Iterator[Step]:
        while True:
            yield Step(1.0, x)

    with pytest.raises(RunError, match="yielded more than the 3 steps"):
        drive(monkeypatch, endless)
    monkeypatch.setattr(driver, "MOST_STEPS", 20)
    with pytest.raises(RunError, match="did not finish within 20 steps"):
        drive(monkeypatch, endless, own=True)


def test_a_sampler_that_chooses_its_own_steps_may_yield_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (1, 7):
        assert torch.equal(drive(monkeypatch, lambda x, _, k=count: iter([Step(0.0, x)] * k), own=True), START)


def test_steps_that_is_no_generator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="steps returned None; it must be a generator"):
        drive(monkeypatch, lambda *_: None)


def test_a_sampler_that_does_not_let_itself_be_closed_hides_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(x: Tensor, _: Tensor) -> Iterator[Step]:
        try:
            yield Step(4.0, x * math.nan)
        finally:
            yield Step(2.0, x)

    with pytest.raises(RunError, match="the state is not finite after step 1 of 3"):
        drive(monkeypatch, script)


def test_a_sampler_that_writes_into_the_grid_changes_no_other_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = GRID.clone()

    def script(x: Tensor, sigmas: Tensor) -> Iterator[Step]:
        for s in sigmas.tolist()[1:]:
            yield Step(s, x)
        sigmas.zero_()

    drive(monkeypatch, script)
    assert torch.equal(GRID, before)


# --- What a plugin changes ------------------------------------------------------------------------------------------


class Refusing(TorchFunctionMode):
    """Refuses every call of torch but the one that ends the driver's own `no_grad`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "grad_enabled" in getattr(func, "__name__", ""):
            return func(*args, **(kwargs or {}))
        raise ValueError("refused")


class RefusingDispatch(TorchDispatchMode):
    """The same, one level below."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ValueError("refused")


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "default dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "threads": (lambda: torch.set_num_threads(torch.get_num_threads() + 1), torch.get_num_threads),
    "gradients": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "determinism": (lambda: torch.use_deterministic_algorithms(True), torch.are_deterministic_algorithms_enabled),
    "warn only": (
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
        torch.is_deterministic_algorithms_warn_only_enabled,
    ),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), lambda: torch.is_autocast_enabled("cpu")),
    "default device": (lambda: torch.set_default_device("meta"), lambda: torch.empty(1).device),
    "precision": (lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision),
    "cudnn.benchmark": (
        lambda: setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark),
        lambda: torch.backends.cudnn.benchmark,
    ),
    "cudnn.deterministic": (
        lambda: setattr(torch.backends.cudnn, "deterministic", not torch.backends.cudnn.deterministic),
        lambda: torch.backends.cudnn.deterministic,
    ),
    "folder": (lambda: os.chdir("/"), os.getcwd),
    "oneDNN": (
        lambda: setattr(torch.backends.mkldnn, "enabled", not torch.backends.mkldnn.enabled),
        lambda: torch.backends.mkldnn.enabled,
    ),
    "denormals": (lambda: torch.set_flush_denormal(True), lambda: torch.tensor(1e-40).mul(0.5).item() == 0),
    "anomaly detection": (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled),
    "NumPy's errors": (lambda: np.seterr(all="raise"), np.geterr),
    "recursion": (lambda: sys.setrecursionlimit(sys.getrecursionlimit() - 1), sys.getrecursionlimit),
    "function mode": (lambda: Refusing().__enter__(), _len_torch_function_stack),
    "dispatch mode": (lambda: RefusingDispatch().__enter__(), _len_torch_dispatch_stack),
}


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("what", CHANGES)
def test_what_a_sampler_changes_in_torch_is_changed_back_after_each_step(
    what: str, raises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, look = CHANGES[what]
    before, seen = look(), []

    def script(x: Tensor, sigmas: Tensor) -> Iterator[Step]:
        for s in sigmas.tolist()[1:]:
            change()
            seen.append(look())
            if raises:
                raise ValueError
            yield Step(s, x)

    try:
        drive(monkeypatch, script)
    except RunError:
        assert raises
    after = look()
    while _len_torch_function_stack():  # pytest could not say that this failed
        _pop_torch_function_stack()
    while _len_torch_dispatch_stack():
        _pop_mode()
    assert before not in seen or what == "gradients"  # which are off in a step anyway
    assert after == before


def test_a_recursion_limit_just_above_the_depth_is_changed_back() -> None:
    before = sys.getrecursionlimit()

    def lower() -> None:
        for limit in range(20, before):
            with suppress(RecursionError):  # raised for a limit below the depth
                sys.setrecursionlimit(limit)
                return

    try:
        with plugin_call("sampler ddim", "in step 1"):
            lower()
        after = sys.getrecursionlimit()
    finally:
        sys.setrecursionlimit(before)  # pytest needs it to say that this failed
    assert after == before


def test_a_precision_of_one_backend_is_changed_back() -> None:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        pytest.skip("this torch has no precision for each backend")
    before = torch_state()
    with plugin_call("sampler ddim", "in step 1"):
        matmul.fp32_precision = "bf16"
        assert torch_state() != before
    assert torch_state() == before


def test_a_cell_leaves_the_global_random_generators_as_they_were() -> None:
    def draws() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: NPY002

    def seed() -> None:
        torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002

    seed()
    expected = draws()
    seed()

    def fault() -> None:
        draws()
        torch.manual_seed(0)
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"), isolated():
        fault()
    assert draws() == expected


# --- Guidances, spacings and what a sampler says of itself ----------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (lambda: None, "predict returned a value of type NoneType"),
        (lambda: START, "predict returned a value of shape (2, 1, 4, 4)"),
        (lambda: Prediction(START[:1]), "predict returned a value of shape (1, 1, 4, 4)"),
        (lambda: sys.exit(0), "raised SystemExit in predict: 0"),
        (lambda: 1 / 0, "raised ZeroDivisionError in predict: division by zero"),
    ],
)
def test_a_guidance_is_answered_for_by_name(value: Callable[[], Any], line: str) -> None:
    @dataclass(frozen=True)
    class Odd(Guidance):
        def predict(self, denoise: Denoiser, x: Tensor, sigma: Sigma) -> Prediction:
            return value()

    with pytest.raises(RunError) as caught:
        guide(Odd(), Half())(START, 1.0)
    assert str(caught.value).startswith("guidance Odd")
    assert line in str(caught.value)


def test_a_guidance_says_its_cost_and_gives_a_denoiser() -> None:
    @dataclass(frozen=True)
    class Odd(Guidance):
        evaluations = "two"  # type: ignore[assignment]

        def predict(self, denoise: Denoiser, x: Tensor, sigma: Sigma) -> Prediction:
            return denoise.conditional(x, sigma)

        def guide(self, denoise: Denoiser) -> Any:
            return self.predict

    with pytest.raises(RunError, match="guidance Odd: evaluations is 'two'; it must be a whole number"):
        evaluations_of(Odd())
    with pytest.raises(RunError, match="guidance Odd: guide returned a method; it must be a Denoiser"):
        guide(Odd(), Half())


@pytest.mark.parametrize("value", [True, 2.5, -1, "3", torch.tensor(3), 10**30])
def test_nfe_is_a_whole_number_or_none(value: Any) -> None:
    @dataclass(frozen=True)
    class Odd(Sampler):
        def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
            yield Step(0.0, x)

        def nfe(self, steps: int) -> Any:
            return value

    with pytest.raises(RunError, match=re.escape("sampler Odd: nfe(4) returned")):
        planned_nfe(Odd(), 4)


@pytest.mark.parametrize(
    ("value", "error", "line"),
    [
        (lambda levels: sys.exit(0), RunError, "spacing Odd raised SystemExit in grid for 3 steps: 0"),
        (lambda levels: levels[100], RunError, "spacing Odd raised IndexError in grid for 3 steps"),
        (lambda levels: levels.zero_(), UserError, "spacing Odd does not give 3 decreasing noise levels"),
        (lambda levels: [3.0, 2.0, 1.0, 0.0], UserError, "spacing Odd: grid returned a list"),
        (
            lambda levels: torch.tensor([3, 2, 1, 0j]),
            UserError,
            "spacing Odd: grid returned a Tensor; it must be",
        ),
        (lambda levels: None, UserError, "spacing Odd: grid returned a NoneType"),
    ],
)
def test_a_spacing_gives_a_grid(value: Callable[[Tensor], Any], error: type[SamplerbenchError], line: str) -> None:
    @dataclass(frozen=True)
    class Odd(Spacing):
        def grid(self, levels: Tensor, steps: int) -> Tensor:
            return value(levels)

    levels = torch.linspace(0.1, 10, 10).double()
    with pytest.raises(error, match=re.escape(line)):
        make_grid(Odd(), levels, 3)
    assert levels[-1] == 10  # what the spacing was given was a copy


# --- Metrics --------------------------------------------------------------------------------------------------------

RESULT: dict[str, Any] = {"value": 1.0}
FAULTS: dict[str, Callable[[], Any]] = {}


class Sum(Accumulator):
    """Sums features; its methods do what FAULTS says first."""

    def __init__(self) -> None:
        self.total = torch.zeros(1)

    def update(self, batch: Batch) -> None:
        if fault := FAULTS.get("update"):
            fault()
        if FAULTS.get("write"):
            batch.features.add_(1)
        self.total = self.total + batch.features.double().sum()

    def result(self) -> dict[str, Any]:
        if fault := FAULTS.get("result"):
            return fault()  # type: ignore[no-any-return]
        return dict(RESULT)

    def state(self) -> dict[str, Tensor]:
        if fault := FAULTS.get("state"):
            return fault()  # type: ignore[no-any-return]
        return {"total": self.total, "again": self.total}

    def merge(self, state: dict[str, Tensor]) -> None:
        if fault := FAULTS.get("merge"):
            fault()
        self.total = self.total + state["total"]


@dataclass(frozen=True)
class Total(Metric):
    """A metric whose faults the tests choose."""

    def start(self, context: Context) -> Accumulator:
        if fault := FAULTS.get("start"):
            return fault()  # type: ignore[no-any-return]
        return Sum()


def fail() -> None:
    raise ZeroDivisionError("a fault\nin two lines")


def run_total(
    digits: Model, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch, blocks: int = 1, **faults: Any
) -> engine.Outcome:
    monkeypatch.setattr(sys.modules[__name__], "FAULTS", faults)
    session = make_session(n=4, batch_size=2)
    measurement = dataclasses.replace(session.measurement, metrics=[Total()], blocks=blocks)
    return engine.run_cell(engine.Session(measurement, session.execution), make_cell(digits, "ddim", None, 1))


@pytest.mark.parametrize("fault", [fail, lambda: sys.exit(0)], ids=["raises", "exits"])
@pytest.mark.parametrize("method", ["start", "update", "state", "merge", "result"])
def test_a_metric_that_fails_in_any_method_fails_its_cell(
    method: str, fault: Callable[[], Any], digits: Model, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = run_total(digits, make_session, monkeypatch, **{method: fault})
    assert isinstance(outcome.error, RunError)
    what = "SystemExit" if fault is not fail else "ZeroDivisionError"
    text = "0" if fault is not fail else "a fault in two lines"
    assert str(outcome.error) == f"metric Total raised {what} in {method}: {text}"
    assert outcome.record["metrics"] == {}


@pytest.mark.parametrize(
    ("method", "value", "line"),
    [
        ("start", None, "start returned None; it must be an Accumulator"),
        ("state", [1], "state returned [1]; it must be a dictionary of tensors"),
        ("state", {"a": 1.0}, "state returned 'a': 1.0; it must be a dictionary of dense tensors"),
        ("state", {1: torch.ones(1)}, "state returned 1: tensor([1.])"),
        ("result", None, 'result returned None; it must be a dictionary with "value", or {}'),
        ("result", 3.0, "result returned 3.0; it must be a dictionary"),
        ("result", {"fid": 3.0}, 'result returned no "value", only fid'),
        ("result", {"value": None}, "result returned value = None, which is not a real number"),
        ("result", {"value": "3"}, "result returned value = '3', which is not a real number"),
        ("result", {"value": True}, "result returned value = True, which is not a real number"),
        ("result", {"value": 1j}, "result returned value = 1j, which is not a real number"),
        ("result", {"value": torch.ones(2)}, "result returned value = tensor([1., 1.]), which is not a real number"),
        ("result", {"value": 10**400}, "result returned value = 1000"),
        ("result", {"value": 1.0, "more": []}, "result returned more = [], which is not a real number"),
        ("result", {"value": 1.0, "blocks": 3}, "result returned the name 'blocks', which it may not use"),
        ("write", True, "modified its batch"),
    ],
)
def test_what_a_metric_gives_is_of_the_type_it_must_be(
    method: str,
    value: Any,
    line: str,
    digits: Model,
    make_session: MakeSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcome = run_total(digits, make_session, monkeypatch, **{method: value if method == "write" else lambda: value})
    assert isinstance(outcome.error, RunError)
    assert str(outcome.error).startswith(f"metric Total: {line}" if method != "write" else f"metric Total {line}")
    assert "\n" not in str(outcome.error)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(
    ("value", "recorded"),
    [
        (3, 3),
        (torch.tensor(2.5), 2.5),
        (np.float32(2.5), 2.5),
        (np.int64(7), 7),
        (torch.tensor(3), 3),
        (math.nan, math.nan),
        (math.inf, math.inf),
    ],
    ids=repr,
)
def test_numbers_are_recorded_as_plain_numbers_and_nan_is_one(
    value: Any, recorded: float, blocks: int, digits: Model, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {"value": value, "more": value}
    outcome = run_total(digits, make_session, monkeypatch, blocks=blocks, result=lambda: result)
    assert outcome.error is None
    entry = outcome.record["metrics"]["Total"]
    if blocks > 1:
        assert entry["blocks"] == pytest.approx([recorded] * 3, nan_ok=True)
        assert entry["sd"] == 0 if math.isfinite(recorded) else math.isnan(entry["sd"])
    assert type(entry["value"]) in (int, float)
    assert (entry["value"], entry["more"]) == pytest.approx((recorded, recorded), nan_ok=True)
    json.dumps(entry)
    steps_table([outcome.record, outcome.record], "Total")  # with a best and ties, which NaN cannot be


def test_a_metric_that_is_not_applicable_leaves_no_entry(
    digits: Model, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = run_total(digits, make_session, monkeypatch, result=dict)
    assert outcome.error is None
    assert outcome.record["metrics"] == {}


# --- Several processes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threads(Team):
    """Two processes of a run as threads, which wait for each other as processes do."""

    barrier: threading.Barrier = dataclasses.field(default_factory=lambda: threading.Barrier(2, timeout=30))
    board: dict[int, Any] = dataclasses.field(default_factory=dict)

    def gather(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.barrier.wait()
        found = [self.board[0], self.board[1]]
        self.barrier.wait()
        return found

    def tell(self, value: Any) -> Any:
        return self.gather(value)[0]


@pytest.mark.parametrize("method", ["start", "update", "state", "merge", "result"])
@pytest.mark.parametrize("faulty", [0, 1])
def test_what_fails_on_one_process_ends_the_cell_on_all_and_none_waits(
    method: str, faulty: int, digits: Model, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "result" and faulty == 1:
        pytest.skip("only the main process asks for results")

    def fault() -> Any:
        if threading.current_thread().name == str(faulty):
            raise ZeroDivisionError("a fault")
        return {"start": Sum, "state": dict}.get(method, dict)()

    monkeypatch.setattr(sys.modules[__name__], "FAULTS", {method: fault})
    session = make_session(n=4, batch_size=2)
    measurement = dataclasses.replace(session.measurement, metrics=[Total()])
    first = Threads(0, 2)
    outcomes: dict[int, engine.Outcome] = {}

    def work(team: Team) -> None:
        execution = dataclasses.replace(session.execution, team=team)
        cell = make_cell(digits, "ddim", None, 1)
        outcomes[team.rank] = engine.run_cell(engine.Session(measurement, execution), cell)

    teams = [first, dataclasses.replace(first, rank=1)]
    threads = [threading.Thread(target=work, args=(team,), name=str(team.rank), daemon=True) for team in teams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    lines = {str(outcomes[rank].error) for rank in (0, 1)}
    assert lines == {f"process {faulty}: metric Total raised ZeroDivisionError in {method}: a fault"}


# --- The command ----------------------------------------------------------------------------------------------------

PLUGINS = """
import sys
from dataclasses import dataclass
from samplerbench.metrics import Accumulator, Metric
from samplerbench.sampling import Sampler, Step, intervals


@dataclass(frozen=True)
class Exits(Sampler):
    def steps(self, denoise, x, sigmas, noise):
        print("printed by a sampler")
        yield Step(float(sigmas[1]), x)
        sys.exit(0)


@dataclass(frozen=True)
class Lazy(Sampler):
    def steps(self, denoise, x, sigmas, noise):
        yield Step(0.0, denoise(x, float(sigmas[0])))


@dataclass(frozen=True)
class Deep(Sampler):
    def steps(self, denoise, x, sigmas, noise):
        yield Step(0.0, self.helper(x))

    def helper(self, x):
        raise ValueError("deep inside")
"""


@pytest.fixture
def plugins(tmp_path: Path) -> str:
    file = tmp_path / "mine.py"
    file.write_text(PLUGINS)
    return str(file)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def test_a_cell_that_exits_or_skips_steps_fails_and_the_others_go_on(
    plugins: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samplers = ["-s", f"{plugins}:Exits", "-s", f"{plugins}:Lazy", "-s", "ddim"]
    base = ["run", "-m", "exact:mixture", *samplers, "--steps", "5", "--n", "8", "--json"]
    assert run(*base, "--out", str(tmp_path / "out")) == 1
    out, err = capsys.readouterr()
    exits, lazy, ddim = json.loads(out)  # nothing but JSON, whatever a plugin prints
    assert "printed by a sampler" in err
    assert exits["error"].endswith("raised SystemExit in step 2 of 5: 0")
    assert "yielded 1 of 5 steps" in lazy["error"]
    assert ddim["metrics"]["fid"]["value"] > 0
    assert len(list((tmp_path / "out").glob("*.json"))) == 1


@pytest.mark.parametrize("debug", [False, True])
def test_debug_shows_file_and_line_of_a_samplers_own_error(
    debug: bool, plugins: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAMPLERBENCH_DEBUG", raising=False)
    if debug:
        monkeypatch.setenv("SAMPLERBENCH_DEBUG", "1")
    base = ["run", "-m", "exact:mixture", "-s", f"{plugins}:Deep", "--steps", "1", "--n", "4"]
    assert run(*base, "--out", str(tmp_path / "out")) == 1
    err = capsys.readouterr().err
    line = 1 + PLUGINS.splitlines().index('        raise ValueError("deep inside")')
    assert (f'File "{plugins}", line {line}, in helper' in err) == debug
    assert "raised ValueError in step 1 of 1: deep inside" in err


def test_a_sampler_that_exits_fails_its_checks(plugins: str) -> None:
    results = {r.name: r for r in run_checks(registry.parse("sampler", f"{plugins}:Exits"))}
    assert sum(r.passed is False and "raised SystemExit" in r.figure for r in results.values()) >= 3


def test_progress_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither rich's markup nor its emoji codes in a plugin's name are rendered."""
    stream = io.StringIO()
    monkeypatch.setattr(
        progress,
        "console",
        lambda **_: Console(file=stream, force_terminal=True, width=150, emoji=False, markup=False, highlight=False),
    )
    bars = progress.Progress(2)
    with bars.running(), bars.cell("bad.py:a:[red]Mine[/red]", 3, 4, 4):
        bars.bars.refresh()
        bars.done("bad.py:b:[bold]Mine[/bold]: failed")
    shown = stream.getvalue()
    assert "bad.py:a:[red]Mine[/red]" in shown
    assert "bad.py:b:[bold]Mine[/bold]: failed" in shown


# --- Planning, and what ends the process ----------------------------------------------------------------------------

PLANS = """
import sys
from dataclasses import dataclass
from samplerbench.metrics import Metric
from samplerbench.sampling import Sampler, Spacing, Step


class Lazy(Sampler):
    def steps(self, denoise, x, sigmas, noise):
        for s in sigmas.tolist()[1:]:
            yield Step(s, x)


@dataclass(frozen=True)
class Raises(Lazy):
    def nfe(self, steps):
        raise ValueError("no plan")


@dataclass(frozen=True)
class RaisesLater(Lazy):
    def nfe(self, steps):
        return steps if steps == 1 else "many"


@dataclass(frozen=True)
class Huge(Lazy):
    def nfe(self, steps):
        return 10**30


@dataclass(frozen=True)
class OddSpacing(Spacing):
    def grid(self, levels, steps):
        sys.exit(0)


@dataclass(frozen=True)
class Spaced(Lazy):
    spacing = __file__ + ":OddSpacing"


@dataclass(frozen=True)
class Leaver(Lazy):
    @classmethod
    def label(cls):
        sys.exit(0)


@dataclass(frozen=True)
class Measure(Metric):
    @classmethod
    def label(cls):
        raise ValueError("no label")

    def start(self, context):
        return None
"""


@pytest.fixture
def plans(tmp_path: Path) -> str:
    file = tmp_path / "plans.py"
    file.write_text(PLANS)
    return str(file)


@pytest.mark.parametrize("budget", [["--steps", "2,3"], ["--nfe", "2,3"]], ids=["steps", "nfe"])
def test_a_cell_that_cannot_be_planned_fails_and_the_others_go_on(
    budget: list[str], plans: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["Raises", "Huge", "Spaced", *(["RaisesLater"] if budget[0] == "--nfe" else [])]
    samplers = [part for name in names for part in ("-s", f"{plans}:{name}")]
    base = ["run", "-m", "exact:mixture", *samplers, "-s", "ddim", *budget, "--n", "8", "--out", str(tmp_path / "out")]
    assert run(*base, "--json") == 1
    records = json.loads(capsys.readouterr().out)
    assert len(records) == 2 * len(names) + 2
    errors = [r["error"] for r in records if "ddim" not in r["sampler"]]
    for error, part in zip(
        errors[::2], ["no plan", "nfe(1) returned 1000000", "SystemExit in grid", "nfe("], strict=False
    ):
        assert part in error
    assert all(r["metrics"]["fid"]["value"] > 0 for r in records if r["sampler"] == "ddim")
    assert run(*base) == 1
    assert "failed" in capsys.readouterr().out
    assert run(*base, "--dry-run") == 0
    assert "will fail: " in capsys.readouterr().out


def test_more_steps_than_the_model_has_is_an_error_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["run", "-m", "digits", "-s", "ddim", "--spacing", "leading", "--steps", "1001", "--n", "8"]
    assert run(*base, "--out", str(tmp_path / "out")) == 2
    assert "cannot give 1001 steps" in capsys.readouterr().err


@pytest.mark.parametrize("which", [["-s", "Leaver"], ["-s", "ddim", "--metric", "Measure"]])
def test_a_plugin_without_a_label_is_an_error_of_one_line(
    which: list[str], plans: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [f"{plans}:{w}" if w in ("Leaver", "Measure") else w for w in which]
    code = run("run", "-m", "exact:mixture", *named, "--steps", "1", "--n", "4", "--out", str(tmp_path / "out"))
    err = capsys.readouterr().err
    assert code in (1, 2)
    assert "in label" in err
    assert "Traceback" not in err


def test_sys_exit_of_a_plugin_anywhere_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(*_: Any, **__: Any) -> None:
        sys.exit(0)

    monkeypatch.setattr(app, "command", lambda: leave)
    assert run("list") == 1
    assert capsys.readouterr().err.count("\n") == 1
