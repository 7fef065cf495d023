"""Likelihoods as metrics of a run: the bits per dimension of held-out images, beside the FID of samples."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.likelihoods.gaussian import GaussianPrior
from samplerbench.likelihoods.images import DEFAULT_IMAGES, Images, check_pixels, held_out, load_images
from samplerbench.likelihoods.ode import Divergence, Probe, increasing_grid, ode_of_batch
from samplerbench.likelihoods.vlb import bound_of_batch, kernel_problem
from samplerbench.limits import MAX_IMAGES, MAX_REPEATS
from samplerbench.metrics import Accumulator, Batch, Context, EvaluatedImages, FeatureStore, Metric
from samplerbench.models.model import Model
from samplerbench.models.sample import bind
from samplerbench.options import option
from samplerbench.sampling import Denoiser, Guidance, Inputs, ModelView, Sampler
from samplerbench.sampling.meter import Meter

TRIAL = 2
"""Number of images on which the evaluations of a solver are counted for an estimate."""


@dataclass(frozen=True)
class LikelihoodMetric(Metric, ABC):
    """Base of the metrics of held-out data in bits per dimension."""

    of: ClassVar[Literal["samples", "data"]] = "data"
    needs_features: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    unit: ClassVar[str] = "bits/dim"

    data: str = option("", "images, such as `digits:split=train`; empty: those held out from the training of the model")
    images: int = option(
        0, f"how many images of each block; 0: as many as are sampled, at most {DEFAULT_IMAGES}", ge=0, le=MAX_IMAGES
    )

    def evaluated(self, model: ModelView, n: int | None, blocks: int) -> EvaluatedImages:
        where = f"{self.label()}:data=NAME"
        model = _whole(model)
        check_pixels(model)
        wanted = self.images or min(n or DEFAULT_IMAGES, DEFAULT_IMAGES)
        images = load_images(model, self.data or held_out(model, where), None, wanted * blocks, where)
        count = min(wanted, len(images) // blocks)
        if count < (self.images or 1):
            raise UserError(
                f"{max(1, self.images) * blocks} images are required, and {images.name} has {len(images)}; use fewer "
                "images or fewer blocks."
            )
        digest = hashlib.sha256(repr((images.name, images.levels)).encode())
        for tensor in (images.values, images.labels):
            digest.update(b"" if tensor is None else tensor.cpu().contiguous().numpy().tobytes())
        identity = f"{images.name} {count} images of each block, sha256 {digest.hexdigest()[:16]}"
        labels = None if model.classes is None else images.labels
        return EvaluatedImages(images.name, identity, count, labels, images.states, images)

    def start(self, context: Context) -> Accumulator:
        return _Mean(self, context)

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the terms in a result."""

    @abstractmethod
    def terms(self, evaluation: _Evaluation, batch: Batch) -> Tensor:
        """The terms of the images of a batch in bits per dimension, (B, k) float64; their sum is the value."""


@dataclass(frozen=True)
class VLB(LikelihoodMetric):
    """Variational bound of the chain of N steps, in bits per dimension (Ho et al. 2020, eq. 5; Bao et al. 2022).

    -log p(x₀) ≤ L_T + Σ L_{t-1} + L_0, for samplers with Gaussian steps: ddpm (all variances), ddim with η > 0,
    analytic-dpm. `prior` is L_T, `denoising` Σ L_{t-1}, `reconstruction` L_0. Other samplers have no value. The images
    are those held out from the training of the model. One image costs N evaluations of the network, counted as the
    metric's `nfe`.
    """

    @property
    def names(self) -> tuple[str, ...]:
        return "prior", "denoising", "reconstruction"

    def inapplicable(self, sampler: Sampler, guidance: Guidance | None, model: ModelView) -> str | None:
        return kernel_problem(sampler)

    def evaluations(self, sampler: Sampler, sigmas: Tensor, context: Context) -> tuple[float, float]:
        return len(sigmas) - 1, 0

    def terms(self, evaluation: _Evaluation, batch: Batch) -> Tensor:
        e = evaluation
        rows, index = batch.index.cpu(), batch.index.to(e.model.device)
        bound = bound_of_batch(
            e.model, e.sampler, e.sigmas, e.images, e.denoiser(batch), rows, index, e.prior, e.context.seed
        )
        return torch.stack([bound.prior, bound.denoising.sum(1), bound.reconstruction], 1) * e.scale


