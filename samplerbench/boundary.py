"""The boundary around every call into a plugin: its errors are its cell's, and torch's global state is restored.

    with plugin_call(sampler, "in step 3 of 10"):
        step = next(run)

What ends the process itself (`os._exit`, a crash in compiled code) cannot be caught; the cell's checkpoint remains.
"""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.overrides import _len_torch_function_stack, _pop_torch_function_stack
from torch.utils._python_dispatch import _len_torch_dispatch_stack, _pop_mode

from samplerbench.errors import RunError, SamplerbenchError, Stopped, is_out_of_memory
from samplerbench.options import Configurable

LONGEST_MESSAGE = 500
"""Characters of a plugin's own message that are shown."""


class plugin_call:  # noqa: N801 - used as a function
    """While a plugin's code runs: what it raises becomes a RunError, what it changed in torch is changed back.

    Every exception, SystemExit included, becomes a RunError of one line that names the plugin and what it was doing;
    the exception itself is its `__cause__`. These pass unchanged: SamplerbenchError, Stopped, KeyboardInterrupt, and
    running out of memory, which the caller explains.

    The state is that of `torch_state`. Random generators are not restored here but after each cell (`isolated`): a
    sampler that draws from a global one would otherwise be given the same numbers in every step.

    Args:
        plugin: the instance, or how it is called (`"model digits"`).
        doing: `"in step 3 of 10"`, `"in update"`.
        memory: whether running out of memory passes unchanged; false makes it a RunError too.

    Raises:
        RunError: the plugin raised an exception.
    """

    __slots__ = ("_before", "doing", "memory", "plugin")

    def __init__(self, plugin: Configurable | str, doing: str, memory: bool = True) -> None:
        self.plugin, self.doing, self.memory = plugin, doing, memory

    def __enter__(self) -> None:
        self._before = torch_state()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if sys.getrecursionlimit() != self._before[0]:  # first, and here: calls need some depth
            sys.setrecursionlimit(self._before[0])
        if torch_state() != self._before:
            restore(self._before)
        if error is None or isinstance(error, SamplerbenchError | Stopped | KeyboardInterrupt):
            return
        if self.memory and is_out_of_memory(error):
            return
        raise RunError(f"{called(self.plugin)} raised {describe(error, self.doing)}") from error


def called(plugin: Configurable | str) -> str:
    """How a message calls a plugin: `sampler ddim`; by its class's name where its own `label` fails."""
    if isinstance(plugin, str):
        return plugin
    try:
        return f"{plugin.kind} {plugin.label()}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(plugin).__name__}"


def describe(error: BaseException, doing: str = "") -> str:
    """`ValueError in step 2 of 3: its message`: one line, whatever the exception's own text is."""
    try:
        text = " ".join(str(error).split())
    except BaseException as raised:
        if isinstance(raised, KeyboardInterrupt):
            raise
        text = "(its message cannot be shown)"
    if len(text) > LONGEST_MESSAGE:
        text = text[:LONGEST_MESSAGE] + "…"
    return f"{type(error).__name__}{f' {doing}' if doing else ''}" + (f": {text}" if text else "")


def shown(value: Any) -> str:
    """A value that a plugin gave, for a message: its repr, on one line of at most 80 characters."""
    try:
        text = " ".join(repr(value).split())
    except BaseException as raised:
        if isinstance(raised, KeyboardInterrupt):
            raise
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:79]}…"


def torch_state() -> tuple[Any, ...]:
    """The global state that calls are isolated from, as a tuple to compare and to `restore`.

    The default dtype and device, the number of threads, the modes of gradients, autocast, anomaly detection and
    determinism, whether denormal numbers are flushed to zero, the precision of float32 products, cuDNN's and oneDNN's
    flags, the TorchFunctionModes and TorchDispatchModes that are entered (as two numbers), NumPy's handling of
    floating-point errors, Python's recursion limit, and the current folder.
    """
    try:
        precision, cudnn = torch.get_float32_matmul_precision(), _cudnn()
    except RuntimeError:  # torch refuses to say where its older and newer settings were mixed
        precision, cudnn = None, None
    try:
        folder: str | None = os.getcwd()
    except OSError:  # it was removed
        folder = None
    return (
        sys.getrecursionlimit(),
        _default_device(),
        (_len_torch_function_stack(), _len_torch_dispatch_stack()),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_deterministic_debug_mode(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        sys.float_info.min * 0.5 == 0,  # torch does not say whether it flushes denormal numbers
        cudnn,
        precision,
        _backends(),
        np.geterr(),
        folder,
    )


def restore(state: tuple[Any, ...]) -> None:
    """Set what differs from a `torch_state` of before."""
    for setting, before, now in zip(_SETTINGS, state, torch_state(), strict=True):
        if before != now and before is not None:
            with suppress(RuntimeError, OSError):  # a setting that torch no longer lets anybody change
                setting(before)


def _default_device() -> Any:
    """The device that `torch.set_default_device` set, without an index where none was given; "cpu" for none."""
    # torch.get_default_device makes a tensor; this is what it looks at, where it is there.
    known = getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None)
    if known is None:
        return str(torch.get_default_device())
    context = getattr(known, "device_context", None)
    return "cpu" if context is None else str(context.device)


