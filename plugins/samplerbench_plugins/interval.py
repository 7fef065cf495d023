"""Guidance in an interval of noise levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from samplerbench.sampling import (
    ConditionalDenoiser,
    Denoiser,
    Guidance,
    ModelView,
    Prediction,
    Sigma,
    UserError,
    option,
)


@dataclass(frozen=True)
class Interval(Guidance):
    """A guidance for the noise levels low ≤ σ ≤ high only (Kynkäänniemi et al. 2024, eq. 5).

    D = D_guided(x, σ) for low ≤ σ ≤ high, and the conditional prediction of the model, D_c(x, σ), for other levels. The
    evaluations that the guidance does not need there are saved, and the measured NFE are lower. An NFE budget is
    planned with the cost inside the interval.
    The defaults are the paper's interval for EDM2 on ImageNet-512, the steps 17 to 22 of 32; σ is that of the state
    x = x₀ + σ z, also for latent models and rectified flows (σ = t/(1-t)).
    All other parameters are those of the guidance: `interval:low=0.3,high=2,scale=3`, `interval/classifier:scale=4`.
    """

    guidance: str = option("cfg", "name of the guidance", positional=True)
    low: float = option(0.28, "lowest noise level σ with guidance", ge=0.0)
    high: float | None = option(1.61, "highest noise level σ with guidance; none: no limit", gt=0.0)
    config: tuple[tuple[str, str], ...] = option((), "parameters of the guidance", rest=True)

    inner: ClassVar[Guidance]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high is not None and self.low >= self.high:
            raise UserError(f"guidance interval: low = {self.low:g} is not below high = {self.high:g}.")
        parameters = ",".join(f"{name}={value}" for name, value in self.config)
        inner = Guidance.from_spec(self.guidance + (f":{parameters}" if parameters else ""))
        if isinstance(inner, Interval):
            raise UserError("guidance interval: it cannot contain itself; choose another guidance.")
        needs = ("needs_condition", "needs_labels", "needs_unconditional", "differentiates", "bayes")
        self._set(inner=inner, **{name: getattr(inner, name) for name in needs})

    def _set(self, **state: Any) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

    @property
    def clip(self) -> Literal["after", "before"]:
        return self.inner.clip

    @property
    def evaluations(self) -> int:
        return max(1, self.inner.evaluations)

    @property
    def classes(self) -> int | None:
        return self.inner.classes

    @property
    def identity(self) -> dict[str, str]:
        return self.inner.identity

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return self.inner.networks

    def bind(self, model: ModelView) -> Self:
        return self.with_state(inner=self.inner.bind(model))

    def contains(self, sigma: float) -> bool:
        """Whether the guidance applies at a noise level."""
        return self.low <= sigma and (self.high is None or sigma <= self.high)

    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        return self.guide(denoise).predict(x, sigma)

    def guide(self, denoise: ConditionalDenoiser) -> Denoiser:
        return _WithinInterval(self, self.inner.guide(denoise), denoise)


class _WithinInterval(Denoiser):
    def __init__(self, interval: Interval, guided: Denoiser, plain: ConditionalDenoiser) -> None:
        self.interval, self.guided, self.plain = interval, guided, plain
        self.levels, self.process, self.prediction = plain.levels, plain.process, plain.prediction

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        if not isinstance(sigma, Tensor) or sigma.ndim == 0:
            inside = self.interval.contains(float(sigma))
            return self.guided.predict(x, sigma) if inside else self.plain.conditional(x, sigma)
        within = torch.tensor([self.interval.contains(level) for level in sigma.tolist()], device=x.device)
        return self._by_rows(x, sigma, within)

    def _by_rows(self, x: Tensor, sigma: Tensor, within: Tensor) -> Prediction:
        """The prediction for one noise level per sample. Each row takes only the evaluations of its own level."""
        yes, no = within.nonzero().flatten(), (~within).nonzero().flatten()
        if not len(no):
            return self.guided.predict(x, sigma)
        if not len(yes):
            return self.plain.conditional(x, sigma)
        guided = self.guided.rows(yes).predict(x[yes], sigma[yes.to(sigma.device)])
        plain = self.plain.rows(no).conditional(x[no], sigma[no.to(sigma.device)])
        x0 = torch.empty_like(x).index_copy(0, yes, guided.x0).index_copy(0, no, plain.x0)
        if guided.variance is None or plain.variance is None:
            return Prediction(x0)
        variance = torch.empty_like(x0).index_copy(0, yes, guided.variance).index_copy(0, no, plain.variance)
        return Prediction(x0, variance)

    def rows(self, index: Tensor) -> Denoiser:
        return _WithinInterval(self.interval, self.guided.rows(index), self.plain.rows(index))
