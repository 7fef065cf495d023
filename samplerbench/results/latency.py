"""Measured latencies: the schema of an entry, percentiles, and the file `latency.json` in a folder of results."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from samplerbench.errors import RunError, UserError
from samplerbench.limits import MAX_REPEATS
from samplerbench.results.files import LARGEST_TEXT, read_regular, set_aside, write_atomically
from samplerbench.results.record import Amount, Count, Positive, Record, Text
from samplerbench.results.seal import digest
from samplerbench.text import note
from samplerbench.untrusted import parse_json

LATENCY_FILE = "latency.json"
"""Name of the file in a folder of results."""
FORMAT = 1
"""Version of the file's format."""
HOUR = 3600
"""Seconds of an hour."""

PositiveAmount = Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)]


def percentile(seconds: Sequence[float], percent: int) -> float:
    """Return a percentile by the nearest-rank method.

    It is the smallest of the n values that is not exceeded by at least `percent` of the values: the value with rank
    ⌈n·percent/100⌉. It is always one of the values. With fewer than 20 values, the 95th percentile is the maximum.

    Args:
        seconds: the values.
        percent: the percentage, from 1 to 100.
    """
    return sorted(seconds)[-(-len(seconds) * percent // 100) - 1]


def images_per_second(seconds: Sequence[float], batch_size: int) -> float:
    """Return the throughput over all batches: number of images divided by the total time.

    Args:
        seconds: time of each batch, in seconds.
        batch_size: images per batch.
    """
    return batch_size * len(seconds) / math.fsum(seconds)


def cost_per_1000(price: float, rate: float) -> float:
    """Return the cost of 1,000 images, in the currency of the price.

    Args:
        price: price of the machine per hour.
        rate: images per second.
    """
    return price / HOUR * 1000 / rate


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Stages(_Strict):
    """Mean time of the parts of a batch, in seconds, from separate batches that synchronise after each network call.

    Attributes:
        encoder: the text encoder. None for a model without prompts.
        network: all forward passes of the network.
        guidance: forward passes of further networks that the guidance uses. None if there are none.
        decoder: from latents to images. None for a model in pixel space.
        rest: everything else: the sampler, noise, gradients, conversion to uint8 and the copy to the host.
    """

    encoder: Amount | None
    network: Amount
    guidance: Amount | None
    decoder: Amount | None
    rest: Amount

    @property
    def total(self) -> float:
        """The time of a whole batch with synchronisation."""
        return math.fsum(v or 0.0 for v in (self.encoder, self.network, self.guidance, self.decoder, self.rest))


class Latency(_Strict):
    """The latency of one sampler at one number of steps and one batch size.

    Attributes:
        sampler: spec of the sampler.
        guidance: spec of the guidance, or None.
        spacing: spec of the spacing. None if the sampler has its own.
        steps: number of steps. None if the sampler chooses.
        nfe: network evaluations (rows) per image, counted.
        network_calls: calls of the network per batch, counted.
        decoder_passes: images decoded per image, counted.
        model: source of the model.
        weights: hash of the weights. Empty if unknown.
        dtype: precision of the network, as in the protocol of a result.
        batch_size: images per batch.
        device: device, such as "cuda:0".
        device_name: name of the GPU. Empty on a CPU.
        threads: threads of torch.
        compile: whether the network is compiled.
        graphs: whether batches run as CUDA graphs.
        memory: ways in which memory is saved, separated by commas. Empty for none.
        warmup: number of batches before the measurement.
        first_seconds: time of the first batch, including compilation and initialisation.
        seconds: time of each measured batch, in the order of measurement.
        p50_seconds: 50th percentile of `seconds`.
        p95_seconds: 95th percentile of `seconds`.
        images_per_second: images divided by the total of `seconds`.
        stages: time of the parts of a batch.
        peak_device_bytes: maximum memory that tensors occupy on the GPU. None on a CPU.
        peak_host_bytes: maximum resident memory of the process.
        price_per_hour: price of the machine per hour, or None.
        cost_per_1000_images: cost of 1,000 images, or None.
        versions: versions of the packages.
        finished: date and time in UTC.
    """

    sampler: Annotated[Text, Field(min_length=1)]
    guidance: Text | None
    spacing: Text | None
    steps: Positive | None
    nfe: Amount
    network_calls: Amount
    decoder_passes: Amount
    model: Text
    weights: Text
    dtype: Text
    batch_size: Positive
    device: Text
    device_name: Text
    threads: Positive
    compile: bool
    graphs: bool
    warmup: Positive
    first_seconds: PositiveAmount
    seconds: Annotated[list[PositiveAmount], Field(min_length=1, max_length=MAX_REPEATS)]
    p50_seconds: PositiveAmount
    p95_seconds: PositiveAmount
    images_per_second: PositiveAmount
    stages: Stages
    peak_device_bytes: Count | None
    peak_host_bytes: Count
    price_per_hour: PositiveAmount | None
    cost_per_1000_images: PositiveAmount | None
    versions: dict[str, Text]
    finished: Text
    memory: Text = ""

    @model_validator(mode="after")
    def _consistent(self) -> Latency:
        rate = images_per_second(self.seconds, self.batch_size)
        expected: dict[str, float | None] = {
            "p50_seconds": percentile(self.seconds, 50),
            "p95_seconds": percentile(self.seconds, 95),
            "images_per_second": rate,
            "cost_per_1000_images": None if self.price_per_hour is None else cost_per_1000(self.price_per_hour, rate),
        }
        for name, value in expected.items():
            found = getattr(self, name)
            if not (found == value if found is None or value is None else math.isclose(found, value, rel_tol=1e-9)):
                raise ValueError(f"{name} does not agree with the other fields")
        return self

    @property
    def cell(self) -> tuple[Any, ...]:
        """What decides which images are made. See `cell_of`."""
        return (self.sampler, self.guidance, self.spacing, self.steps, self.dtype, self.weights, self.model)

    @property
    def conditions(self) -> dict[str, Any]:
        """The conditions of the measurement, as `samplerbench.results.timings` names them."""
        names = ("batch_size", "device", "device_name", "threads", "compile", "graphs", "memory")
        return {name: getattr(self, name) for name in names}

    @property
    def ms_per_image(self) -> float:
        """The 50th percentile of the time of a batch divided by its images, in milliseconds."""
        return 1000 * self.p50_seconds / self.batch_size


def summarised(*, seconds: list[float], batch_size: int, price: float | None, **fields: Any) -> Latency:
    """Create a latency, with percentiles, throughput and cost computed from the times.

    Args:
        seconds: time of each batch, in seconds.
        batch_size: images per batch.
        price: price of the machine per hour, or None.
        fields: the other fields of `Latency`.
    """
    rate = images_per_second(seconds, batch_size)
    return Latency(
        seconds=seconds,
        batch_size=batch_size,
        p50_seconds=percentile(seconds, 50),
        p95_seconds=percentile(seconds, 95),
        images_per_second=rate,
        price_per_hour=price,
        cost_per_1000_images=None if price is None else cost_per_1000(price, rate),
        **fields,
    )


def cell_of(record: Record) -> tuple[Any, ...]:
    """Return what decides which images a result was computed from, to be compared with `Latency.cell`.

    A metric and a latency belong together if these fields are equal: sampler, guidance, spacing, steps, precision,
    weights and name of the model. Compilation and CUDA graphs change only the rounding, so they are conditions of the
    measurement.

    Args:
        record: a result.
    """
    fields = record["protocol_fields"]
    weights = (fields.get("model") or {}).get("weights") or ""
    cell = tuple(record[name] for name in ("sampler", "guidance", "spacing", "steps"))
    return (*cell, fields.get("dtype"), weights, record["model"])


def read_latencies(folder: Path) -> list[Latency]:
    """Read the latencies of a folder of results. Empty if there is no file.

    Args:
        folder: the folder.

    Raises:
        UserError: the file cannot be read, is damaged or edited, or does not fit the schema.
    """
    file = folder / LATENCY_FILE
    if not os.path.lexists(file):
        return []
    try:
        content = parse_json(read_regular(file, LARGEST_TEXT))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}).") from None
    except ValueError:
        raise UserError(f"{file} is damaged or edited.") from None
    if not isinstance(content, dict) or content.get("seal") != _seal(content):
        raise UserError(f"{file} is damaged or edited.")
    if content.get("format") != FORMAT or not isinstance(content.get("latencies"), list) or len(content) != 3:
        raise UserError(f"{file} has an unknown format; format {FORMAT} is supported.")
    found = []
    for i, entry in enumerate(content["latencies"]):
        try:
            found.append(Latency.model_validate(entry))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, ("latencies", i, *first["loc"])))
            raise UserError(f"{file} is not valid: {where[:100]}: {first['msg'][:200]}.") from None
    return found