@dataclass(frozen=True)
class NLL(LikelihoodMetric):
    """Negative log-likelihood under the probability-flow ODE, in bits per dimension (Song et al. 2021, section 4.3).

    -log₂ p(x)/d + log₂(L/2) of images with L grey levels after uniform dequantisation, for the solvers of pf-ode.
    Other samplers have no value. The images are those held out from the training of the model. The evaluations and
    backward passes of the network are counted as the metric's `nfe` and `network_backward`.
    """

    probes: str = option("1", "random vectors of Hutchinson's estimate, or `exact`: one backward pass per dimension")
    probe: Probe = option("rademacher", "distribution of the random vectors")
    repeats: int = option(1, "dequantisations of each image", ge=1, le=MAX_REPEATS)

    def __post_init__(self) -> None:
        super().__post_init__()
        digits = self.probes.isascii() and self.probes.isdigit() and len(self.probes) < 10
        if self.probes != "exact" and not (digits and 1 <= int(self.probes) <= MAX_REPEATS):
            raise UserError(
                f'metric {self.label()}: probes must be a whole number from 1 to {MAX_REPEATS:,}, or "exact".'
            )

    @property
    def divergence(self) -> Divergence:
        """How the divergence is computed."""
        return Divergence(None if self.probes == "exact" else int(self.probes), self.probe)

    @property
    def names(self) -> tuple[str, ...]:
        return "prior", "volume"

    def inapplicable(self, sampler: Sampler, guidance: Guidance | None, model: ModelView) -> str | None:
        if not sampler.reversible:
            return f"{sampler.spec} does not solve the probability-flow ODE from data to noise"
        if guidance is not None and guidance.differentiates:
            return f"the divergence is not computed through the gradients of {guidance.spec}"
        return None

    def evaluations(self, sampler: Sampler, sigmas: Tensor, context: Context) -> tuple[float, float]:
        bound = sampler if context.model is None else bind(_whole(context.model), sampler, sigmas)
        evaluation = _Evaluation(self, context, bound, sigmas)
        rows = torch.arange(min(TRIAL, len(evaluation.images)))
        labels = None if context.evaluated is None else context.evaluated.labels
        inputs = Inputs(len(rows), None if labels is None else labels[rows])
        empty = torch.empty(0)
        with Meter(evaluation.model.network) as meter:
            NLL(data=self.data, images=self.images).terms(evaluation, Batch(empty, empty, None, rows, inputs=inputs))
        nfe = meter.network / len(rows) * self.repeats
        return nfe, nfe * (self.divergence.probes or evaluation.images.dimensions)

    def terms(self, evaluation: _Evaluation, batch: Batch) -> Tensor:
        e = evaluation
        rows, index = batch.index.cpu(), batch.index.to(e.model.device)
        total = torch.zeros(len(rows), 2, dtype=torch.float64)
        repeats = 1 if e.images.levels is None else self.repeats
        for repeat in range(repeats):
            x = e.images.dequantised(rows, e.context.seed, repeat)
            ode = ode_of_batch(
                e.model,
                e.sampler,
                e.sigmas,
                x,
                e.denoiser(batch),
                index,
                e.prior,
                self.divergence,
                e.context.seed,
                repeat,
            )
            total += torch.stack([ode.prior, ode.volume], 1) * (e.scale / repeats)
        if e.images.levels is not None:
            total[:, 1] += math.log2(e.images.levels / 2)
        return total


class _Evaluation:
    """What the likelihoods of a cell are computed with.

    Args:
        metric: the metric.
        context: the context of the run.
        sampler: sampler of the cell, bound to the model. None: that of the context.
        sigmas: grid of the cell. None: that of the context.
    """

    def __init__(
        self,
        metric: LikelihoodMetric,
        context: Context,
        sampler: Sampler | None = None,
        sigmas: Tensor | None = None,
    ) -> None:
        sampler, sigmas = sampler or context.sampler, context.sigmas if sigmas is None else sigmas
        if context.model is None or context.evaluated is None or sampler is None or context.denoiser is None:
            raise UserError(f"the metric {metric.label()} has a value only within a run of a sampler.")
        self.context, self.sampler, self.model = context, sampler, _whole(context.model)
        self.images: Images = context.evaluated.source
        self.scale = 1 / (self.images.dimensions * math.log(2))
        self.sigmas = increasing_grid(sampler, self.model, sigmas) if isinstance(metric, NLL) else sigmas
        self.prior = GaussianPrior.of(self.model, float(sigmas[0]))

    def denoiser(self, batch: Batch) -> Denoiser:
        """The denoiser of a batch, with the guidance of the run."""
        assert self.context.denoiser is not None
        return self.context.denoiser(batch.inputs or Inputs(len(batch.index)))


class _Mean(FeatureStore):
    """Keeps the terms of each image, so that their mean does not depend on the order of batches and processes."""

    def __init__(self, metric: LikelihoodMetric, context: Context) -> None:
        super().__init__()
        self.metric, self.context = metric, context
        self._evaluation: _Evaluation | None = None

    def update(self, batch: Batch) -> None:
        if self._evaluation is None:
            self._evaluation = _Evaluation(self.metric, self.context)
        terms = self.metric.terms(self._evaluation, batch)
        self.parts.append(torch.cat([batch.index.cpu().double()[:, None], terms.cpu()], 1))

    def result(self) -> dict[str, Any]:
        if not self.parts:
            return {}
        rows = torch.cat(self.parts)
        terms = rows[rows[:, 0].argsort(), 1:]
        total, n = terms.sum(1), len(terms)
        means = dict(zip(self.metric.names, terms.mean(0).tolist(), strict=True))
        error = float(total.std() / math.sqrt(n)) if n > 1 else None
        return {"value": float(total.mean()), "standard_error": error, **means}


def _whole(model: ModelView) -> Model:
    if not isinstance(model, Model):
        raise UserError("likelihoods require a model of samplerbench.")
    return model


__all__ = ["NLL", "VLB", "LikelihoodMetric"]
