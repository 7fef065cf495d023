"""Exact problems: data distributions whose denoiser is known in closed form.

On them a sampler is measured against the truth, not against another implementation. All three are mixtures of
Gaussians with diagonal covariances: one component; a few; or, with zero width, one per image of a data set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from samplerbench.errors import UserError
from samplerbench.models.classifier import LoadedClassifier
from samplerbench.models.model import Condition, Model, ModelSource
from samplerbench.models.schedule import alphas_cumprod, noise_levels
from samplerbench.options import option
from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.noise import Purpose, normal, uniform
from samplerbench.sampling.process import VARIANCE_PRESERVING
from samplerbench.untrusted import shorten

NO_LABEL = -1
"""The label that means "none", as the null label of a checkpoint does."""


CLEAN = 0.1
"""The noise level at which the exact label posterior is a classifier of clean images."""


class MixtureDenoiser(nn.Module):
    """D(x, σ) of Σ_k w_k N(μ_k, diag v_k), in float64 inside.

    With r_k the posterior of component k, N(x; μ_k, v_k + σ²) weighted by w_k:
    D = Σ_k r_k (v_k x + σ² μ_k)/(v_k + σ²).

    Args:
        means: (K, *shape). variances: (K, *shape), or (K,) where a component has one width for all dimensions.
        weights: (K,), summing to one. labels: (K,) int64, the class of each component.
    """

    def __init__(self, means: Tensor, variances: Tensor, weights: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.shape = tuple(means.shape[1:])
        self.register_buffer("means", means.double().flatten(1))
        self.isotropic = variances.ndim == 1
        self.register_buffer("variances", variances.double().flatten(1) if not self.isotropic else variances.double())
        self.register_buffer("log_weights", weights.double().log())
        self.register_buffer("labels", labels)
        self.classes = int(labels.max()) + 1
        self.means: Tensor
        self.variances: Tensor
        self.log_weights: Tensor
        self.labels: Tensor

    def log_components(self, x: Tensor, sigma: Tensor) -> Tensor:
        """log w_k N(x; μ_k, v_k + σ²), (B, K), of x (B, d) float64 and sigma (B,)."""
        d, square = x.shape[1], sigma[:, None] ** 2
        if self.isotropic:
            total = self.variances + square  # (B, K)
            # In float64 the expanded square loses nothing that matters, and it is one matrix product.
            distance = x.square().sum(1, keepdim=True) - 2 * x @ self.means.T + self.means.square().sum(1)
            return self.log_weights - 0.5 * (distance / total + d * (2 * math.pi * total).log())
        total = self.variances + square[:, :, None]  # (B, K, d)
        terms = (x[:, None] - self.means).square() / total + (2 * math.pi * total).log()
        return self.log_weights - 0.5 * terms.sum(2)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """D (B, *shape) float64 of x (B, *shape) at sigma (B,); given labels (B,), of those components only.

        NO_LABEL stands for all of them.
        """
        flat = x.double().flatten(1)
        scores = self.log_components(flat, sigma)
        if labels is not None:
            others = (self.labels[None] != labels[:, None]) & (labels[:, None] != NO_LABEL)
            scores = scores.masked_fill(others, -math.inf)
        posterior = scores.softmax(1)
        square = sigma[:, None] ** 2
        if self.isotropic:
            kept = posterior * self.variances / (self.variances + square)
            pulled = posterior * square / (self.variances + square)
            mean = kept.sum(1, keepdim=True) * flat + pulled @ self.means
        else:
            square = square[:, :, None]
            each = (self.variances * flat[:, None] + square * self.means) / (self.variances + square)
            mean = (posterior[:, :, None] * each).sum(1)
        return mean.reshape(x.shape)


class LabelPosterior(nn.Module):
    """log p(y | x, σ) of the same mixture: the exact classifier for classifier guidance."""

    def __init__(self, denoiser: MixtureDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Log probabilities (B, classes) float64 of x (B, *shape) at sigma (B,)."""
        scores = self.denoiser.log_components(x.double().flatten(1), sigma.double())
        owners = self.denoiser.labels[None] == torch.arange(self.denoiser.classes, device=x.device)[:, None]
        per_class = scores[:, None].masked_fill(~owners, -math.inf).logsumexp(2)
        return per_class.log_softmax(1)


