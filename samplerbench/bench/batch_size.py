"""Measurement of the fastest batch size."""

from __future__ import annotations

import time

import torch

from samplerbench.cache import cached_json
from samplerbench.errors import is_out_of_memory
from samplerbench.models.model import Model
from samplerbench.models.runner import Runner, how_run
from samplerbench.sampling.inputs import Inputs

SIZES = tuple(2**power for power in range(4, 13))
"""Batch sizes to measure: 16 to 4,096."""
ENOUGH = 0.97
"""The smallest batch size that reaches this fraction of the best rate is used, because it needs less memory."""


def fastest_batch_size(model: Model, n: int, evaluations: int = 1) -> int:
    """Return the smallest batch size whose throughput is within 3% of the best that fits into memory.

    Measurements are stored in the user's cache per weights, device, precision and number of threads.

    Args:
        model: The model.
        n: Number of images. Batch sizes of 2n and above are not measured.
        evaluations: Network evaluations (rows) per image and step, for example 2 for classifier-free guidance.

    Returns:
        The batch size.
    """
    identity = {
        "weights": model.identity.get("weights"),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        "precision": how_run(model.network).precision,
        "threads": torch.get_num_threads(),
        "evaluations": evaluations,
        "torch": torch.__version__,
    }
    with cached_json("batch-size", identity) as known:
        best, rates = 0.0, {}
        for size in [s for s in SIZES if s < 2 * n] or SIZES[:1]:
            if str(size) not in known:
                known[str(size)] = _rate(model, size, evaluations)
            rates[size] = known[str(size)]
            best = max(best, rates[size])
            recent = list(rates.values())[-2:]
            if rates[size] == 0 or (len(rates) > 2 and max(recent) < ENOUGH * best):
                break
    return next((size for size, rate in rates.items() if rate and rate >= ENOUGH * best), 1)


@torch.no_grad()
def _rate(model: Model, size: int, evaluations: int) -> float:
    """Return images per second for one evaluation per image in batches of `size`, or 0 if out of memory."""
    rows = size * evaluations
    sigma = float(model.levels[len(model.levels) // 2])
    chosen = None if model.classes is None else torch.zeros(rows, dtype=torch.int64, device=model.device)
    inputs = model.inputs(
        torch.arange(rows, device=model.device),
        Inputs(rows, prompts=chosen) if model.text else Inputs(rows, labels=chosen),
    )
    if isinstance(model.network, Runner):
        model.network.eager = True
    try:
        x = torch.randn(rows, *model.shape, device=model.device)
        denoise = model.denoiser(inputs)
        denoise(x, sigma)
        seconds: list[float] = []
        while sum(seconds) < 0.25 or len(seconds) < 3:
            _wait(model.device)
            begun = time.perf_counter()
            denoise(x, sigma)
            _wait(model.device)
            seconds.append(time.perf_counter() - begun)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return 0.0
    finally:
        if isinstance(model.network, Runner):
            model.network.eager = False
    # The minimum, because other processes can only make a measurement slower.
    return size / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
