"""Sampling images by their numbers: sample i is a function of the seed, i and the cell."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from samplerbench.bench.cell import Cell
from samplerbench.errors import OutOfMemoryError, SamplerbenchError, is_out_of_memory
from samplerbench.models.model import Model
from samplerbench.sampling import Noise
from samplerbench.sampling.driver import OnStep, drive
from samplerbench.sampling.noise import Purpose, normal


@dataclass(frozen=True)
class Batched:
    """One sampled batch: which samples, their images (B, C, H, W) in [-1, 1], and the last states (B, ...).

    decoding: seconds from the states to the images; 0 for a model of pixels. stochastic: whether noise was drawn.
    """

    index: Tensor
    images: Tensor
    states: Tensor
    decoding: float = 0.0
    stochastic: bool = False


def prepare(model: Model, cell: Cell) -> None:
    """Estimate what the sampler needs of the model besides D, where it is not known yet."""
    if "posterior variance" in cell.sampler.needs:
        model.estimate_posterior_variances(cell.sigmas)


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

    Sample i is a function of (seed, i) and the cell alone. decode: false leaves `images` what the states are.

    Raises:
        UserError, RunError: what the sampler meets; OutOfMemoryError names a batch size to try.
    """
    state_dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    start = float(cell.sigmas[0])
    prepare(model, cell)
    for first in range(0, len(index), batch_size):
        part = index[first : first + batch_size]
        rows = part.to(model.device)
        chosen = None if labels is None else labels[first : first + batch_size].to(model.device)
        with explain_memory(len(part)):
            z = normal(seed, Purpose.PRIOR, rows, 0, model.shape).to(state_dtype)
            noise = Noise(seed, rows, model.shape, state_dtype)
            denoise = model.denoiser(chosen, len(part), cell.guidance)
            x = drive(cell.sampler, denoise, model.prior(z, start), cell.sigmas, noise, on_step)
            if model.autoencoder is not None:
                wait(model.device)
            clock = time.perf_counter()
            with torch.no_grad():
                images = model.decode(x) if decode else x
            if model.autoencoder is not None:
                wait(model.device)
        decoding = time.perf_counter() - clock if model.autoencoder is not None else 0.0
        yield Batched(part, images, x, decoding, noise.draws > 0)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def explain_memory(batch: int) -> Iterator[None]:
    """Turn "out of memory" into one line with the batch size to try."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, SamplerbenchError) or not is_out_of_memory(error):
            raise
        advice = f"try --batch-size {batch // 2}" if batch > 1 else "one image alone does not fit; use another --device"
        raise OutOfMemoryError(f"the device has not enough memory for a batch of {batch}; {advice}.") from error
