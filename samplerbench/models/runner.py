"""How a network is run: in which precision, compiled or not, and with batches of which sizes."""

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
"""What `dtype` may be, and the dtype that the network's weights then have."""

FEWEST = 4
"""Rows below which a CPU's matrix kernels add up in another order than for a larger batch."""
SMALL = 10_000_000
"""Parameters up to which the rows that fill such a batch cost next to nothing."""


@dataclass(frozen=True)
class HowRun:
    """How a network is executed.

    Attributes:
        precision: in which it multiplies, as `dtype` names it; "" where only its weights' dtype is known.
        compiled: whether it is compiled by torch.compile.
        graphs: whether whole batches are replayed as CUDA graphs.
    """

    precision: str = ""
    compiled: bool = False
    graphs: bool = False


def how_run(network: nn.Module) -> HowRun:
    """How a network is executed: what its `Runner` says, or the default for a network without one."""
    return network.how if isinstance(network, Runner) else HowRun()


class Runner(nn.Module):
    """A network, called with batches of sizes that suit it: rows are repeated to fill a batch, and cut off again.

    On a CPU a batch of fewer than 4 rows is filled to 4, for networks up to 10M parameters: the kernels for one to
    three rows round differently, so that an image would depend on the batch it is in. A compiled network is made anew
    for every size, so a batch is filled to the next size that is known already. Who counts evaluations by hooks on this
    module sees the rows that were asked for.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        compiled: bool = False,
        backend: Any = "inductor",
        precision: str = "",
        graphs: bool = False,
    ) -> None:
        super().__init__()
        self.inner = network
        small = sum(p.numel() for p in network.parameters()) <= SMALL
        self.fewest = FEWEST if device.type == "cpu" and small else 1
        self.how = HowRun(precision, compiled, graphs)
        self.sizes: set[int] = set()
        """The sizes that a compiled network has met."""
        self.eager = False
        """Whether a compiled network is run as it was before, for a trial of many sizes."""
        if compiled:
            network.compile(dynamic=False, backend=backend)

    def __getattr__(self, name: str) -> Any:
        """What the network has besides: its configuration, its dtype."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output for a batch of any size."""
        call = self.inner.forward if self.eager else self.inner
        rows = next(len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim)
        size = self.size(rows)
        if size == rows:
            return call(*args, **kwargs)

        def fill(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.ndim and len(value) == rows):
                return value
            return torch.cat([value, value[-1:].expand(size - rows, *value.shape[1:])])

        output = call(*map(fill, args), **{key: fill(value) for key, value in kwargs.items()})
        return _cut(output, rows)

    def size(self, rows: int) -> int:
        """The size of the batch that `rows` rows are run in."""
        if self.eager or not self.how.compiled:
            return max(rows, self.fewest)
        # Rows that are computed for nothing cost less than another compilation.
        size = min((s for s in self.sizes if s >= rows), default=rows)
        self.sizes.add(size)
        return size


def _cut(output: Any, rows: int) -> Any:
    """The first rows of a network's output: a tensor, a tuple, or one of diffusers' and transformers' structures."""
    if isinstance(output, Tensor):
        return output[:rows]
    if isinstance(output, dict):
        return type(output)(**{key: _cut(value, rows) for key, value in output.items()})
    if isinstance(output, tuple):
        return tuple(_cut(value, rows) for value in output)
    return output


def check_compiler() -> None:
    """Raise UserError where torch.compile has nothing to compile with."""
    known = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    if not any(shutil.which(name) for name in known if name):
        raise UserError(
            f"{argument('compile')} needs a C++ compiler (g++ or clang++), and there is none here: leave it out."
        )


def check_dtype(name: str) -> None:
    """Raise UserError for a `dtype` that there is not."""
    if name not in PRECISIONS:
        raise UserError(f"{argument('dtype', name)}: known are {', '.join(PRECISIONS)}.")


def set_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the network's weights, with the device set to multiply in that precision.

    fp32 means fp32: torch's own default rounds a convolution's factors to 10 bits on NVIDIA's devices, which is tf32.

    Raises:
        UserError: there is no such precision, or it is not one of the device.
    """
    check_dtype(name)
    if name == "tf32" and device.type != "cuda":
        raise UserError(
            f"{argument('dtype', 'tf32')} is of NVIDIA GPUs; on this device use {argument('dtype', 'fp32')}."
        )
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        torch.backends.cudnn.allow_tf32 = name == "tf32"
    return PRECISIONS[name]
