"""Sampling images by their numbers: sample i is a function of the seed, i, its inputs and the cell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from samplerbench.bench.cell import Cell
from samplerbench.bench.replay import LONGEST, Replay, capture
from samplerbench.bench.span import Span
from samplerbench.boundary import plugin_call, shown
from samplerbench.errors import OutOfMemoryError, RunError, SamplerbenchError, argument, is_out_of_memory
from samplerbench.models.model import Model
from samplerbench.models.runner import how_run
from samplerbench.models.sample import bind, start_batch
from samplerbench.sampling import Generator, Inputs, Step
from samplerbench.sampling.cost import Cost
from samplerbench.sampling.driver import OnStep, Walk
from samplerbench.sampling.generator import bind_generator
from samplerbench.sampling.guidance import bind_guidance


@dataclass(frozen=True)
class Batched:
    """One sampled batch.

    Attributes:
        index: (B,) int64, which samples.
        images: (B, C, H, W) in [-1, 1].
        states: (B, ...), the last states; of a generator, the images.
        sampling: the time up to the states.
        decoding: the time from the states to the images; None for a model of pixels, and for a generator.
        stochastic: whether noise was drawn on the way.
        uncounted: the cost that no hook has seen, because a graph was replayed.
    """

    index: Tensor
    images: Tensor
    states: Tensor
    sampling: Span
    decoding: Span | None = None
    stochastic: bool = False
    uncounted: Cost = field(default_factory=Cost)


class Generates(Protocol):
    """What the engine runs: a sampler on a network, or a generator.

    Attributes:
        network: where evaluations are counted as NFE.
        beside: further networks, whose forward and backward passes are counted beside it.
        bound_evaluations: network evaluations (rows) of the estimates that it was bound with, which are not sampling.
    """

    network: nn.Module
    beside: tuple[nn.Module, ...]
    bound_evaluations: int

    def generate(
        self,
        index: Tensor,
        inputs: Inputs,
        seed: int,
        batch_size: int,
        on_step: OnStep | None = None,
        decode: bool = True,
    ) -> Iterator[Batched]:
        """Make the images `index`, batch by batch.

        Args:
            index: (n,) int64, which samples.
            inputs: their labels or prompts, n rows.
            seed: of all noise.
            batch_size: images at a time.
            on_step: called after each step of a sampler.
            decode: false leaves `images` what the states are.

        Raises:
            UserError, RunError: what is wrong with a plugin; OutOfMemoryError names a batch size to try.
        """


def prepare(model: Model, cell: Cell) -> Generates:
    """What makes the images of a cell: its sampler or its generator, bound to the model.

    What a plugin estimates when it is bound is no part of sampling, so call it outside the meter.

    Raises:
        SamplerbenchError: the cell could not be planned, or a plugin could not be bound.
    """
    cell.check()
    if isinstance(cell.method, Generator):
        return PluginGenerator(model, bind_generator(cell.method, model))
    return SamplerOnModel(model, bound_cell(model, cell))


def bound_cell(model: Model, cell: Cell) -> Cell:
    """The cell with its sampler and guidance bound to the model. Raises SamplerbenchError as `prepare`."""
    cell.check()
    sampler = bind(model, cell.sampler, cell.sigmas)
    return replace(cell, method=sampler, guidance=bind_guidance(cell.guidance, model))


def generate(
    model: Model,
    cell: Cell,
    index: Tensor,
    inputs: Inputs,
    seed: int,
    batch_size: int,
    on_step: OnStep | None = None,
    decode: bool = True,
) -> Iterator[Batched]:
    """`prepare(model, cell).generate(...)`: the images `index` of a cell, batch by batch. See `Generates.generate`."""
    yield from prepare(model, cell).generate(index, inputs, seed, batch_size, on_step, decode)


class PluginGenerator:
    """A generator plugin as what the engine runs (`Generates`)."""

    def __init__(self, model: Model, generator: Generator) -> None:
        self.model, self.generator = model, generator
        with plugin_call(generator, "in network"):
            network = generator.network
        if network is not None and not isinstance(network, nn.Module):
            raise RunError(
                f"generator {generator.label()}: network is {shown(network)}; it must be a torch.nn.Module or None."
            )
        self.network: nn.Module = nn.Identity() if network is None else network
        self.beside: tuple[nn.Module, ...] = ()
        self.bound_evaluations = generator.bound_evaluations

    def generate(
        self,
        index: Tensor,
        inputs: Inputs,
        seed: int,
        batch_size: int,
        on_step: OnStep | None = None,
        decode: bool = True,
    ) -> Iterator[Batched]:
        """See `Generates.generate`."""
        model = self.model
        for rows in torch.arange(len(index)).split(batch_size):
            part = index[rows]
            on_device = part.to(model.device)
            given = model.inputs(on_device, inputs.rows(rows).to(model.device))
            span = Span(model.device)
            with explain_memory(len(part)), plugin_call(self.generator, "in images"), torch.no_grad():
                images = self.generator.images(on_device, given, seed)
            expected = (len(part), *model.image_shape)
            if not isinstance(images, Tensor) or images.shape != expected:
                raise RunError(
                    f"generator {self.generator.label()}: images returned {_what(images)}; it must be a tensor of "
                    f"shape {expected}."
                )
            if not bool(images.isfinite().all()):
                raise RunError(f"generator {self.generator.label()}: an image is not finite.")
            yield Batched(part, images, images, span.stop(), stochastic=True)


class SamplerOnModel:
    """A sampler on a model's network as what the engine runs (`Generates`).

    On a GPU a batch is given out when the next one has been queued, so that the device never waits for what is done
    with it.
    """

    def __init__(self, model: Model, cell: Cell) -> None:
        self.model, self.cell = model, cell
        self.network = model.network
        self.beside = () if cell.guidance is None else tuple(cell.guidance.networks)
        plugins = (cell.sampler, cell.guidance, cell.spacing)
        self.bound_evaluations = sum(p.bound_evaluations for p in plugins if p is not None)
        self.replays: dict[Any, Replay | None] = {}
        """The captured run, by what it was captured for."""

    def generate(
        self,
        index: Tensor,
        inputs: Inputs,
        seed: int,
        batch_size: int,
        on_step: OnStep | None = None,
        decode: bool = True,
    ) -> Iterator[Batched]:
        """See `Generates.generate`."""
        device = self.model.device
        queued: _Queued | None = None
        for rows in torch.arange(len(index)).split(batch_size):
            with explain_memory(len(rows)):
                made = self._queue(index[rows], inputs.rows(rows).to(device), seed, batch_size, on_step, decode)
            if device.type != "cuda":
                yield made.batch
                continue
            if queued is not None:
                yield queued.checked()
            queued = made
        if queued is not None:
            yield queued.checked()

    def _queue(
        self, part: Tensor, inputs: Inputs, seed: int, batch_size: int, on_step: OnStep | None, decode: bool
    ) -> _Queued:
        model = self.model
        rows = part.to(model.device)
        replay = self._replay(rows, inputs, seed, batch_size) if how_run(model.network).graphs else None
        sampling = Span(model.device)
        if replay is None:
            walked, draws = self._walk(rows, inputs, seed, on_step)
            uncounted = Cost()
        else:
            walked, draws = replay(rows, inputs), replay.draws
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
                raise RunError(
                    f"{_name(model)}: decode returned {_what(images)}; it must be a tensor of shape {expected}."
                )
        if decoding is not None:
            decoding.stop()
        arrived = None
        finite = walked.finite.to("cpu", non_blocking=True)
        if model.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        batch = Batched(part, images, walked.x, sampling, decoding, draws > 0, uncounted)
        return _Queued(batch, walked, finite, arrived)

    def _walk(self, rows: Tensor, inputs: Inputs, seed: int, on_step: OnStep | None = None) -> tuple[Walk, int]:
        """Sample the rows (B,) on the device; the walk, and how often noise was drawn."""
        cell = self.cell
        batch = start_batch(self.model, cell.sampler, cell.sigmas, rows, inputs, guidance=cell.guidance, seed=seed)
        return batch.walk(on_step), batch.noise.draws

    def _replay(self, rows: Tensor, inputs: Inputs, seed: int, batch_size: int) -> Replay | None:
        """The captured run for batches of this size, from the second such batch on; None without one."""
        cell, known = self.cell, self.replays
        if (cell.guidance is not None and cell.guidance.differentiates) or len(cell.sigmas) - 1 > LONGEST:
            return None
        key = (seed, batch_size)
        if key not in known:
            known.clear()  # of another size, whose graph holds its own memory
            known[key] = _FIRST if len(rows) == batch_size else None
            return None
        if known[key] is _FIRST and len(rows) < batch_size:
            return None  # what is captured must hold a whole batch
        if known[key] is _FIRST:
            known[key] = capture(self.model, lambda r, given: self._walk(r, given, seed), rows, inputs)
        return known[key]


_FIRST: Any = object()
"""A batch has been run, which loads and warms up what a capture must not."""


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


def _name(model: Model) -> str:
    return f"model {model.identity.get('source', type(model).__name__)}"


def _what(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)


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