def add_latencies(folder: Path, measured: Sequence[Latency]) -> Path:
    """Add latencies to the file of a folder of results.

    A latency replaces an existing one with the same cell and conditions. A damaged file is renamed to
    `latency.json.damaged`, with a message on stderr.

    Args:
        folder: the folder.
        measured: the latencies.

    Returns:
        The file.

    Raises:
        UserError: the folder cannot be written to.
        RunError: the disk is full or fails.
    """
    file = folder / LATENCY_FILE
    try:
        before = read_latencies(folder)
    except UserError as error:
        target = set_aside(file)
        if target is None:
            raise RunError(f"{error} It cannot be renamed.") from None
        note(f"warning: {error} It is kept as {target.name}.")
        before = []
    entries = {_identity(latency): latency for latency in [*before, *measured]}
    content = {"format": FORMAT, "latencies": [latency.model_dump(mode="json") for latency in entries.values()]}
    text = json.dumps({**content, "seal": _seal(content)}, indent=2, ensure_ascii=False)
    write_atomically(file, f"{text}\n".encode())
    return file


def _identity(latency: Latency) -> tuple[Any, ...]:
    return (*latency.cell, *latency.conditions.values())


def _seal(content: dict[str, Any]) -> str | None:
    try:
        return digest({k: v for k, v in content.items() if k != "seal"})
    except (TypeError, ValueError, RecursionError):
        return None