def _set_default_device(device: str) -> None:
    torch.set_default_device(None if device == "cpu" else device)


def _cudnn() -> Any:
    """cuDNN's flags (enabled, benchmark, deterministic, allow_tf32), read as `torch.backends.cudnn` reads them."""
    return _cudnn_enabled(), _cudnn_benchmark(), _cudnn_deterministic(), _cudnn_tf32()


_cudnn_enabled, _cudnn_benchmark = torch._C._get_cudnn_enabled, torch._C._get_cudnn_benchmark
_cudnn_deterministic, _cudnn_tf32 = torch._C._get_cudnn_deterministic, torch._C._get_cudnn_allow_tf32


def _set_cudnn(flags: tuple[bool, bool, bool, bool]) -> None:
    cudnn: Any = torch.backends.cudnn
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = flags


def _backends() -> Any:
    """oneDNN's flags enabled and deterministic, and each backend's precision of float32 where torch has those."""
    return torch._C._get_mkldnn_enabled(), torch._C._get_mkldnn_deterministic(), *(_precision(*of) for of in _BACKENDS)


_precision: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
_BACKENDS = tuple(
    (backend, operation)
    for backend, operations in (
        ("generic", ("all",)),
        ("cuda", ("all", "conv", "rnn", "matmul")),
        ("mkldnn", ("all", "conv", "rnn", "matmul")),
    )
    for operation in operations
    if _precision is not None
)


def _set_backends(flags: tuple[Any, ...]) -> None:
    enabled, deterministic, *precisions = flags
    torch._C._set_mkldnn_enabled(enabled)
    torch._C._set_mkldnn_deterministic(deterministic)
    for of, before in zip(_BACKENDS, precisions, strict=True):
        if _precision(*of) != before:
            set_precision: Any = torch._C._set_fp32_precision_setter
            set_precision(*of, before)


def _leave_modes(depths: tuple[int, int]) -> None:
    """Leave the modes that were entered since, without calling their `__exit__`."""
    while _len_torch_function_stack() > depths[0]:
        _pop_torch_function_stack()
    while _len_torch_dispatch_stack() > depths[1]:
        _pop_mode()


_SETTINGS: tuple[Callable[[Any], Any], ...] = (
    sys.setrecursionlimit,  # first, since the others need some depth
    _set_default_device,  # before the modes, one of which it is
    _leave_modes,  # before the others, which a mode could change
    torch.set_default_dtype,
    torch.set_num_threads,
    torch._C._set_grad_enabled,
    torch.set_deterministic_debug_mode,
    lambda on: torch.set_autocast_enabled("cpu", on),
    lambda on: torch.set_autocast_enabled("cuda", on),
    lambda anomaly: torch.set_anomaly_enabled(*anomaly),
    torch.set_flush_denormal,
    _set_cudnn,
    torch.set_float32_matmul_precision,
    _set_backends,  # after the precision, which sets some of these
    lambda errors: np.seterr(**errors),
    os.chdir,
)


@contextmanager
def isolated() -> Iterator[None]:
    """While a cell runs: afterwards the random generators and warning filters are as before, and `torch_state` too.

    So that no cell depends on which cells ran before it: torch's generators (of the CPU, and of GPUs that are in use),
    NumPy's global one, Python's, and `warnings.filters`.
    """
    state, rng = torch_state(), torch.get_rng_state()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 - the global one is meant
    try:
        with warnings.catch_warnings():
            yield
    finally:
        if torch_state() != state:  # before the others, which a mode that was left entered could change
            restore(state)
        torch.set_rng_state(rng)
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
