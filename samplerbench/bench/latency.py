"""Measurement of latency: the time and memory of single batches, from prompts or labels to uint8 images on the host.

A batch is sampled as in a run, by `Generates.generate`. The measurement has three parts:

1. Warm-up: for each configuration, a few batches. The first one compiles and initialises what is needed.
2. Rounds: in each round, every configuration samples one batch. Every second round runs in reverse order, so that a
   machine that becomes slower favours no configuration. Percentiles and throughput are computed from these batches.
3. Stages: a few more rounds with synchronisation before and after each network call, for the time of encoder, network
   and decoder. These batches are not part of the percentiles.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from samplerbench.bench import generate, setup
from samplerbench.bench.cell import Cell, versions
from samplerbench.bench.generate import Batched, Generates, SamplerOnModel, explain_memory
from samplerbench.bench.memory import PeakMemory, allocated
from samplerbench.bench.prepare import Prepared, prepare
from samplerbench.bench.request import Request, check_whole
from samplerbench.bench.session import dtype_name
from samplerbench.data.pixels import quantise
from samplerbench.errors import RunError, SamplerbenchError, UserError, argument
from samplerbench.limits import MAX_BATCH, MAX_REPEATS
from samplerbench.models.model import Model
from samplerbench.models.runner import how_run
from samplerbench.results.latency import Latency, Stages, summarised
from samplerbench.sampling import Inputs
from samplerbench.sampling.cost import Cost
from samplerbench.sampling.guidance import evaluations_of
from samplerbench.sampling.meter import Meter

REPEATS, WARMUP = 20, 2
"""Default numbers of measured batches, and of batches before them."""
STAGE_BATCHES = 3
"""Number of batches for the time of the stages."""


@dataclass(eq=False)
class Configuration:
    """A cell at one batch size, and its measurements.

    Attributes:
        cell: The cell.
        batch_size: Images per batch.
        title: Title for messages.
        method: The sampler or generator, bound to the model. Set by the warm-up.
        inputs: Labels or prompts of a batch. Set by the warm-up.
        first: Time of the first batch, in seconds.
        seconds: Time of each measured batch, in seconds.
        parts: Time and counts of the stages.
        device_bytes: Peak memory on the GPU. None on a CPU.
        host_bytes: Peak memory on the host.
        error: The error that ended the measurement, or None.
    """

    cell: Cell
    batch_size: int
    title: str
    method: Generates | None = None
    inputs: Inputs | None = None
    first: float = 0.0
    seconds: list[float] = field(default_factory=list)
    parts: _Parts | None = None
    device_bytes: int | None = None
    host_bytes: int = 0
    error: SamplerbenchError | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of one configuration.

    Attributes:
        cell: The cell.
        batch_size: Images per batch.
        title: Title for messages.
        latency: The measured latency. None if it failed.
        error: The error. None if it did not fail.
    """

    cell: Cell
    batch_size: int
    title: str
    latency: Latency | None = None
    error: SamplerbenchError | None = None


OnBatch = Callable[[int, int], None]
"""Callback for progress. Its arguments are the number of finished batches and the planned number."""


def prepare_latency(request: Request, device: str) -> Prepared:
    """Load the model with its text encoder, and plan the cells.

    Args:
        request: The request. Its batch size is not used.
        device: Name of the device, or "auto".

    Returns:
        The prepared request.

    Raises:
        UserError: If the request is invalid or cannot be run.
    """
    options = replace(request.load, keep_text_encoder=True)
    return prepare(request, device, setup.load_model(request.model, setup.pick_device(device), request.dtype, options))


