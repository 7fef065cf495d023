"""The spacing of rectified flows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from samplerbench.sampling import FlowSchedule, ModelView, Sampler, Spacing, UserError, option


@dataclass(frozen=True)
class Flow(Spacing):
    """Times t = 1, 1-1/N, …, 1/N, 0 of a rectified flow, shifted as the checkpoint's scheduler says.

    σ_i = s (N-i)/i, starting at t = 1, where σ is infinite (Esser et al. 2024, eq. 23). The shift s is read from the
    checkpoint: a number, or e^μ or μ with μ linear in the number of image tokens. A last time set by the checkpoint
    (shift_terminal) is reached by stretching 1 - t. It is the default for models that are rectified flows.
    """

    flows_only = True
    schedule: ClassVar[FlowSchedule]

    shift: float | None = option(None, "static shift s; none: that of the checkpoint", gt=0.0, le=1000.0)
    mu: float | None = option(None, "μ of the dynamic shift; none: from the image size", gt=-20.0, le=20.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift is not None and self.mu is not None:
            raise UserError("spacing flow: give shift or mu, not both.")

    def bind(self, model: ModelView, sampler: Sampler) -> Self:
        assert model.flow is not None  # flows_only
        if self.mu is not None and model.flow.kind == "linear" and self.mu <= 0:
            raise UserError(f"spacing {self.spec}: this model multiplies σ by mu, so mu must be above 0.")
        return self.with_state(schedule=model.flow)

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        schedule = getattr(self, "schedule", FlowSchedule(timesteps=len(levels) + 1))
        return schedule.grid(steps, self.shift, self.mu)
