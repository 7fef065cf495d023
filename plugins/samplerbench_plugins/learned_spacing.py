"""What spacings that learn their levels have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from samplerbench.sampling import ModelView, RunView, Sampler, Spacing, UserError, argument


@dataclass(frozen=True)
class LearnedSpacing(Spacing):
    """Base class of spacings that are learned from a model, once for each number of steps."""

    learned = True
    most_steps: ClassVar[int] = 100
    """Largest number of steps."""

    view: ClassVar[RunView]
    sampler: ClassVar[Sampler]
    steps: ClassVar[int] = 0
    sigmas: ClassVar[Tensor]

    def bind(self, model: ModelView, sampler: Sampler) -> Self:
        if not isinstance(model, RunView):
            raise UserError(
                f"spacing {self.spec} is learned from a network, and here is only a noise schedule; learn the levels "
                "with the model (samplerbench schedule) and use them as list:levels=…."
            )
        return self.with_state(view=model, sampler=sampler)

    def for_steps(self, steps: int) -> Self:
        if not hasattr(self, "view"):
            raise UserError(f"spacing {self.spec} is learned from a model; bind it to one first.")
        if steps > self.most_steps:
            raise UserError(
                f"spacing {self.spec} learns at most {self.most_steps} levels; use fewer {argument('steps')}, or "
                "another spacing."
            )
        sigmas, evaluations = self.learn(steps)
        return self.with_state(
            steps=steps, sigmas=torch.tensor([*sigmas, 0.0], dtype=torch.float64), bound_evaluations=evaluations
        )

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        return (self if self.steps == steps else self.for_steps(steps)).sigmas

    @abstractmethod
    def learn(self, steps: int) -> tuple[list[float], int]:
        """Learn the levels of a bound spacing, or read them from the cache.

        Args:
            steps: number of steps N.

        Returns:
            The N levels above 0, decreasing, and the network evaluations that they cost.
        """
