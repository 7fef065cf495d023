"""Inception score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from samplerbench.metrics.metric import Accumulator, Context, FeatureMetric, FeatureStore, Layer
from samplerbench.options import option


@dataclass(frozen=True)
class InceptionScore(FeatureMetric):
    """Inception score: exp E KL(p(y|x) ‖ p(y)) under the extractor's classifier (Salimans et al. 2016).

    The score is the mean over splits of consecutive images. torch-fidelity shuffles the images first, which changes
    only the spread over splits.
    """

    better: ClassVar[Literal["lower", "higher"]] = "higher"
    layer: ClassVar[Layer] = "isc"
    needs_reference: ClassVar[bool] = False
    ordered: ClassVar[bool] = True

    splits: int = option(10, "number of splits over which the score is averaged", ge=1, le=1_000_000)

    @property
    def min_images(self) -> int:  # type: ignore[override]
        """Two images per split, because the score of a single image is always 1."""
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
    """The inception score of each split.

    A class with probability 0 in float64 contributes nothing (p log p → 0).

    Args:
        logits: (n, K), of the classifier.
        splits: the number of splits.

    Returns:
        (splits,) float64.
    """
    n, scores = len(logits), []
    logits = logits.double()
    for i in range(splits):
        log_p = logits[i * n // splits : (i + 1) * n // splits].log_softmax(dim=1)
        p = log_p.exp()
        marginal = p.mean(dim=0)
        terms = p * (log_p - marginal.log())
        # The marginal can round to 0 although one p is the smallest positive float.
        scores.append(terms.where((p > 0) & (marginal > 0), 0).sum(dim=1).mean().exp())
    return torch.stack(scores)
