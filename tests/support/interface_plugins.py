"""A plugin for each interface, as a user would write it: only the documented modules are imported."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from samplerbench.metrics import Accumulator, Batch, Context, Metric
from samplerbench.models import FLOW, Condition, Model, ModelSource, posterior_variances
from samplerbench.sampling import (
    RECTIFIED_FLOW,
    VARIANCE_EXPLODING,
    Generator,
    Inputs,
    ModelView,
    Noise,
    Sampler,
    Spacing,
    option,
)

SHAPE = (1, 8, 8)
SEED = 0


def draws(index: Tensor, mean: float, width: float, seed: int = 1) -> Tensor:
    """x₀ ~ N(mean, width²) of the samples `index`, (B, 1, 8, 8) float64."""
    return mean + width * Noise(seed, index, SHAPE, torch.float64)()


class FlowVelocity(nn.Module):
    """E[z - x₀ | y] of N(m, v) under the rectified flow y = (1-t) x₀ + t z.

    With g = (1-t)² v + t²: D = m + (1-t) v/g (y - (1-t) m), E[z | y] = t/g (y - (1-t) m).
    """

    def __init__(self, mean: float, variance: float) -> None:
        super().__init__()
        self.mean, self.variance = mean, variance

    def forward(self, y: Tensor, time: Tensor) -> Tensor:
        t = time.reshape(-1, 1, 1, 1)
        total = (1 - t) ** 2 * self.variance + t**2
        residual = y - (1 - t) * self.mean
        denoised = self.mean + (1 - t) * self.variance / total * residual
        return t / total * residual - denoised


@dataclass
class FlowModel(Model):
    """A rectified flow: the network sees y = x/(1+σ) and t = σ/(1+σ), and gives the velocity."""

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(x.double(), time)

    def real(self, n: int) -> tuple[Tensor, Tensor | None]:
        network: Any = self.network
        return draws(torch.arange(n), network.mean, network.variance**0.5), None


@dataclass(frozen=True)
class FlowGaussian(ModelSource):
    """A Gaussian as a rectified flow, whose velocity and whose ODE solution are known (Liu et al. 2023)."""

    mean: float = option(0.25, "of every pixel", ge=-1.0, le=1.0)
    width: float = option(0.2, "standard deviation of every pixel", gt=0.0, le=1.0)

    def load(self, device: torch.device, dtype: torch.dtype) -> Model:
        t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
        return FlowModel(
            network=FlowVelocity(self.mean, self.width**2).eval(),
            shape=SHAPE,
            levels=t / (1 - t),
            process=RECTIFIED_FLOW,
            preconditioning=FLOW,
            device=device,
            dtype=torch.float64,
            draws=True,
            features="digits-cnn",
            identity={"source": self.spec, "weights": hashlib.sha256(self.spec.encode()).hexdigest()},
        )


class Posterior(nn.Module):
    """E[x₀ | x, y] of x₀ ~ N(m, v), x = x₀ + σ z and y = x₀ + τ n: the precisions add."""

    def __init__(self, mean: float, variance: float, noise: float) -> None:
        super().__init__()
        self.mean, self.variance, self.noise = mean, variance, noise

    def forward(self, x: Tensor, sigma: Tensor, observation: Tensor) -> Tensor:
        at = 1 / sigma.reshape(-1, 1, 1, 1) ** 2
        own, given = 1 / self.variance, 1 / self.noise**2
        return (own * self.mean + at * x + given * observation) / (own + at + given)


@dataclass
class ObservedModel(Model):
    """A model that is given an observation y_i = x₀_i + τ n of each sample i, as a function of i."""

    def inputs(self, index: Tensor, inputs: Inputs) -> Inputs:
        network: Any = self.network
        truth = draws(index, network.mean, network.variance**0.5)
        noise = draws(index, 0.0, network.noise, seed=2)
        return inputs.extended(observation=truth + noise, truth=truth)

    def condition(self, inputs: Inputs) -> Condition:
        return {"observation": inputs.tensors["observation"]}

    def null_condition(self, inputs: Inputs) -> Condition:
        return self.condition(inputs)

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(x.double(), time, condition["observation"])


@dataclass(frozen=True)
class Observed(ModelSource):
    """A Gaussian observed under noise: the posterior of each sample is known (unpublished; an example)."""

    width: float = option(0.4, "standard deviation of every pixel", gt=0.0, le=1.0)
    noise: float = option(0.3, "τ, standard deviation of the observation's noise", gt=0.0, le=1.0)

    def load(self, device: torch.device, dtype: torch.dtype) -> Model:
        return ObservedModel(
            network=Posterior(0.1, self.width**2, self.noise).eval(),
            shape=SHAPE,
            levels=torch.logspace(-3, 2, 500, dtype=torch.float64),
            process=VARIANCE_EXPLODING,
            device=device,
            dtype=torch.float64,
            identity={"source": self.spec, "weights": hashlib.sha256(self.spec.encode()).hexdigest()},
        )


@dataclass(frozen=True)
class ByInformation(Spacing):
    """Levels at equal parts of ∫ √κ(σ) d log σ, with κ estimated from the model (unpublished; an example)."""

    logs: ClassVar[Tensor]
    share: ClassVar[Tensor]

    points: int = option(9, "levels at which κ is estimated", ge=2, le=1000)

    def bind(self, model: ModelView, sampler: Sampler) -> Self:
        index = torch.linspace(0, len(model.levels) - 1, self.points).long()
        at = model.levels[index]
        kappa, evaluations = posterior_variances(model, at, images=64)
        root = torch.tensor([kappa[s] for s in at.tolist()], dtype=torch.float64).sqrt()
        logs = at.log()
        parts = (root[1:] + root[:-1]) / 2 * (logs[1:] - logs[:-1])
        share = torch.cat([parts.new_zeros(1), parts.cumsum(0)])
        return self.with_state(logs=logs, share=share / share[-1], bound_evaluations=evaluations)

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        wanted = torch.linspace(1, 0, steps, dtype=torch.float64)
        upper = torch.searchsorted(self.share, wanted).clamp(1, len(self.share) - 1)
        low, high = self.share[upper - 1], self.share[upper]
        part = (wanted - low) / (high - low)
        logs = self.logs[upper - 1] + part * (self.logs[upper] - self.logs[upper - 1])
        return torch.cat([logs.exp(), levels.new_zeros(1)])


class Painter(nn.Module):
    """Paints each label in a grey of its own, with a little noise."""

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return (labels.reshape(-1, 1, 1, 1) / 10 - 0.5 + 0.1 * z).clamp(-1, 1)


@dataclass(frozen=True)
class Grey(Generator):
    """One pass of a network from noise and a label to an image, as of a GAN (Goodfellow et al. 2014)."""

    needs_labels: ClassVar[bool] = True
    painter: ClassVar[Painter]
    shape: ClassVar[tuple[int, int, int]]

    def bind(self, model: ModelView) -> Self:
        return self.with_state(painter=Painter().to(model.device), shape=model.image_shape)

    @property
    def network(self) -> nn.Module:
        return self.painter

    @property
    def identity(self) -> dict[str, str]:
        return {"generator weights": "none"}

    def images(self, index: Tensor, inputs: Inputs, seed: int) -> Tensor:
        assert inputs.labels is not None
        z = Noise(seed, index, self.shape, torch.float32)()
        return self.painter(z, inputs.labels)


@dataclass(frozen=True)
class DenoisingError(Metric):
    """E‖x₀ - D(x₀ + σ z, σ)‖²/d over the real images (Vincent 2011)."""

    of: ClassVar[Literal["samples", "data"]] = "data"
    needs_features: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    sigma: float = option(0.5, "the noise level", gt=0.0)

    def start(self, context: Context) -> Accumulator:
        return _Mean(self, context)


@dataclass(frozen=True)
class SquaredError(Metric):
    """E‖x - x₀‖²/d of samples x and the truth x₀ behind their observations (unpublished; an example)."""

    needs_features: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_truth: ClassVar[bool] = True

    def start(self, context: Context) -> Accumulator:
        return _Mean(self, context)


class _Mean(Accumulator):
    """A mean over images of what the metric measures of each."""

    def __init__(self, metric: Metric, context: Context) -> None:
        self.metric, self.context = metric, context
        self.total, self.n = 0.0, 0

    def measure(self, batch: Batch) -> Tensor:
        if isinstance(self.metric, SquaredError):
            assert batch.truth is not None
            return batch.states.cpu() - batch.truth.cpu()
        assert isinstance(self.metric, DenoisingError)
        assert self.context.denoiser is not None
        assert batch.inputs is not None
        sigma = self.metric.sigma
        z = Noise(SEED, batch.index, tuple(batch.states.shape[1:]), batch.states.dtype)()
        return batch.states - self.context.denoiser(batch.inputs)(batch.states + sigma * z, sigma)

    def update(self, batch: Batch) -> None:
        with torch.no_grad():
            self.total += float(self.measure(batch).double().square().flatten(1).mean(1).sum())
        self.n += len(batch.index)

    def state(self) -> dict[str, Tensor]:
        return {"total": torch.tensor([self.total, float(self.n)], dtype=torch.float64)}

    def merge(self, state: dict[str, Tensor]) -> None:
        total, n = state["total"].tolist()
        self.total, self.n = self.total + total, self.n + round(n)

    def result(self) -> dict[str, Any]:
        return {"value": self.total / self.n if self.n else math.nan}
