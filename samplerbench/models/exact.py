"""Exact problems: data distributions with a closed-form denoiser.

They measure the error of a sampler against the exact solution. All three problems are Gaussian mixtures with diagonal
covariances: one component, a few components, or one zero-width component per image of a data set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from samplerbench.errors import UserError
from samplerbench.models.classifier import LoadedClassifier
from samplerbench.models.flow import flow_fields, flow_identity
from samplerbench.models.model import Condition, Model, ModelSource
from samplerbench.models.preconditioning import DENOISED
from samplerbench.models.schedule import alphas_cumprod, noise_levels
from samplerbench.options import option
from samplerbench.sampling.flow import FlowSchedule
from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.noise import Purpose, normal, uniform
from samplerbench.sampling.process import VARIANCE_PRESERVING
from samplerbench.untrusted import shorten

NO_LABEL = -1
"""The label for the unconditional prediction, like the null label of a checkpoint."""


Denoises = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A function of noisy states (B, *shape), noise levels (B,) and labels (B,) that returns E[x₀ | x, …], (B, *shape)."""

CLEAN = 0.1
"""The noise level of the exact label posterior when it is used as a classifier of clean images."""


class MixtureDenoiser(nn.Module):
    """The denoiser D(x, σ) of the mixture Σ_k w_k N(μ_k, diag v_k), computed in float64.

    D = Σ_k r_k (v_k x + σ² μ_k)/(v_k + σ²), where r_k ∝ w_k N(x; μ_k, v_k + σ²) is the posterior of component k.

    Args:
        means: means μ_k, (K, *shape).
        variances: variances v_k, (K, *shape), or (K,) for isotropic components.
        weights: weights w_k, (K,), with sum 1.
        labels: class of each component, (K,) int64.
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
        """Compute log w_k N(x; μ_k, v_k + σ²).

        Args:
            x: flattened states, (B, d) float64.
            sigma: noise levels, (B,).

        Returns:
            Log densities, (B, K).
        """
        d, square = x.shape[1], sigma[:, None] ** 2
        if self.isotropic:
            total = self.variances + square  # (B, K)
            # Expanding the square needs only one matrix product. Its rounding error is negligible in float64.
            distance = x.square().sum(1, keepdim=True) - 2 * x @ self.means.T + self.means.square().sum(1)
            return self.log_weights - 0.5 * (distance / total + d * (2 * math.pi * total).log())
        total = self.variances + square[:, :, None]  # (B, K, d)
        terms = (x[:, None] - self.means).square() / total + (2 * math.pi * total).log()
        return self.log_weights - 0.5 * terms.sum(2)

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, posterior: Denoises | None = None
    ) -> Tensor:
        """Compute D(x, σ), or D(x, σ | y) if labels or an observation are given.

        Args:
            x: noisy states, (B, *shape).
            sigma: noise levels, (B,).
            labels: class labels, (B,) int64. Only the components of the class are used. NO_LABEL selects all.
            posterior: the denoiser E[x₀ | x, y] for the observations of the batch, called with the first three
                arguments. It is evaluated here so that it is counted as an evaluation of the network.

        Returns:
            D, (B, *shape) float64.
        """
        if posterior is not None:
            return posterior(x, sigma, labels)
        flat = x.double().flatten(1)
        posterior_of = self.of_labels(self.log_components(flat, sigma), labels).softmax(1)
        square = sigma[:, None] ** 2
        if self.isotropic:
            kept = posterior_of * self.variances / (self.variances + square)
            pulled = posterior_of * square / (self.variances + square)
            mean = kept.sum(1, keepdim=True) * flat + pulled @ self.means
        else:
            square = square[:, :, None]
            each = (self.variances * flat[:, None] + square * self.means) / (self.variances + square)
            mean = (posterior_of[:, :, None] * each).sum(1)
        return mean.reshape(x.shape)

    def of_labels(self, scores: Tensor, labels: Tensor | None) -> Tensor:
        """Set the scores (B, K) of components of other classes to -∞. NO_LABEL and None keep all."""
        if labels is None:
            return scores
        others = (self.labels[None] != labels[:, None]) & (labels[:, None] != NO_LABEL)
        return scores.masked_fill(others, -math.inf)


class LabelPosterior(nn.Module):
    """The exact log p(y | x, σ) of a mixture, for classifier guidance.

    Args:
        denoiser: denoiser of the mixture.
    """

    def __init__(self, denoiser: MixtureDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Compute log p(y | x, σ).

        Args:
            x: noisy states, (B, *shape).
            sigma: noise levels, (B,).

        Returns:
            Log probabilities, (B, classes) float64.
        """
        scores = self.denoiser.log_components(x.double().flatten(1), sigma.double())
        owners = self.denoiser.labels[None] == torch.arange(self.denoiser.classes, device=x.device)[:, None]
        per_class = scores[:, None].masked_fill(~owners, -math.inf).logsumexp(2)
        return per_class.log_softmax(1)


