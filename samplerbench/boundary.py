"""Isolation of plugin calls: exceptions become errors of the cell, and torch's global state is restored.

    with plugin_call(sampler, "in step 3 of 10"):
        step = next(run)

A plugin that ends the process (`os._exit`, a crash in compiled code) cannot be caught. The checkpoint of the cell
remains.
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
"""Maximum length of a plugin's message in an error."""


class plugin_call:  # noqa: N801 - used as a function
    """Context manager for a call into a plugin: converts exceptions to RunError, and restores torch's global state.

    Any exception, including SystemExit, becomes a RunError of one line that names the plugin and the operation. The
    original exception is its `__cause__`. SamplerbenchError, Stopped, KeyboardInterrupt and out-of-memory errors are
    not converted.

    The restored state is that of `torch_state`. Random generators are restored after each cell (`isolated`), not after
    each call: otherwise a sampler that uses a global generator would draw the same numbers in every step.

    Args:
        plugin: the instance, or its name (`"model digits"`).
        doing: the operation: `"in step 3 of 10"`, `"in update"`.
        memory: whether out-of-memory errors pass unchanged. If false, they become a RunError too.

    Raises:
        RunError: the plugin raised an exception.
    """

    __slots__ = ("_before", "doing", "memory", "plugin")

    def __init__(self, plugin: Configurable | str, doing: str, memory: bool = True) -> None:
        self.plugin, self.doing, self.memory = plugin, doing, memory

    def __enter__(self) -> None:
        self._before = torch_state()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if sys.getrecursionlimit() != self._before[0]:  # first, because function calls need some depth
            sys.setrecursionlimit(self._before[0])
        if torch_state() != self._before:
            restore(self._before)
        if error is None or isinstance(error, SamplerbenchError | Stopped | KeyboardInterrupt):
            return
        if self.memory and is_out_of_memory(error):
            return
        raise RunError(f"{called(self.plugin)} raised {describe(error, self.doing)}") from error


def called(plugin: Configurable | str) -> str:
    """The name of a plugin in messages: `sampler ddim`, or the name of its class if its `label` fails."""
    if isinstance(plugin, str):
        return plugin
    try:
        return f"{plugin.kind} {plugin.label()}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(plugin).__name__}"


def describe(error: BaseException, doing: str = "") -> str:
    """An exception as one line: `ValueError in step 2 of 3: message`."""
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
    """The repr of a plugin's value for messages, on one line of at most 80 characters."""
    try:
        text = " ".join(repr(value).split())
    except BaseException as raised:
        if isinstance(raised, KeyboardInterrupt):
            raise
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:79]}…"


def torch_state() -> tuple[Any, ...]:
    """The global state that `plugin_call` restores, as a tuple.

    The default dtype and device, the number of threads, the modes of gradients, autocast, anomaly detection and
    determinism, whether denormal numbers are flushed to zero, the precision of float32 products, cuDNN's and oneDNN's
    flags, the TorchFunctionModes and TorchDispatchModes that are entered (as two numbers), NumPy's handling of
    floating-point errors, Python's recursion limit, and the current folder.
    """
    try:
        precision, cudnn = torch.get_float32_matmul_precision(), _cudnn()
    except RuntimeError:  # torch raises if its old and new settings were mixed
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
        sys.float_info.min * 0.5 == 0,  # torch has no getter for flushing denormal numbers
        cudnn,
        precision,
        _backends(),
        np.geterr(),
        folder,
    )


def restore(state: tuple[Any, ...]) -> None:
    """Restore a `torch_state`, where it differs from the current state."""
    for setting, before, now in zip(_SETTINGS, state, torch_state(), strict=True):
        if before != now and before is not None:
            with suppress(RuntimeError, OSError):  # a setting that torch no longer allows to change
                setting(before)


def _default_device() -> Any:
    """The device set with `torch.set_default_device`, as given; "cpu" if none is set."""
    # torch.get_default_device creates a tensor. Read its source directly, if it exists.
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
    """oneDNN's flags enabled and deterministic, and the float32 precision of each backend if torch supports it."""
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
    """Remove modes that were entered in the meantime, without calling their `__exit__`."""
    while _len_torch_function_stack() > depths[0]:
        _pop_torch_function_stack()
    while _len_torch_dispatch_stack() > depths[1]:
        _pop_mode()


_SETTINGS: tuple[Callable[[Any], Any], ...] = (
    sys.setrecursionlimit,  # first, because the others need some depth
    _set_default_device,  # before the modes, because it is one of them
    _leave_modes,  # before the others, because a mode can intercept them
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
    _set_backends,  # after the precision, which changes some of these
    lambda errors: np.seterr(**errors),
    os.chdir,
)


@contextmanager
def isolated() -> Iterator[None]:
    """Context manager for a cell: restores the random generators, the warning filters and `torch_state`.

    A cell therefore does not depend on the cells that ran before it. The generators are those of torch (CPU, and GPUs
    in use), the global one of NumPy, and that of Python.
    """
    state, rng = torch_state(), torch.get_rng_state()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 - restore the global generator
    try:
        with warnings.catch_warnings():
            yield
    finally:
        if torch_state() != state:  # first, because a mode can intercept the others
            restore(state)
        torch.set_rng_state(rng)
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
