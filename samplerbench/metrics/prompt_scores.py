"""Scores of an image and its prompt under a CLIP model: CLIP score and PickScore."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from samplerbench.errors import RunError, UserError
from samplerbench.metrics.metric import Accumulator, Batch, Context, Metric, PromptEncoder
from samplerbench.options import option


class PromptScore(Metric, ABC):
    """Base of metrics that score each image with its prompt."""

    better: ClassVar[Literal["lower", "higher"]] = "higher"
    needs_reference: ClassVar[bool] = False
    needs_prompts: ClassVar[bool] = True

    @abstractmethod
    def score(self, cosines: Tensor, scale: float) -> Tensor:
        """The scores (B,) float64.

        Args:
            cosines: (B,) float64, cosines of the image and text embeddings.
            scale: exp(logit_scale) of the model.
        """

    def start(self, context: Context) -> Accumulator:
        return _Mean(self, context)


@dataclass(frozen=True)
class ClipScore(PromptScore):
    """CLIP score: the mean of max(100 cos(E_image, E_prompt), 0) (Hessel et al. 2021, with the factor 100 for 2.5).

    E are the projected embeddings of a CLIP model of transformers, with its own processor and tokenizer. Values of
    different CLIP models cannot be compared: papers also use ViT-B/32, ViT-g/14 and others, so the table names the
    model. torchmetrics takes the maximum of the mean, which differs only where single cosines are negative.
    """

    model: str = option("openai/clip-vit-large-patch14", "hub id or folder of a CLIP model of transformers")

    @property
    def feature_space(self) -> str:
        return f"clip:{self.model}"

    def score(self, cosines: Tensor, scale: float) -> Tensor:
        return (100 * cosines).clamp(min=0)


PICKSCORE, PICKSCORE_PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclass(frozen=True)
class PickScore(PromptScore):
    """PickScore: the mean of exp(logit_scale) cos(E_image, E_prompt) of a CLIP-H that was fine-tuned on human choices.

    The model and the processor are those of Kirstain et al. 2023: prompts of at most 77 tokens, and the processor of
    laion's CLIP-H. A difference of 1 between two images of a prompt is a choice probability of 1/(1+e⁻¹) = 73%.
    """

    model: str = option(PICKSCORE, "hub id or folder of the model")
    processor: str = option(PICKSCORE_PROCESSOR, "hub id or folder of the processor; empty: of the model's own")

    @property
    def feature_space(self) -> str:
        return f"clip:{self.model}+{self.processor}" if self.processor else f"clip:{self.model}"

    def score(self, cosines: Tensor, scale: float) -> Tensor:
        return scale * cosines


class _Mean(Accumulator):
    """The mean score and its standard error, from the number, sum and sum of squares of each stratum.

    With balanced prompts that occur several times, the strata are the prompts. The standard error is then that of the
    mean over these prompts, and not over a population of prompts.
    """

    def __init__(self, metric: PromptScore, context: Context) -> None:
        self.metric, self.stratified, self.text = metric, context.stratified, context.prompts
        self.sums: dict[int, Tensor] = {}

    def update(self, batch: Batch) -> None:
        if self.text is None or batch.prompts is None:
            raise UserError(f"the metric {self.metric.label()} needs prompts: use a text-to-image model.")
        if not len(batch.prompts):
            return
        scores = self.metric.score(cosines(batch.features, batch.prompts, self.text), self.text.scale)
        if not bool(scores.isfinite().all()):
            raise RunError(f"the metric {self.metric.label()}: the features of the generated images are not finite.")
        strata = batch.chosen if self.stratified else None
        strata = torch.zeros(len(scores), dtype=torch.int64) if strata is None else strata.cpu()
        rows = torch.stack([torch.ones_like(scores), scores, scores.square()], dim=1)
        for stratum in strata.unique().tolist():
            self._add(stratum, rows[strata == stratum].sum(dim=0))

    def _add(self, stratum: int, sums: Tensor) -> None:
        self.sums[stratum] = self.sums[stratum] + sums if stratum in self.sums else sums

    def state(self) -> dict[str, Tensor]:
        if not self.sums:
            return {}
        return {"strata": torch.tensor(list(self.sums)), "sums": torch.stack(list(self.sums.values()))}

    def merge(self, state: dict[str, Tensor]) -> None:
        if state:
            for stratum, sums in zip(state["strata"].tolist(), state["sums"], strict=True):
                self._add(stratum, sums)

    def result(self) -> dict[str, Any]:
        n, total, _ = torch.stack(list(self.sums.values())).sum(dim=0).tolist()
        entry = {"value": total / n}
        return entry if n < 2 else entry | {"standard_error": standard_error(self.sums)}


def cosines(features: Tensor, prompts: Sequence[str], text: PromptEncoder) -> Tensor:
    """The cosine of each image embedding with the embedding of its prompt.

    Args:
        features: (B, d), embeddings of the images.
        prompts: the B prompts.
        text: encodes the prompts.

    Returns:
        (B,) float64 on the CPU.
    """
    images, texts = features.double().cpu(), text.embed(prompts).double()
    return torch.nn.functional.cosine_similarity(images, texts, dim=1, eps=0.0)


def standard_error(sums: Mapping[int, Tensor]) -> float:
    """The standard error of a mean over strata of fixed size, √(Σ_a n_a var_a)/n.

    Strata with a single value are merged, as in `strata.strata_of`.

    Args:
        sums: number, sum and sum of squares of each stratum, (3,) float64. At least two values.
    """
    rows = list(sums.values())
    merged = [row for row in rows if row[0] > 1]
    if single := [row for row in rows if row[0] == 1]:
        merged.append(torch.stack(single).sum(dim=0))
    if len(single) == 1 and len(merged) > 1:
        alone = merged.pop()
        smallest = min(range(len(merged)), key=lambda i: float(merged[i][0]))
        merged[smallest] = merged[smallest] + alone
    n, total = 0.0, 0.0
    for count, value, squares in torch.stack(merged).tolist():
        n += count
        if count > 1:
            total += count * max(0.0, squares - value**2 / count) / (count - 1)
    return math.sqrt(total) / n