def check_settings(
    batch_sizes: Sequence[int], repeats: int, warmup: int, price: float | None = None, graphs: bool = False
) -> None:
    """Check the settings of a measurement.

    Args:
        batch_sizes: Batch sizes, in images.
        repeats: Number of measured batches.
        warmup: Number of batches before them.
        price: Price of the machine per hour, or None.
        graphs: Whether batches run as CUDA graphs.

    Raises:
        UserError: If a setting is invalid.
    """
    if not batch_sizes:
        raise UserError(f"{argument('batch_size')} is missing; give at least one.")
    for size in batch_sizes:
        check_whole("batch_size", size, 1, MAX_BATCH)
    for name, value in (("repeats", repeats), ("warmup", warmup)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_REPEATS:
            raise UserError(f"{argument(name, value)}: give a whole number from 1 to {MAX_REPEATS:,}.")
    if graphs and warmup < WARMUP:
        raise UserError(
            f"{argument('warmup', warmup)}: at least {WARMUP} batches are needed with {argument('graphs')}, because "
            "the second batch captures the graph."
        )
    if price is not None and not 0 < price <= 1e9:
        raise UserError(f"{argument('price', price)}: give a positive price per hour.")


def measure_latency(
    prepared: Prepared,
    batch_sizes: Sequence[int],
    repeats: int = REPEATS,
    warmup: int = WARMUP,
    price: float | None = None,
    on_batch: OnBatch | None = None,
) -> list[Outcome]:
    """Measure the latency of every cell at every batch size.

    A configuration that fails, for example because its batch does not fit into memory, does not affect the others.

    Args:
        prepared: The prepared request, from `prepare_latency`.
        batch_sizes: Batch sizes, in images.
        repeats: Number of measured batches of each configuration.
        warmup: Number of batches of each configuration before them.
        price: Price of the machine per hour, or None.
        on_batch: Called after each batch.

    Returns:
        The outcomes, in the order of the cells and the batch sizes.

    Raises:
        UserError: If a setting or the request is invalid.
    """
    check_settings(batch_sizes, repeats, warmup, price, prepared.request.graphs)
    cells = [cells[0] for cells in prepared.runs]
    found = [Configuration(c, b, f"{prepared.title(c)}, batch {b}") for c in cells for b in dict.fromkeys(batch_sizes)]
    for size in dict.fromkeys(batch_sizes):
        prepared.inputs(size)
    measurement = _Measurement(prepared, on_batch, len(found) * (warmup + repeats + STAGE_BATCHES))
    # From small to large: a compiled network pads a batch to a larger size that is already compiled.
    for configuration in sorted(found, key=_rows):
        measurement.warm_up(configuration, warmup)
    for number in range(repeats + STAGE_BATCHES):
        measure = measurement.time if number < repeats else measurement.divide
        for configuration in found if number % 2 == 0 else reversed(found):
            measure(configuration)
    conditions = _conditions(prepared, warmup)
    return [_outcome(configuration, conditions, price) for configuration in found]


class _Measurement:
    """Runs the batches of all configurations.

    Args:
        prepared: The prepared request.
        on_batch: Called after each batch.
        planned: Planned number of batches.
    """

    def __init__(self, prepared: Prepared, on_batch: OnBatch | None, planned: int) -> None:
        self.prepared, self.model = prepared, prepared.model
        self.on_batch, self.planned, self.done = on_batch, planned, 0
        self.base = allocated(self.model.device)
        """Bytes of the model on the device. Memory above it belongs to configurations, such as captured graphs."""

    def warm_up(self, configuration: Configuration, batches: int) -> None:
        """Bind the method and run the first batches."""
        configuration.inputs = self.prepared.inputs(configuration.batch_size)
        kept = allocated(self.model.device) - self.base
        with PeakMemory(self.model.device, kept) as peak, _failure_kept(configuration):
            configuration.method = generate.prepare(self.model, configuration.cell)
            configuration.first = self._batch(configuration, configuration.method)
            for _ in range(batches - 1):
                self._batch(configuration, configuration.method)
        configuration.device_bytes, configuration.host_bytes = peak.device_bytes, peak.host_bytes

    def time(self, configuration: Configuration) -> None:
        """Measure one batch."""
        if configuration.method is not None:
            with _failure_kept(configuration):
                configuration.seconds.append(self._batch(configuration, configuration.method))

    def divide(self, configuration: Configuration) -> None:
        """Measure the stages of one batch and count its evaluations."""
        method = configuration.method
        if method is None:
            return
        if isinstance(method, SamplerOnModel):
            # Hooks are not called while a graph is replayed. The first batch of a new instance is not replayed.
            method = SamplerOnModel(self.model, method.cell)
        if configuration.parts is None:
            configuration.parts = _Parts(self.model.device, method.network, method.beside)
        parts, decoder = configuration.parts, None
        if self.model.autoencoder is not None:
            decoder = self.model.autoencoder.decoder
        with _failure_kept(configuration), Meter(method.network, method.beside, decoder) as meter, parts:
            parts.total += self._batch(configuration, method, parts)
            parts.batches += 1
            parts.cost += meter.cost

    def _batch(self, configuration: Configuration, method: Generates, parts: _Parts | None = None) -> float:
        """Run one batch and return its time in seconds."""
        inputs, guidance, device = configuration.inputs, configuration.cell.guidance, self.model.device
        assert inputs is not None
        unconditional = guidance is not None and guidance.needs_unconditional
        synchronise(device)
        begun = time.perf_counter()
        sample_images(self.model, method, inputs, self.prepared.request.seeds[0], unconditional, parts)
        synchronise(device)
        seconds = time.perf_counter() - begun
        self.done += 1
        if self.on_batch is not None:
            self.on_batch(self.done, self.planned)
        return max(seconds, 1e-9)


def sample_images(
    model: Model,
    method: Generates,
    inputs: Inputs,
    seed: int,
    unconditional: bool = False,
    parts: _Parts | None = None,
) -> Tensor:
    """Sample one batch, from the prompts or labels to the images on the host.

    Args:
        model: The model.
        method: The bound sampler or generator.
        inputs: Labels or prompts of the samples, B rows on the CPU.
        seed: Seed of all noise.
        unconditional: Whether the negative prompt is encoded too.
        parts: Measures the stages. If None, nothing synchronises within the batch.

    Returns:
        Images, (B, C, H, W) uint8 on the CPU.

    Raises:
        RunError: If a plugin fails.
        OutOfMemoryError: If the batch does not fit into memory.
    """
    size = len(inputs)
    with explain_memory(size, model.text):
        with nullcontext() if parts is None else parts.encoding():
            embeddings = model.encode_prompts(inputs, unconditional)
        batches: list[Batched] = list(method.generate(torch.arange(size), inputs, seed, size))
        images = torch.cat([quantise(batch.images).cpu() for batch in batches])
    if parts is not None:
        parts.has_encoder = embeddings is not None
        for batch in batches:
            if batch.decoding is not None:
                parts.decoder = (parts.decoder or 0.0) + batch.decoding.seconds
    return images


class _Parts:
    """Measures the time of the stages with hooks that synchronise the device. Use it as a context manager for a batch.

    Times and counts are summed over the batches.

    Args:
        device: The device.
        network: The network.
        beside: Further networks that a guidance uses.
    """

    def __init__(self, device: torch.device, network: nn.Module, beside: Sequence[nn.Module]) -> None:
        self.device = device
        self.modules = {"network": [network], "guidance": [m for m in beside if m is not network]}
        self.seconds = {"network": 0.0, "guidance": 0.0, "encoder": 0.0}
        self.decoder: float | None = None
        self.has_encoder = False
        self.calls, self.batches, self.total, self.cost = 0, 0, 0.0, Cost()
        self._handles: list[RemovableHandle] = []
        self._begun = 0.0

    def __enter__(self) -> _Parts:
        for name, modules in self.modules.items():
            for module in modules:
                self._handles.append(module.register_forward_pre_hook(self._start, with_kwargs=True))
                self._handles.append(module.register_forward_hook(partial(self._end, name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Measure the text encoder."""
        self._start()
        yield
        self.seconds["encoder"] += self._elapsed()

    def stages(self) -> Stages:
        """Return the mean time of the stages of a batch."""
        encoder = self.seconds["encoder"] if self.has_encoder else None
        guidance = self.seconds["guidance"] if self.modules["guidance"] else None
        network = self.seconds["network"]
        rest = max(0.0, self.total - network - sum(part or 0.0 for part in (encoder, guidance, self.decoder)))

        def mean(seconds: float | None) -> float | None:
            return None if seconds is None else seconds / self.batches

        return Stages(
            encoder=mean(encoder),
            network=network / self.batches,
            guidance=mean(guidance),
            decoder=mean(self.decoder),
            rest=rest / self.batches,
        )

    def _start(self, *_: object) -> None:
        synchronise(self.device)
        self._begun = time.perf_counter()

    def _elapsed(self) -> float:
        synchronise(self.device)
        return time.perf_counter() - self._begun

    def _end(self, name: str, *_: object) -> None:
        self.seconds[name] += self._elapsed()
        self.calls += name == "network"


@contextmanager
def _failure_kept(configuration: Configuration) -> Iterator[None]:
    """Store an error of a configuration in it, and free its method."""
    try:
        yield
    except SamplerbenchError as error:
        error.__cause__ = error.__context__ = None  # their tracebacks refer to the tensors of the batch
        configuration.error, configuration.method = error.with_traceback(None), None


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished its work.

    Args:
        device: The device.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rows(configuration: Configuration) -> int:
    try:
        return configuration.batch_size * evaluations_of(configuration.cell.guidance)
    except RunError:  # the configuration will fail
        return configuration.batch_size


def _conditions(prepared: Prepared, warmup: int) -> dict[str, Any]:
    """Return the fields that all latencies of a measurement have in common."""
    model = prepared.model
    how = how_run(model.network)
    return {
        "model": str(model.identity["source"]),
        "weights": str(model.identity.get("weights") or ""),
        "dtype": dtype_name(model),
        "device": str(model.device),
        "device_name": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "",
        "threads": torch.get_num_threads(),
        "compile": how.compiled,
        "graphs": how.graphs,
        "memory": how.memory,
        "warmup": warmup,
        "versions": versions(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _outcome(configuration: Configuration, conditions: dict[str, Any], price: float | None) -> Outcome:
    c = configuration
    if c.error is not None:
        return Outcome(c.cell, c.batch_size, c.title, error=c.error)
    assert c.parts is not None
    cost = c.parts.cost.per_image(c.batch_size * c.parts.batches)
    latency = summarised(
        sampler=c.cell.method.spec,
        guidance=None if c.cell.guidance is None else c.cell.guidance.spec,
        spacing=None if c.cell.spacing is None else c.cell.spacing.spec,
        steps=c.cell.steps,
        nfe=cost["nfe"],
        network_calls=c.parts.calls / c.parts.batches,
        decoder_passes=cost["decoder_passes"],
        batch_size=c.batch_size,
        first_seconds=c.first,
        seconds=c.seconds,
        stages=c.parts.stages(),
        peak_device_bytes=c.device_bytes,
        peak_host_bytes=c.host_bytes,
        price=price,
        **conditions,
    )
    return Outcome(c.cell, c.batch_size, c.title, latency)