@dataclass
class ExactModel(Model):
    """A closed-form denoiser as a model, with the noise levels of a linear-β DDPM.

    Attributes:
        problem: denoiser of the mixture.
    """

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
        """p(y | x, σ) with σ clamped to at least CLEAN, because data points have no density at σ = 0."""
        posterior = LabelPosterior(self.problem)

        def logits(x: Tensor, sigma: Tensor) -> Tensor:
            return posterior(x, sigma.clamp(min=CLEAN))

        return LoadedClassifier(posterior, str(self.identity["weights"]), logits, self.problem.classes)

    def prior(self, z: Tensor, sigma: float) -> Tensor:
        """The initial state: the exact marginal for a single Gaussian, N(0, 1+σ²) for other problems."""
        if len(self.problem.means) > 1:
            return super().prior(z, sigma)
        mean = self.problem.means.reshape(self.shape).to(z.device)
        variance = self.problem.variances.reshape(
            -1, *([1] * len(self.shape)) if self.problem.isotropic else self.shape
        )
        return (mean + (variance[0] + sigma**2).sqrt().to(z.device) * z.double()).to(z.dtype)

    def real(self, n: int) -> tuple[Tensor, Tensor | None]:
        """Draw n samples from the distribution."""
        index = torch.arange(n)
        mass = self.problem.log_weights.exp().cpu().cumsum(0)
        component = torch.searchsorted(mass, uniform(0, Purpose.ESTIMATE, index, 1)).clamp(max=len(mass) - 1)
        deviation = self.problem.variances.cpu()[component].sqrt().reshape(n, -1)
        z = normal(0, Purpose.ESTIMATE, index, 2, self.shape).flatten(1)
        x0 = self.problem.means.cpu()[component] + deviation * z
        labels = self.problem.labels.cpu()[component] if self.classes is not None else None
        return x0.reshape(n, *self.shape).to(self.dtype), labels

    def solve(self, x: Tensor, start: float, end: float, labels: Tensor | None = None) -> Tensor:
        """Solve the probability-flow ODE.

        A single Gaussian has the closed-form solution μ + √((v+σ_end²)/(v+σ_start²))(x - μ). Other problems use an
        eighth-order Runge-Kutta method in log σ for each sample, or in t for a rectified flow, with relative tolerance
        10⁻¹² (error below 10⁻¹⁰).

        Args:
            x: initial states, (B, *shape).
            start: noise level of x. For a rectified flow it may be `SIGMA_INFINITY`.
            end: final noise level, end > 0.
            labels: class labels, (B,) int64. None without labels.

        Returns:
            The final states, (B, *shape) float64.
        """
        x = x.double()
        if len(self.problem.means) == 1:
            mean = self.problem.means.reshape(self.shape)
            variance = self.problem.variances
            variance = variance.reshape(self.shape) if variance.ndim > 1 else variance
            return mean + ((variance + end**2) / (variance + start**2)).sqrt() * (x - mean)
        from scipy.integrate import solve_ivp

        solved = []
        flow = self.process.ends
        for i, row in enumerate(x):
            label = None if labels is None else labels[i : i + 1]

            def slope(u: float, y: np.ndarray, label: Tensor | None = label) -> np.ndarray:
                # In log σ: dx/du = x - D. In t: dy/dt = (y - D)/t with y = x t/σ.
                level, divisor = (self.process.level(u), u) if flow else (math.exp(u), 1.0)
                state = torch.from_numpy(y).reshape(1, *self.shape)
                scale = level / u if flow else 1.0
                x0 = self.problem(state * scale, torch.tensor([level], dtype=torch.float64), label)
                return ((state - x0) / divisor).flatten().numpy()

            variable = self.process.time if flow else math.log
            first, last = variable(start), variable(end)
            scales = (first / start, end / last) if flow else (1.0, 1.0)
            initial = (row * scales[0]).flatten().numpy()
            run = solve_ivp(slope, (first, last), initial, method="DOP853", rtol=1e-12, atol=1e-13)
            solved.append(torch.from_numpy(run.y[:, -1] * scales[1]).reshape(self.shape))
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
    flow: bool = False,
) -> ExactModel:
    import hashlib

    network = MixtureDenoiser(means, variances, weights, labels).requires_grad_(False).eval()
    digest = hashlib.sha256()
    for tensor in (means, variances, weights, labels):
        digest.update(tensor.contiguous().numpy().tobytes())
    schedule: dict[str, Any] = {"levels": noise_levels(alphas_cumprod({})), "process": VARIANCE_PRESERVING}
    described: dict[str, Any] = {"schedule": "linear", "timesteps": 1000}
    if flow:
        # The network is D itself, as a function of x and σ, also for a flow.
        schedule = flow_fields(FlowSchedule()) | {"preconditioning": DENOISED}
        described = flow_identity(FlowSchedule())
    shape = tuple(means.shape[1:])
    classes = network.classes if network.classes > 1 else None
    counts = None
    if classes is not None:
        mass = torch.zeros(classes, dtype=torch.float64).index_add(0, labels, weights.double())
        counts = [round(float(m) * 1_000_000) for m in mass]
    return ExactModel(
        network=network.to(device),
        shape=(shape[0], shape[1], shape[2]),
        device=device,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        classes=classes,
        null=classes is not None,
        class_counts=counts,
        data=data,
        draws=data is None,
        features="digits-cnn" if shape == (1, 8, 8) else None,
        identity={"source": name, "weights": digest.hexdigest()} | described,
        notes={"denoiser": "closed form", "components": str(len(means))},
        problem=network,
        **schedule,
    )


