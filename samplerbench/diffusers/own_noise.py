"""The initial noise of a pipeline, drawn from samplerbench's noise instead of a generator of torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.sampling.noise import Purpose, normal


class InitialNoise:
    """Draws the noise that a pipeline asks for: sample i has the noise of sample i of a run, for any batch.

    Pipelines draw their initial latents with `randn_tensor` of diffusers, before they pack or scale them. Its name in
    the modules of the pipeline's class is replaced during a call.

    Args:
        seed: random seed.
        index: sample indices, (B,) int64.

    Attributes:
        shapes: shape of one sample in each draw.
    """

    def __init__(self, seed: int, index: Tensor) -> None:
        self.seed, self.index = seed, index.cpu()
        self.shapes: list[tuple[int, ...]] = []

    def __call__(
        self, shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
    ) -> Tensor:
        """Draw standard normal numbers of the given shape, as `randn_tensor`."""
        if shape[0] != len(self.index):
            raise UserError(
                f"the pipeline draws noise of shape {tuple(shape)} for a batch of {len(self.index)}, which is not "
                "supported: samplerbench draws noise for each image."
            )
        z = normal(self.seed, Purpose.PRIOR, self.index, len(self.shapes), tuple(shape[1:]))
        self.shapes.append(tuple(shape[1:]))
        return z.to(device or "cpu", dtype or torch.float32)

    @contextmanager
    def of(self, pipeline: Any) -> Iterator[None]:
        """Context manager: the pipeline draws this noise."""
        names = {cls.__module__ for cls in type(pipeline).__mro__ if cls.__module__.startswith("diffusers.pipelines.")}
        modules = [sys.modules[name] for name in sorted(names) if hasattr(sys.modules[name], "randn_tensor")]
        originals = [module.randn_tensor for module in modules]
        try:
            for module in modules:
                module.randn_tensor = self  # type: ignore[attr-defined]
            yield
        finally:
            for module, original in zip(modules, originals, strict=True):
                module.randn_tensor = original  # type: ignore[attr-defined]
