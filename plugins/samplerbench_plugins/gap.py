"""The distance to the same model's converged solution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from samplerbench.metrics import Accumulator, Batch, Context, Metric
from samplerbench.sampling import Sampler, UserError, option
from samplerbench_plugins.pf_ode import ProbabilityFlow


@dataclass(frozen=True)
class Gap(Metric):
    """Discretisation error without model error: mean ‖x - x*‖²/d to the converged ODE solution from the same x_T.

    x* is the probability-flow ODE of the same model, labels and guidance, solved by an adaptive Runge-Kutta pair to
    the tolerance `tol`, as Song et al. 2021 solve it. It applies to deterministic samplers: one that draws noise has no
    such limit, and its cell in a table stays empty.
    Its evaluations are not counted as the sampler's, and within a run the solution is computed once for all cells. It
    needs neither real images nor features.
    """

    needs_features: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    images: int = option(0, "how many images of each block are solved and compared; 0 is all", ge=0, le=100_000_000)
    tol: float = option(1e-5, "relative and absolute tolerance of the converged solution", gt=0.0, le=1e-2)

    @property
    def solver(self) -> ProbabilityFlow:
        """The sampler that computes x*."""
        return ProbabilityFlow(solver="rk45", rtol=self.tol, atol=self.tol)

    def solution(self, n: int) -> tuple[Sampler, int]:
        return self.solver, min(self.images or n, n)

    def start(self, context: Context) -> Accumulator:
        return _Distance(self, context)


class _Distance(Accumulator):
    def __init__(self, metric: Gap, context: Context) -> None:
        self.solver = metric.solver
        self.context, self.most = context, metric.images
        self.total = torch.zeros((), dtype=torch.float64)
        self.seen = 0

    def update(self, batch: Batch) -> None:
        if self.context.solve is None:
            raise UserError("the metric gap has a value only within a run.")
        if batch.stochastic:
            return
        chosen = torch.ones(len(batch.index), dtype=torch.bool)
        if self.most:
            chosen = batch.index.cpu() % self.context.n < self.most
        if not chosen.any():
            return
        truth = self.context.solve(batch.index[chosen], self.solver)
        distance = (
            (batch.states[chosen.to(batch.states.device)].double() - truth.double()).square().flatten(1).mean(dim=1)
        )
        self.total = self.total + distance.sum().cpu()  # not in place: a state given before keeps its value
        self.seen += len(distance)

    def state(self) -> dict[str, Tensor]:
        return {"total": self.total.reshape(1), "seen": torch.tensor([self.seen])}

    def merge(self, state: dict[str, Tensor]) -> None:
        self.total = self.total + state["total"][0]
        self.seen += int(state["seen"])

    def result(self) -> dict[str, Any]:
        return {"value": float(self.total) / self.seen} if self.seen else {}
