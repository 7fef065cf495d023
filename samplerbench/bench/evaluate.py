"""Evaluation of metrics of the data on images of their own: fixed batches, shared by the processes of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from samplerbench.bench.generate import explain_memory
from samplerbench.bench.session import Session
from samplerbench.boundary import plugin_call
from samplerbench.data.pixels import quantise
from samplerbench.errors import Stopped
from samplerbench.metrics.guarded import Guarded
from samplerbench.metrics.metric import Batch, EvaluatedImages
from samplerbench.models.model import Model
from samplerbench.sampling import Inputs
from samplerbench.sampling.meter import Meter

BATCH = 64
"""Maximum number of images of a batch. Batches do not depend on the number of processes, so results do not either."""


def evaluate(
    session: Session,
    reasons: Sequence[str | None],
    accumulators: Sequence[Guarded],
    block: int,
    first: int,
    last: int,
    beside: Sequence[nn.Module] = (),
) -> None:
    """Update the metrics that have images of their own with the share of this process in a chunk of a block.

    The images of a metric are spread over the n samples of a block: m images are evaluated in fixed batches, and the
    batch that begins at image i belongs to the chunk with the sample ⌊i·n/m⌋.

    Args:
        session: The measurement and how it is executed.
        reasons: Why a metric has no value for the cell, or None, for each metric.
        accumulators: Accumulator of each metric.
        block: Number of the block.
        first: Index of the first sample of the chunk within the block.
        last: Index after the last sample of the chunk.
        beside: Networks of the guidance.

    Raises:
        Stopped: If `stop` of the session returns true. The chunk is then lost.
    """
    measurement, execution = session.measurement, session.execution
    for metric, accumulator, reason in zip(measurement.metrics, accumulators, reasons, strict=True):
        images = measurement.evaluated.get(metric.spec)
        if images is None or reason is not None:
            continue
        batches = batches_between(images.n, measurement.n, first, last, min(execution.batch_size, BATCH))
        share = execution.team.share(0, len(batches))
        for number in share:
            if number > share.start and execution.stop():
                raise Stopped
            start, end = batches[number]
            rows = torch.arange(start, end) + block * images.n
            batch = _batch(session, images, rows)
            with explain_memory(len(rows)):
                update_counted(accumulator, batch, measurement.model, beside)


def batches_between(images: int, n: int, first: int, last: int, size: int) -> list[tuple[int, int]]:
    """Return the batches of a metric's images that belong to the samples first … last-1 of n.

    Args:
        images: Number m of images of the metric in a block.
        n: Samples in a block.
        first: Index of the first sample.
        last: Index after the last sample.
        size: Images per batch.

    Returns:
        First image and image after the last one of each batch.
    """
    starts = range(0, images, size)
    return [(i, min(i + size, images)) for i in starts if first <= i * n // images < last]


def update_counted(accumulator: Guarded, batch: Batch, model: Model, beside: Sequence[nn.Module] = ()) -> None:
    """Update a metric of the data with a batch, and count its evaluations apart from those of sampling.

    Args:
        accumulator: The accumulator.
        batch: The images.
        model: The model.
        beside: Networks of the guidance.
    """
    with Meter(model.network, beside) as meter:
        accumulator.update(batch)
    accumulator.count(meter.cost, len(batch.index))


def _batch(session: Session, images: EvaluatedImages, rows: Tensor) -> Batch:
    """Create the batch of some images, with their labels or those of the run."""
    model, mode = session.measurement.model, session.measurement.mode
    labels = inputs_labels(images, rows, mode)
    inputs = Inputs(len(rows), labels)
    with plugin_call(f"model {model.identity.get('source')}", "in inputs"):
        inputs = model.inputs(rows.to(model.device), inputs.to(model.device)).to("cpu")
    with plugin_call("the images of a metric", "in states"):
        states = images.states(rows)
    return Batch(quantise(states), torch.empty(len(rows), 0), labels, rows, states, False, inputs)


def inputs_labels(images: EvaluatedImages, rows: Tensor, mode: str) -> Tensor | None:
    """Return the labels under which images are evaluated, (B,) int64.

    Args:
        images: The images.
        rows: Rows of the images, (B,) int64.
        mode: The label mode of the run: "balanced" for the labels of the images, "none", or a single label for all.
    """
    if mode == "none":
        return None
    if mode == "balanced":
        return None if images.labels is None else images.labels[rows]
    return torch.full((len(rows),), int(mode))
