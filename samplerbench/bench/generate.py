"""Sampling of images by index. Sample i depends only on the seed, i, its inputs and the cell."""

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
from samplerbench.errors import OutOfMemoryError, RunError, SamplerbenchError, UserError, argument, is_out_of_memory
from samplerbench.limits import MAX_CLASSES
from samplerbench.models.model import Model
from samplerbench.models.runner import how_run
from samplerbench.models.sample import bind, start_batch, states_of_noise
from samplerbench.sampling import Generator, Inputs, Step
from samplerbench.sampling.cost import Cost
from samplerbench.sampling.driver import OnStep, Walk
from samplerbench.sampling.generator import bind_generator
from samplerbench.sampling.guidance import bind_guidance
from samplerbench.sampling.trajectory import Recorder, Trajectory


@dataclass(frozen=True)
class Batched:
    """One sampled batch.

    Attributes:
        index: Indices of the samples (B,), int64.
        images: Images (B, C, H, W) in [-1, 1].
        states: Final states (B, ...). The images for a generator.
        sampling: Time of sampling the states.
        decoding: Time of decoding the states to images. None for a model in pixel space and for a generator.
        stochastic: Whether noise was drawn during sampling.
        uncounted: Cost that hooks cannot count because a CUDA graph was replayed.
        labels: Labels of the images (B,), int64 on the CPU, from a generator with `own_labels`. Otherwise None.
        trajectory: All states of the batch, if they were requested. Otherwise None.
    """

    index: Tensor
    images: Tensor
    states: Tensor
    sampling: Span
    decoding: Span | None = None
    stochastic: bool = False
    uncounted: Cost = field(default_factory=Cost)
    labels: Tensor | None = None
    trajectory: Trajectory | None = None


