"""Execution of networks: precision, compilation and batch sizes."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samplerbench.errors import UserError, argument

PRECISIONS = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
"""Values of `dtype`, and the corresponding dtype of the network's weights."""

FEWEST = 4
"""Minimum number of rows on a CPU. Matrix kernels for smaller batches use another order of summation."""
SMALL = 10_000_000
"""Maximum number of parameters for padding on a CPU. The additional rows are cheap for small networks."""


@dataclass(frozen=True)
class HowRun:
    """How a network is executed.

    Attributes:
        precision: precision of multiplications, a value of `dtype`. Empty if unknown.
        compiled: whether the network is compiled with torch.compile.
        graphs: whether whole batches run as CUDA graphs.
        memory: ways in which memory is saved, separated by commas. Empty for none.
    """

    precision: str = ""
    compiled: bool = False
    graphs: bool = False
    memory: str = ""


def how_run(network: nn.Module) -> HowRun:
    """Return how a network is executed. For a network without `Runner`, return the default."""
    return network.how if isinstance(network, Runner) else HowRun()


class Runner(nn.Module):
    """A network that pads batches to suitable sizes by repeating the last row, and removes the padding afterwards.

    On a CPU, batches with fewer than 4 rows are padded to 4 rows, for networks with at most 10M parameters. The kernels
    for one to three rows round differently, so images would depend on the batch size. A compiled network is recompiled
    for every batch size, so batches are padded to the next size that is already compiled. Hooks on this module see the
    batch without padding.

    Args:
        network: the network.
        device: device of the network.
        compiled: whether to compile the network with torch.compile.
        backend: backend of torch.compile.
        precision: precision of multiplications, a value of `dtype`.
        graphs: whether whole batches run as CUDA graphs.
        memory: ways in which memory is saved, separated by commas.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        compiled: bool = False,
        backend: Any = "inductor",
        precision: str = "",
        graphs: bool = False,
        memory: str = "",
    ) -> None:
        super().__init__()
        self.inner = network
        small = sum(p.numel() for p in network.parameters()) <= SMALL
        self.fewest = FEWEST if device.type == "cpu" and small else 1
        self.how = HowRun(precision, compiled, graphs, memory)
        self.sizes: set[int] = set()
        """Batch sizes for which the network is compiled."""
        self.eager = False
        """Whether to run a compiled network without compilation, to try many batch sizes."""
        if compiled:
            network.compile(dynamic=False, backend=backend)

    def __getattr__(self, name: str) -> Any:
        """Delegate other attributes to the network, such as its configuration and dtype."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the network for a batch of any size."""
        call = self.inner.forward if self.eager else self.inner
        rows = next(len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim)
        size = self.size(rows)
        if size == rows:
            return call(*args, **kwargs)

        def fill(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: fill(item) for key, item in value.items()}
            if not (isinstance(value, Tensor) and value.ndim and len(value) == rows):
                return value
            return torch.cat([value, value[-1:].expand(size - rows, *value.shape[1:])])

        output = call(*map(fill, args), **{key: fill(value) for key, value in kwargs.items()})
        return _cut(output, rows)

    def size(self, rows: int) -> int:
        """Return the padded batch size for a number of rows."""
        if self.eager or not self.how.compiled:
            return max(rows, self.fewest)
        # Padding costs less than another compilation.
        size = min((s for s in self.sizes if s >= rows), default=rows)
        self.sizes.add(size)
        return size


def _cut(output: Any, rows: int) -> Any:
    """Return the first rows of an output: a tensor, a tuple, or an output dataclass of diffusers or transformers."""
    if isinstance(output, Tensor):
        return output[:rows]
    if isinstance(output, dict):
        return type(output)(**{key: _cut(value, rows) for key, value in output.items()})
    if isinstance(output, tuple):
        return tuple(_cut(value, rows) for value in output)
    return output


def check_compiler() -> None:
    """Raise UserError if torch.compile finds no C++ compiler."""
    known = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    if not any(shutil.which(name) for name in known if name):
        raise UserError(f"{argument('compile')} requires a C++ compiler (g++ or clang++), but none was found.")


def check_dtype(name: str) -> None:
    """Raise UserError for an unknown `dtype`."""
    if name not in PRECISIONS:
        raise UserError(f"{argument('dtype', name)}: choose one of {', '.join(PRECISIONS)}.")


def set_precision(name: str, device: torch.device) -> torch.dtype:
    """Set the multiplication precision of the device.

    fp32 disables TF32. By default, torch uses TF32 for convolutions on NVIDIA GPUs, which rounds inputs to 10 bits.

    Args:
        name: a value of `dtype`.
        device: device of the network.

    Returns:
        The dtype of the network's weights.

    Raises:
        UserError: if the precision is unknown, or the device does not support it.
    """
    check_dtype(name)
    if name == "tf32" and device.type != "cuda":
        raise UserError(
            f"{argument('dtype', 'tf32')} requires an NVIDIA GPU; use {argument('dtype', 'fp32')} on this device."
        )
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        torch.backends.cudnn.allow_tf32 = name == "tf32"
    return PRECISIONS[name]
