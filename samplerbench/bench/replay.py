"""CUDA graphs: the sampling of a whole batch is captured once and then replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samplerbench.errors import SamplerbenchError
from samplerbench.models.model import Model
from samplerbench.sampling.cost import Cost
from samplerbench.sampling.driver import Walk
from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.meter import Meter
from samplerbench.text import note

Run = Callable[[Tensor, Inputs], tuple[Walk, int]]
"""Samples a batch from its row indices (B,) and inputs. Returns the walk and the number of noise draws."""

LONGEST = 256
"""Maximum number of steps of a captured run: building a graph of 10⁵ kernels takes longer than it saves."""


@dataclass
class Replay:
    """A captured run.

    Attributes:
        graph: The captured graph.
        rows: Indices of the samples (B,), int64, on the device. Every replay reads them.
        inputs: Inputs of the B samples, on the device. Every replay reads them.
        walk: The result. Every replay overwrites its tensors.
        draws: Number of noise draws.
        cost: Cost of one image.
    """

    graph: Any
    rows: Tensor
    inputs: Inputs
    walk: Walk
    draws: int
    cost: Cost

    def __call__(self, rows: Tensor, inputs: Inputs) -> Walk:
        """Replay the run for up to B samples.

        Args:
            rows: Indices of the samples (b,), int64, with b ≤ B.
            inputs: Inputs of the samples, b rows.

        Returns:
            A copy of the result.
        """
        count = len(rows)
        self.rows[:count].copy_(rows)
        self.rows[count:].copy_(rows[-1])
        self.inputs.copy_(inputs)
        self.graph.replay()
        # Copies, because the next replay overwrites the tensors.
        return Walk(
            self.walk.x[:count].clone(),
            self.walk.finite.clone(),
            self.walk.sampler,
            self.walk.levels,
            self.walk.steps,
        )


def capture(model: Model, run: Run, rows: Tensor, inputs: Inputs, graph: Any = None) -> Replay | None:
    """Capture the run of a batch. A batch of the same size must have run before.

    A run that reads values of its own tensors cannot be captured. Examples are adaptive step sizes and schedulers that
    compute on the CPU. In this case a note is printed, and batches are sampled without graphs.

    Args:
        model: The model.
        run: Function that samples a batch.
        rows: Indices of the samples (B,), int64, on the device.
        inputs: Inputs of the samples, B rows, on the device.
        graph: The graph to record to. If None, a new CUDA graph.

    Returns:
        The captured run, or None if it cannot be captured.
    """
    rows, inputs = rows.clone(), inputs.clone()
    graph = torch.cuda.CUDAGraph() if graph is None else graph
    try:
        with _unseen(model.network), Meter(model.network) as meter, _recording(graph):
            walk, draws = run(rows, inputs)
    except (RuntimeError, SamplerbenchError) as error:
        note(
            f"note: this run cannot be captured as a CUDA graph ({str(error).splitlines()[0]}); it is sampled without."
        )
        return None
    cost = Cost(meter.network // len(rows), meter.network_backward // len(rows))
    return Replay(graph, rows, inputs, walk, draws, cost)


@contextmanager
def _unseen(network: nn.Module) -> Iterator[None]:
    """Remove the hooks of the network during a capture. A capture computes nothing, so it must not be counted."""
    hooks = (network._forward_pre_hooks, network._forward_hooks)
    kept = [dict(h) for h in hooks]
    for h in hooks:
        h.clear()
    try:
        yield
    finally:
        for h, k in zip(hooks, kept, strict=True):
            h.update(k)


def _recording(graph: Any) -> Any:
    return torch.cuda.graph(graph) if isinstance(graph, torch.cuda.CUDAGraph) else graph