@dataclass
class ExactModel(Model):
    """A closed-form denoiser behind the interface of a checkpoint, with the noise levels of a linear-β DDPM."""

    problem: MixtureDenoiser = field(kw_only=True)

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(x, time, condition.get("labels"))

    def null_condition(self, inputs: Inputs) -> Condition:
        return {} if self.classes is None else {"labels": torch.full((len(inputs),), NO_LABEL, device=self.device)}

    def own_classifier(self) -> LoadedClassifier:
        """The exact label posterior p(y | x, σ)."""
        posterior = LabelPosterior(self.problem)
        return LoadedClassifier(posterior, str(self.identity["weights"]), posterior, self.problem.classes)

    def own_image_classifier(self) -> LoadedClassifier:
        """What is left of p(y | x, σ) on a clean image; at σ = 0 a point of the data has no density."""
        posterior = LabelPosterior(self.problem)

        def logits(x: Tensor, sigma: Tensor) -> Tensor:
            return posterior(x, sigma.clamp(min=CLEAN))

        return LoadedClassifier(posterior, str(self.identity["weights"]), logits, self.problem.classes)

    def prior(self, z: Tensor, sigma: float) -> Tensor:
        """A Gaussian problem starts from its exact marginal; the others from N(0, 1+σ²), as a DDPM does."""
        if len(self.problem.means) > 1:
            return super().prior(z, sigma)
        mean = self.problem.means.reshape(self.shape).to(z.device)
        variance = self.problem.variances.reshape(
            -1, *([1] * len(self.shape)) if self.problem.isotropic else self.shape
        )
        return (mean + (variance[0] + sigma**2).sqrt().to(z.device) * z.double()).to(z.dtype)

    def real(self, n: int) -> tuple[Tensor, Tensor | None]:
        """n draws from the distribution itself."""
        index = torch.arange(n)
        mass = self.problem.log_weights.exp().cpu().cumsum(0)
        component = torch.searchsorted(mass, uniform(0, Purpose.ESTIMATE, index, 1)).clamp(max=len(mass) - 1)
        deviation = self.problem.variances.cpu()[component].sqrt().reshape(n, -1)
        z = normal(0, Purpose.ESTIMATE, index, 2, self.shape).flatten(1)
        x0 = self.problem.means.cpu()[component] + deviation * z
        labels = self.problem.labels.cpu()[component] if self.classes is not None else None
        return x0.reshape(n, *self.shape).to(self.dtype), labels

    def solve(self, x: Tensor, start: float, end: float, labels: Tensor | None = None) -> Tensor:
        """Where the probability-flow ODE takes x (B, *shape) from level start to level end: (B, *shape) float64.

        For a Gaussian the closed form μ + √((v+σ_end²)/(v+σ_start²))(x - μ); else an eighth-order Runge-Kutta
        method in log σ, each sample alone, to a relative tolerance of 10⁻¹² (an error below 10⁻¹⁰). end > 0.
        """
        x = x.double()
        if len(self.problem.means) == 1:
            mean = self.problem.means.reshape(self.shape)
            variance = self.problem.variances
            variance = variance.reshape(self.shape) if variance.ndim > 1 else variance
            return mean + ((variance + end**2) / (variance + start**2)).sqrt() * (x - mean)
        from scipy.integrate import solve_ivp

        solved = []
        for i, row in enumerate(x):
            label = None if labels is None else labels[i : i + 1]

            def slope(u: float, y: np.ndarray, label: Tensor | None = label) -> np.ndarray:
                state = torch.from_numpy(y).reshape(1, *self.shape)
                level = torch.tensor([math.exp(u)], dtype=torch.float64)
                return (state - self.problem(state, level, label)).flatten().numpy()

            span = (math.log(start), math.log(end))
            run = solve_ivp(slope, span, row.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-13)
            solved.append(torch.from_numpy(run.y[:, -1]).reshape(self.shape))
        return torch.stack(solved)