MAX_VALUES = 2**20
"""Maximum number of values in one image of an exact problem: 1,024 x 1,024."""


def parse_shape(text: str) -> tuple[int, int, int]:
    """Parse a shape such as `1x8x8`.

    Raises:
        UserError: if the text is not a valid shape.
    """
    parts = text.split("x")
    if len(parts) != 3 or not all(p.isascii() and p.isdigit() and len(p) < 10 and int(p) > 0 for p in parts):
        raise UserError(f'the shape "{shorten(text)}" is not channels x height x width; write shape=1x8x8.')
    channels, height, width = map(int, parts)
    if channels * height * width > MAX_VALUES:
        raise UserError(f"the shape {text} has {channels * height * width:,} values; the maximum is {MAX_VALUES:,}.")
    return (channels, height, width)


@dataclass(frozen=True)
class Exact(ModelSource):
    """An exact problem: a distribution with known denoiser, score, label posterior and ODE solution.

    gaussian  a Gaussian with a different mean and width in every dimension; D is linear in x.
    mixture   a Gaussian mixture; component k has label k mod `classes`.
    points    the empirical distribution of the 1,797 digits; D is the ideal denoiser of that data set.

    With process=flow the model is a rectified flow, y = (1-t) x₀ + t z, which starts at t = 1.
    """

    kind: ClassVar[str] = "model"

    problem: Literal["gaussian", "mixture", "points"] = option("gaussian", "distribution", positional=True)
    shape: str = option("1x8x8", "channels x height x width (gaussian, mixture)")
    components: int = option(4, "number of Gaussians (mixture)", ge=2, le=10_000)
    classes: int = option(2, "number of labels (mixture)", ge=1, le=10_000)
    width: float = option(0.3, "typical standard deviation (gaussian, mixture)", gt=0.0)
    seed: int = option(0, "random seed of the means and widths", ge=0, le=2**63 - 1)
    process: Literal["vp", "flow"] = option("vp", "variance-preserving process, or rectified flow")

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
                *(name, means, torch.zeros(n), torch.full((n,), 1 / n), digits.labels, device, dtype),
                data="digits",
                flow=self.process == "flow",
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
        flow = self.process == "flow"
        return _model(name, means, deviations**2, weights / weights.sum(), labels, device, dtype, flow=flow)


def exact(spec: str = "gaussian", **parameters: Any) -> ExactModel:
    """Create an exact problem on the CPU in float64, for tests: `exact("mixture", components=3)`."""
    return Exact(problem=spec, **parameters).load(torch.device("cpu"), torch.float64)  # type: ignore[arg-type]
