"""Sampling images by their numbers: sample i is a function of the seed, i and the cell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from samplerbench.bench.cell import Cell
from samplerbench.bench.replay import LONGEST, Replay, capture
from samplerbench.bench.span import Span
from samplerbench.boundary import plugin_call, shown
from samplerbench.errors import OutOfMemoryError, RunError, SamplerbenchError, argument, is_out_of_memory
from samplerbench.models.model import Model
from samplerbench.models.sample import prepare_model, start_batch
from samplerbench.sampling import Step
from samplerbench.sampling.cost import Cost
from samplerbench.sampling.driver import OnStep, Walk


@dataclass(frozen=True)
class Batched:
    """One sampled batch: which samples, their images (B, C, H, W) in [-1, 1], and the last states (B, ...).

    sampling, decoding: the time up to the states, and from them to the images (None for a model of pixels).
    stochastic: whether noise was drawn. uncounted: the cost that no hook has seen, because a graph was replayed.
    """

    index: Tensor
    images: Tensor
    states: Tensor
    sampling: Span
    decoding: Span | None = None
    stochastic: bool = False
    uncounted: Cost = field(default_factory=Cost)


def prepare(model: Model, cell: Cell) -> None:
    """Estimate what the sampler needs of the model besides D, where it is not known yet.

    Raises:
        SamplerbenchError: the cell could not be planned.
    """
    cell.check()
    prepare_model(model, cell.sampler, cell.sigmas)


def generate(
    model: Model,
    cell: Cell,
    index: Tensor,
    labels: Tensor | None,
    seed: int,
    batch_size: int,
    on_step: OnStep | None = None,
    decode: bool = True,
) -> Iterator[Batched]:
    """Sample the images `index` (n,) int64 with `labels` (n,) or None, batch by batch.

    Sample i is a function of (seed, i) and the cell alone. decode: false leaves `images` what the states are. On a
    GPU a batch is given out when the next one has been queued, so that the device never waits for what is done with it.

    Raises:
        UserError, RunError: what the sampler meets; OutOfMemoryError names a batch size to try.
    """
    prepare(model, cell)
    queued: _Queued | None = None
    for first in range(0, len(index), batch_size):
        part = index[first : first + batch_size]
        chosen = None if labels is None else labels[first : first + batch_size].to(model.device)
        with explain_memory(len(part)):
            made = _queue(model, cell, part, chosen, seed, batch_size, on_step, decode)
        if model.device.type != "cuda":
            yield made.batch
            continue
        if queued is not None:
            yield queued.checked()
        queued = made
    if queued is not None:
        yield queued.checked()


@dataclass
class _Queued:
    """A batch that a device is still at work on, and a copy of what tells whether its states were finite."""

    batch: Batched
    walk: Walk
    finite: Tensor
    arrived: Any

    def checked(self) -> Batched:
        if self.arrived is not None:
            self.arrived.synchronize()
        self.walk.check(self.finite)
        return self.batch


def _queue(
    model: Model,
    cell: Cell,
    part: Tensor,
    labels: Tensor | None,
    seed: int,
    batch_size: int,
    on_step: OnStep | None,
    decode: bool,
) -> _Queued:
    rows = part.to(model.device)
    replay = _replay(model, cell, rows, labels, seed, batch_size) if model.graphs else None
    sampling = Span(model.device)
    if replay is None:
        walked, draws = _walk(model, cell, rows, labels, seed, on_step)
        uncounted = Cost()
    else:
        walked, draws = replay(rows, labels), replay.draws
        uncounted = replay.cost * len(part)
        for i, level in enumerate(walked.levels if on_step is not None else []):
            on_step(i, Step(level, walked.x))  # type: ignore[misc]
    sampling.stop()
    decoding = Span(model.device) if model.autoencoder is not None else None
    images = walked.x
    if decode:
        with plugin_call(_name(model), "in decode"), torch.no_grad():
            images = model.decode(walked.x)
        expected = (len(part), *model.image_shape)
        if not isinstance(images, Tensor) or images.shape != expected:
            raise RunError(f"{_name(model)}: decode returned {_what(images)}; it must be a tensor of shape {expected}.")
    if decoding is not None:
        decoding.stop()
    arrived = None
    finite = walked.finite.to("cpu", non_blocking=True)
    if model.device.type == "cuda":
        arrived = torch.cuda.Event()
        arrived.record()
    batch = Batched(part, images, walked.x, sampling, decoding, draws > 0, uncounted)
    return _Queued(batch, walked, finite, arrived)


def _walk(
    model: Model, cell: Cell, rows: Tensor, labels: Tensor | None, seed: int, on_step: OnStep | None = None
) -> tuple[Walk, int]:
    """Sample the rows (B,) on the device; the walk, and how often noise was drawn."""
    batch = start_batch(model, cell.sampler, cell.sigmas, rows, labels, guidance=cell.guidance, seed=seed)
    return batch.walk(on_step), batch.noise.draws


def _name(model: Model) -> str:
    return f"model {model.identity.get('source', type(model).__name__)}"


def _what(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)


def _replay(model: Model, cell: Cell, rows: Tensor, labels: Tensor | None, seed: int, batch_size: int) -> Replay | None:
    """The captured run of this cell for batches of this size, from the second such batch on; None without one."""
    guided = cell.guidance is not None and bool(cell.guidance.needs & {"classifier", "image classifier"})
    if guided or len(cell.sigmas) - 1 > LONGEST:
        return None
    guidance = None if cell.guidance is None else cell.guidance.spec
    key = (cell.sampler.spec, guidance, tuple(cell.sigmas.tolist()), seed, batch_size, labels is None)
    known = model.replays
    if key not in known:
        known.clear()  # of the cell before, whose graph holds its own memory
        known[key] = _FIRST if len(rows) == batch_size else None
        return None
    if known[key] is _FIRST and len(rows) < batch_size:
        return None  # what is captured must hold a whole batch
    if known[key] is _FIRST:
        known[key] = capture(model, lambda r, given: _walk(model, cell, r, given, seed), rows, labels)
    return known[key]


_FIRST: Any = object()
"""A batch of the cell has been run, which loads and warms up what a capture must not."""


@contextmanager
def explain_memory(batch: int) -> Iterator[None]:
    """Turn "out of memory" into one line with the batch size to try."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, SamplerbenchError) or not is_out_of_memory(error):
            raise
        advice = f"one image alone does not fit; use another {argument('device')}"
        if batch > 1:
            advice = f"try {argument('batch_size', batch // 2)}"
        raise OutOfMemoryError(f"the device has not enough memory for a batch of {batch}; {advice}.") from error