def _model(
    name: str,
    means: Tensor,
    variances: Tensor,
    weights: Tensor,
    labels: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    data: str | None = None,
) -> ExactModel:
    import hashlib

    network = MixtureDenoiser(means, variances, weights, labels).requires_grad_(False).eval()
    digest = hashlib.sha256()
    for tensor in (means, variances, weights, labels):
        digest.update(tensor.contiguous().numpy().tobytes())
    levels = noise_levels(alphas_cumprod({}))
    shape = tuple(means.shape[1:])
    classes = network.classes if network.classes > 1 else None
    counts = None
    if classes is not None:
        mass = torch.zeros(classes, dtype=torch.float64).index_add(0, labels, weights.double())
        counts = [round(float(m) * 1_000_000) for m in mass]
    return ExactModel(
        network=network.to(device),
        shape=(shape[0], shape[1], shape[2]),
        levels=levels,
        process=VARIANCE_PRESERVING,
        device=device,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        classes=classes,
        null=classes is not None,
        class_counts=counts,
        data=data,
        draws=data is None,
        features="digits-cnn" if shape == (1, 8, 8) else None,
        identity={"source": name, "weights": digest.hexdigest(), "schedule": "linear", "timesteps": len(levels)},
        notes={"denoiser": "closed form", "components": str(len(means))},
        problem=network,
    )


MAX_VALUES = 2**20
"""Values of one image of an exact problem: 1,024 x 1,024."""


def parse_shape(text: str) -> tuple[int, int, int]:
    """`1x8x8` as (1, 8, 8). Raises UserError for anything else."""
    parts = text.split("x")
    if len(parts) != 3 or not all(p.isascii() and p.isdigit() and len(p) < 10 and int(p) > 0 for p in parts):
        raise UserError(f'the shape "{shorten(text)}" is not channels x height x width; write shape=1x8x8.')
    channels, height, width = map(int, parts)
    if channels * height * width > MAX_VALUES:
        raise UserError(
            f"the shape {text} has {channels * height * width:,} values; at most {MAX_VALUES:,} are possible."
        )
    return (channels, height, width)


@dataclass(frozen=True)
class Exact(ModelSource):
    """An exact problem: a distribution whose denoiser, score, label posterior and ODE solution are known.

    gaussian  one Gaussian, mean and width different in every dimension: D is linear in x.
    mixture   a Gaussian mixture; components are shared out to `classes` labels in turn.
    points    the 1,797 digits as a sum of points: the ideal denoiser of that data set, with its labels.
    """

    kind: ClassVar[str] = "model"

    problem: Literal["gaussian", "mixture", "points"] = option("gaussian", "which distribution", positional=True)
    shape: str = option("1x8x8", "channels x height x width (gaussian, mixture)")
    components: int = option(4, "how many Gaussians (mixture)", ge=2, le=10_000)
    classes: int = option(2, "how many labels (mixture)", ge=1, le=10_000)
    width: float = option(0.3, "typical standard deviation (gaussian, mixture)", gt=0.0)
    seed: int = option(0, "of the means and widths", ge=0, le=2**63 - 1)

    def load(self, device: torch.device, dtype: torch.dtype) -> ExactModel:
        name = self.spec
        if self.problem == "points":
            from samplerbench.data import load_data
            from samplerbench.data.pixels import dequantise

            digits = load_data("digits")
            assert digits.labels is not None
            n = len(digits)
            means = dequantise(digits.images).double()
            model = _model(
                name, means, torch.zeros(n), torch.full((n,), 1 / n), digits.labels, device, dtype, data="digits"
            )
            model.class_counts = digits.class_counts()
            return model
        shape = parse_shape(self.shape)
        generator = torch.Generator().manual_seed(self.seed)

        def even(*size: int) -> Tensor:
            return torch.rand(size, generator=generator, dtype=torch.float64)

        k = 1 if self.problem == "gaussian" else self.components
        means = even(k, *shape) * 1.6 - 0.8
        deviations = self.width * (0.5 + even(k, *shape))
        weights = torch.ones(k, dtype=torch.float64) if k == 1 else 0.5 + even(k)
        labels = torch.zeros(k, dtype=torch.int64) if k == 1 else torch.arange(k) % min(self.classes, k)
        return _model(name, means, deviations**2, weights / weights.sum(), labels, device, dtype)


def exact(spec: str = "gaussian", **parameters: Any) -> ExactModel:
    """An exact problem on the CPU in float64, for tests: `exact("mixture", components=3)`."""
    return Exact(problem=spec, **parameters).load(torch.device("cpu"), torch.float64)  # type: ignore[arg-type]
