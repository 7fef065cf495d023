"""The batch size that makes the most images per second, found by trying."""

from __future__ import annotations

import time

import torch

from samplerbench.cache import cached_json
from samplerbench.errors import is_out_of_memory
from samplerbench.models.model import Model
from samplerbench.models.runner import Runner, how_run
from samplerbench.sampling.inputs import Inputs

SIZES = tuple(2**power for power in range(4, 13))
"""16 to 4,096."""
ENOUGH = 0.97
"""A smaller batch that reaches this much of the best rate is preferred: it needs less memory."""


def fastest_batch_size(model: Model, n: int, evaluations: int = 1) -> int:
    """The smallest batch size whose rate of network evaluations is within 3% of the best that fits into the memory.

    It is kept in the user's cache for the weights, the device, the precision and the number of threads.

    Args:
        n: images wanted at most; no batch of twice as many is tried. evaluations: rows that the network gets per
            image, 2 for classifier-free guidance.
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
    """Images per second through one evaluation of the network in batches of `size`; 0 where it does not fit."""
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
    # The quickest of several: what else the machine does only ever slows one down.
    return size / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
