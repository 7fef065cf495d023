"""Whole batches as CUDA graphs: the run of a sampler over its grid, captured once and replayed."""

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
"""Samples the batch of these rows (B,) with these inputs; gives the walk and how often noise was drawn."""

LONGEST = 256
"""Steps beyond which a run is not captured: a graph of 10⁵ kernels takes longer to build than it saves."""


@dataclass
class Replay:
    """A captured run: what it reads, what it writes, and what it costs.

    Attributes:
        graph: the captured graph.
        rows: (B,) int64 on the device, read anew by every replay.
        inputs: of the B samples on the device, read anew by every replay.
        walk: what a run gives; its tensors are overwritten by every replay.
        draws: how often noise was drawn.
        cost: what the meter counts for one image.
    """

    graph: Any
    rows: Tensor
    inputs: Inputs
    walk: Walk
    draws: int
    cost: Cost

    def __call__(self, rows: Tensor, inputs: Inputs) -> Walk:
        """The walk of at most B samples."""
        count = len(rows)
        self.rows[:count].copy_(rows)
        self.rows[count:].copy_(rows[-1])
        self.inputs.copy_(inputs)
        self.graph.replay()
        # The next replay writes over them.
        return Walk(
            self.walk.x[:count].clone(),
            self.walk.finite.clone(),
            self.walk.sampler,
            self.walk.levels,
            self.walk.steps,
        )


def capture(model: Model, run: Run, rows: Tensor, inputs: Inputs, graph: Any = None) -> Replay | None:
    """Capture the run of a batch of this size, which must have been run once before; None where it cannot be.

    A run cannot be captured that looks at its own values, as an adaptive step size or a scheduler on the CPU does. A
    line says so, and the batches are sampled as without graphs.

    graph: what records and replays; a CUDA graph unless given.
    """
    rows, inputs = rows.clone(), inputs.clone()
    graph = torch.cuda.CUDAGraph() if graph is None else graph
    try:
        with _unseen(model.network), Meter(model.network) as meter, _recording(graph):
            walk, draws = run(rows, inputs)
    except (RuntimeError, SamplerbenchError) as error:
        note(f"note: this run cannot be made a CUDA graph ({str(error).splitlines()[0]}); it is sampled without.")
        return None
    cost = Cost(meter.network // len(rows), meter.network_backward // len(rows))
    return Replay(graph, rows, inputs, walk, draws, cost)


@contextmanager
def _unseen(network: nn.Module) -> Iterator[None]:
    """A capture computes nothing, so who counts the run does not see it; the replays are counted."""
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
