"""What classifier guidances have in common."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from samplerbench.models import LoadedClassifier
from samplerbench.sampling import Guidance, option


@dataclass(frozen=True)
class ClassifierBased(Guidance, ABC):
    """Base class of guidances that use a classifier. `bind` of a subclass sets `classifier`."""

    needs_labels: ClassVar[bool] = True
    differentiates: ClassVar[bool] = True
    classifier: ClassVar[LoadedClassifier]

    scale: float = option(1.0, "g: how much of the classifier's gradient is added", ge=0.0)
    conditional: bool = option(False, "guide the class-conditional prediction instead of the unconditional one")
    weights: str = ""
    clip: Literal["after", "before"] = option(
        "after", "whether a model that clips x₀ clips the guided one, or the one that is guided"
    )

    @property
    def classes(self) -> int | None:
        return self.classifier.classes

    @property
    def identity(self) -> dict[str, str]:
        return {"classifier": self.classifier.sha256}

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.classifier.module,)
