"""Label accuracy of class-conditional samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from samplerbench.errors import RunError, UserError, argument
from samplerbench.metrics.metric import Accumulator, Batch, Context, FeatureMetric, Layer


@dataclass(frozen=True)
class LabelAccuracy(FeatureMetric):
    """Fraction of images that the extractor's classifier assigns to the requested label (Ravuri & Vinyals 2019)."""

    better: ClassVar[Literal["lower", "higher"]] = "higher"
    layer: ClassVar[Layer] = "isc"
    needs_reference: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True

    def start(self, context: Context) -> Accumulator:
        return _Hits()


class _Hits(Accumulator):
    def __init__(self) -> None:
        self.hits = self.seen = 0

    def update(self, batch: Batch) -> None:
        if not bool(batch.features.isfinite().all()):
            raise RunError(f"the features of the generated images are not finite; try {argument('dtype', 'fp32')}.")
        if batch.labels is None:
            raise UserError(f"the metric label-accuracy needs labels: use {argument('labels', 'balanced')} or a label.")
        if int(batch.labels.max()) >= batch.features.shape[1]:
            raise UserError("the metric label-accuracy needs features whose classifier knows the model's labels.")
        self.hits += int((batch.features.argmax(dim=1).cpu() == batch.labels).sum())
        self.seen += len(batch.labels)

    def state(self) -> dict[str, Tensor]:
        return {"counts": torch.tensor([self.hits, self.seen])}

    def merge(self, state: dict[str, Tensor]) -> None:
        hits, seen = state["counts"].tolist()
        self.hits, self.seen = self.hits + hits, self.seen + seen

    def result(self) -> dict[str, Any]:
        return {"value": self.hits / self.seen}
