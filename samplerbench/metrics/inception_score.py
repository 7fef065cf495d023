"""The inception score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from samplerbench.metrics.metric import Accumulator, Context, FeatureStore, Layer, Metric
from samplerbench.options import option


@dataclass(frozen=True)
class InceptionScore(Metric):
    """exp E KL(p(y|x) ‖ p(y)) under the extractor's classifier, mean over splits (Salimans et al. 2016).

    The splits are of consecutive images; torch-fidelity shuffles first, which changes only the splits' spread.
    """

    better: ClassVar[Literal["lower", "higher"]] = "higher"
    layer: ClassVar[Layer] = "isc"
    needs_reference: ClassVar[bool] = False
    ordered: ClassVar[bool] = True

    splits: int = option(10, "parts over which the score is averaged", ge=1, le=1_000_000)

    @property
    def min_images(self) -> int:  # type: ignore[override]
        """Two images for every split: the score of one image is 1, whatever it is."""
        return 2 * self.splits

    def start(self, context: Context) -> Accumulator:
        return _Score(self.splits)


class _Score(FeatureStore):
    def __init__(self, splits: int) -> None:
        super().__init__()
        self.splits = splits

    def result(self) -> dict[str, Any]:
        scores = inception_scores(self.features(), self.splits)
        return {"value": float(scores.mean()), "spread_over_splits": float(scores.std(correction=0))}


def inception_scores(logits: Tensor, splits: int) -> Tensor:
    """The score of each split, (splits,) float64, of logits (n, K).

    A class whose probability is 0 in float64 contributes nothing (p log p → 0).
    """
    n, found = len(logits), []
    logits = logits.double()
    for i in range(splits):
        log_p = logits[i * n // splits : (i + 1) * n // splits].log_softmax(dim=1)
        p = log_p.exp()
        marginal = p.mean(dim=0)
        terms = p * (log_p - marginal.log())
        # A marginal may be 0 beside a p of the smallest float, too: the mean of one such p is rounded to 0.
        found.append(terms.where((p > 0) & (marginal > 0), 0).sum(dim=1).mean().exp())
    return torch.stack(found)