class Generates(Protocol):
    """Interface of a method that the engine runs: a sampler on a network, or a generator.

    Attributes:
        network: Network whose evaluations are counted as NFE.
        beside: Further networks. Their forward and backward passes are counted separately.
        bound_evaluations: Network evaluations (rows) of estimates that were made when the method was bound to the
            model. They are not part of sampling.
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
        """Generate the images with the given indices, in batches.

        Args:
            index: Indices of the samples (n,), int64.
            inputs: Labels or prompts of the samples, n rows.
            seed: Seed of all noise.
            batch_size: Images per batch.
            on_step: Called after each step of a sampler.
            decode: Whether to decode the states. If false, `images` are the states.

        Yields:
            The batches, in the order of `index`.

        Raises:
            UserError: If a plugin rejects the model or the inputs.
            RunError: If a plugin fails.
            OutOfMemoryError: If a batch does not fit into memory. The message suggests a batch size.
        """


def prepare(model: Model, cell: Cell, start: Tensor | None = None, record: bool = False) -> Generates:
    """Bind the sampler or generator of a cell to the model.

    A plugin may evaluate the network when it is bound. Call this function outside the meter, because these evaluations
    are not part of sampling.

    Args:
        model: The model.
        cell: The cell.
        start: Noise of unit variance for the initial states (n, *shape), one row for each index that is generated. If
            None, it is drawn from the seed and the indices.
        record: Whether the batches have a trajectory.

    Returns:
        The bound sampler or generator.

    Raises:
        SamplerbenchError: If the cell could not be planned, if a plugin cannot be bound, or if a generator is given
            initial noise or asked for a trajectory.
    """
    cell.check()
    if model.by_own_call and not isinstance(cell.method, Generator):
        if start is not None or record:
            raise UserError(
                f"{_name(model)} runs a pipeline by its own call: initial noise and trajectories are not supported."
            )
        return PipelineCell(model, cell)
    if isinstance(cell.method, Generator) and start is None and not record:
        return PluginGenerator(model, bind_generator(cell.method, model))
    return SamplerOnModel(model, bound_cell(model, cell), start, record)


def bound_cell(model: Model, cell: Cell) -> Cell:
    """Return the cell with its sampler and guidance bound to the model.

    Args:
        model: The model.
        cell: The cell.

    Returns:
        The bound cell.

    Raises:
        SamplerbenchError: If the cell could not be planned, or if a plugin cannot be bound.
    """
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
    start: Tensor | None = None,
    record: bool = False,
) -> Iterator[Batched]:
    """Generate images of a cell in batches. See `prepare` for `start` and `record`, else `Generates.generate`."""
    yield from prepare(model, cell, start, record).generate(index, inputs, seed, batch_size, on_step, decode)


class PluginGenerator:
    """Runs a generator plugin. Implements `Generates`.

    Args:
        model: The model.
        generator: The generator, bound to the model.
    """

    def __init__(self, model: Model, generator: Generator) -> None:
        self.model, self.generator = model, generator
        network = generator.network
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
            yield Batched(part, images, images, span.stop(), stochastic=True, labels=self._labels(on_device, seed))

    def _labels(self, index: Tensor, seed: int) -> Tensor | None:
        """The labels of the images that the generator states itself, (B,) int64 on the CPU, or None."""
        if not self.generator.own_labels:
            return None
        with plugin_call(self.generator, "in labels"):
            labels = self.generator.labels(index, seed)
        if labels is None:
            return None
        if not isinstance(labels, Tensor) or labels.shape != index.shape or labels.dtype != torch.int64:
            raise RunError(
                f"generator {self.generator.label()}: labels returned {_what(labels)}; it must be an int64 tensor of "
                f"shape {tuple(index.shape)}, or None."
            )
        labels = labels.cpu()
        classes = self.model.classes or MAX_CLASSES
        low, high = int(labels.min()), int(labels.max())
        if not 0 <= low <= high < classes:
            raise RunError(
                f"generator {self.generator.label()}: labels returned values from {low} to {high}; they must be 0 to "
                f"{classes - 1:,}."
            )
        return labels


class SamplerOnModel:
    """Runs a sampler on the network of a model. Implements `Generates`.

    On a GPU, a batch is yielded after the next batch has been queued, so that the GPU stays busy while the batch is
    measured.

    Args:
        model: The model.
        cell: The cell, bound to the model.
        start: Noise of unit variance for the initial states, or None. See `prepare`.
        record: Whether the batches have a trajectory.
    """

    def __init__(self, model: Model, cell: Cell, start: Tensor | None = None, record: bool = False) -> None:
        self.model, self.cell, self.start, self.record = model, cell, start, record
        self.network = model.network
        self.beside = () if cell.guidance is None else tuple(cell.guidance.networks)
        plugins = (cell.sampler, cell.guidance, cell.spacing)
        self.bound_evaluations = sum(p.bound_evaluations for p in plugins if p is not None)
        self.replays: dict[Any, Replay | None] = {}
        """The captured run by (seed, batch size)."""

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
            with explain_memory(len(rows), self.model.text):
                z = None if self.start is None else self.start[rows].to(device)
                made = self._queue(index[rows], inputs.rows(rows).to(device), seed, batch_size, on_step, decode, z)
            if device.type != "cuda":
                yield made.batch
                continue
            if queued is not None:
                yield queued.checked()
            queued = made
        if queued is not None:
            yield queued.checked()

    def _queue(
        self,
        part: Tensor,
        inputs: Inputs,
        seed: int,
        batch_size: int,
        on_step: OnStep | None,
        decode: bool,
        z: Tensor | None,
    ) -> _Queued:
        model = self.model
        rows = part.to(model.device)
        # A captured run draws its own start, and keeps only its last state.
        captured = how_run(model.network).graphs and z is None and not self.record
        replay = self._replay(rows, inputs, seed, batch_size) if captured else None
        trajectory: Trajectory | None = None
        sampling = Span(model.device)
        if replay is None:
            walked, draws, trajectory = self._walk(rows, inputs, seed, on_step, z)
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
        batch = Batched(part, images, walked.x, sampling, decoding, draws > 0, uncounted, trajectory=trajectory)
        return _Queued(batch, walked, finite, arrived)

    def _walk(
        self, rows: Tensor, inputs: Inputs, seed: int, on_step: OnStep | None = None, z: Tensor | None = None
    ) -> tuple[Walk, int, Trajectory | None]:
        """Sample the rows (B,) on the device. Return the walk, the number of noise draws, and the trajectory."""
        cell, model = self.cell, self.model
        first = float(cell.sigmas[0])
        x = None if z is None else states_of_noise(model, first, z)
        batch = start_batch(model, cell.sampler, cell.sigmas, rows, inputs, guidance=cell.guidance, seed=seed, x=x)
        if not self.record:
            return batch.walk(on_step), batch.noise.draws, None
        recorder = Recorder(first, batch.x)

        def both(number: int, step: Step) -> None:
            recorder.step(number, step)
            if on_step is not None:
                on_step(number, step)

        return batch.walk(both), batch.noise.draws, recorder.trajectory()

    def _replay(self, rows: Tensor, inputs: Inputs, seed: int, batch_size: int) -> Replay | None:
        """Return the captured run for this batch size, from the second batch on. None if nothing is captured."""
        cell, known = self.cell, self.replays
        if self.model.observation is not None:
            return None  # an operator may copy its constants to the device
        if (cell.guidance is not None and cell.guidance.differentiates) or len(cell.sigmas) - 1 > LONGEST:
            return None
        key = (seed, batch_size)
        if key not in known:
            known.clear()  # a graph for another batch size, which holds its own memory
            known[key] = _FIRST if len(rows) == batch_size else None
            return None
        if known[key] is _FIRST and len(rows) < batch_size:
            return None  # only a full batch is captured
        if known[key] is _FIRST:
            known[key] = capture(self.model, lambda r, given: self._walk(r, given, seed)[:2], rows, inputs)
        return known[key]


class PipelineCell:
    """Runs a sampler as the scheduler of a stock pipeline. Implements `Generates`.

    The time of sampling includes that of the text encoders and of the decoder, which the pipeline calls itself.

    Args:
        model: The pipeline, a `PipelineModel`.
        cell: The cell.
    """

    def __init__(self, model: Any, cell: Cell) -> None:
        from samplerbench.diffusers import as_scheduler

        as_scheduler(cell.sampler, model.config)  # refuses a sampler that cannot be a scheduler, before sampling
        self.model, self.cell = model, cell
        self.network: nn.Module = model.counted
        self.beside: tuple[nn.Module, ...] = ()
        self.bound_evaluations = 0

    def generate(
        self,
        index: Tensor,
        inputs: Inputs,
        seed: int,
        batch_size: int,
        on_step: OnStep | None = None,
        decode: bool = True,
    ) -> Iterator[Batched]:
        """See `Generates.generate`. The images are always decoded, and are also the states."""
        model, cell = self.model, self.cell
        for rows in torch.arange(len(index)).split(batch_size):
            span = Span(model.device)
            with explain_memory(len(rows)):
                images, drew = model.images(cell.sampler, cell.sigmas, index[rows], inputs.rows(rows), seed, on_step)
            expected = (len(rows), *model.image_shape)
            if images.shape != expected:
                raise RunError(
                    f"{model.identity['source']}: the pipeline made images of shape {tuple(images.shape)} instead of "
                    f"{expected}."
                )
            if not bool(images.isfinite().all()):
                raise RunError(f"{model.identity['source']}: an image of the pipeline is not finite.")
            yield Batched(index[rows], images, images, span.stop(), stochastic=drew)


_FIRST: Any = object()
"""Marks that a first batch has run. It loads and warms up everything that cannot run during a capture."""


@dataclass
class _Queued:
    """A batch that the device may still be computing, with a copy of the flag for finite states."""

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
def explain_memory(batch: int, text: bool = False) -> Iterator[None]:
    """Convert out-of-memory errors to an OutOfMemoryError that suggests a batch size.

    Args:
        batch: Images in the current batch.
        text: Whether the model is a text-to-image model, which has options to save memory.

    Raises:
        OutOfMemoryError: If the device is out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, SamplerbenchError) or not is_out_of_memory(error):
            raise
        advice = f"a single image does not fit; use another {argument('device')}"
        if text:
            saved, precision = argument("memory", "offload,vae-tiling"), argument("dtype", "bf16")
            advice = f"a single image does not fit; try {saved} or {precision}"
        if batch > 1:
            advice = f"try {argument('batch_size', batch // 2)}"
        raise OutOfMemoryError(f"the device has not enough memory for a batch of {batch}; {advice}.") from error
