"""`likelihood`: the bound or the likelihood of held-out images, for each sampler and number of steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from samplerbench.bench import setup
from samplerbench.bench.cell import Cell
from samplerbench.bench.generate import bound_cell, explain_memory
from samplerbench.bench.prepare import Prepared, prepare
from samplerbench.bench.request import Request, check_whole, one_grid
from samplerbench.errors import UserError, argument
from samplerbench.likelihoods.elbo import elbo_terms, optimal_variance
from samplerbench.likelihoods.images import Images, check_pixels, held_out, load_images
from samplerbench.likelihoods.ode import Divergence, Probe, increasing_grid, ode_terms
from samplerbench.likelihoods.vlb import bound_terms, check_kernel
from samplerbench.limits import MAX_REPEATS
from samplerbench.models.model import Model
from samplerbench.sampling import Inputs, Sampler, Spacing
from samplerbench.sampling.meter import Meter
from samplerbench.untrusted import shorten

Method = Literal["vlb", "nll", "elbo"]

FITTED_IMAGES = 1000
"""Maximum number of training images for the variance of an autoencoder's decoder."""


@dataclass(frozen=True)
class Settings:
    """What is computed, besides the samplers and the model.

    Attributes:
        method: "vlb", the variational bound, "nll", the likelihood of the probability-flow ODE, or "elbo", the bound of
            the autoencoder of a latent model.
        data: the images. None: the held-out images of the model.
        n: number of images. None: all, at most 256.
        gap: whether to compute the same of the training images, if no data set is given.
        divergence: how `nll` computes the divergence.
        repeats: number of dequantisations of each image in `nll`.
        samples: number K of samples of each posterior in `elbo`.
        decoder_variance: variance of the decoder in `elbo`. None: the optimal one of the training images.
    """

    method: Method = "vlb"
    data: str | None = None
    n: int | None = None
    gap: bool = True
    divergence: Divergence = field(default_factory=Divergence)
    repeats: int = 1
    samples: int = 16
    decoder_variance: float | None = None


@dataclass(frozen=True)
class ImportanceWeighted:
    """The importance-weighted bound of an autoencoder (Burda et al. 2016), and what it was computed with.

    Attributes:
        samples: number K of samples of each posterior.
        bits_per_dim: the bound, the mean over the images.
        standard_error: standard error over the images. None for one image.
        decoder_variance: variance of the Gaussian decoder.
        fitted_to: images to which the variance was fitted. None if it was given.
        decoder_passes: passes through the decoder per image.
    """

    samples: int
    bits_per_dim: float
    standard_error: float | None
    decoder_variance: float
    fitted_to: str | None
    decoder_passes: float

    def as_dict(self) -> dict[str, Any]:
        """The values as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of images under a model with one sampler and number of steps.

    All terms are means over the images in bits per dimension, and their sum is `bits_per_dim`. Without grey levels,
    for draws of an exact distribution, they are those of a density.

    Attributes:
        method: "vlb", "nll" or "elbo".
        sampler: spec of the sampler. None for `elbo`, which has none.
        steps: number of steps N. None if the sampler chooses its own steps, and for `elbo`.
        bits_per_dim: the bound, or -log₂ p(x₀)/d of the discrete images.
        standard_error: standard error of `bits_per_dim` over the images. None for one image.
        prior: L_T of the bound. For `nll`, that of the density of the end x_T. For `elbo`, KL(q(z | x) ‖ p(z)).
        reconstruction: L_0 of the bound. For `nll`, the change of volume along the ODE and the width of a grey level.
            For `elbo`, -E_q log p(x | z).
        per_timestep: L_{t-1} of the bound, from the highest noise level to the lowest, N-1 terms. Empty for `nll` and
            `elbo`.
        sigmas: noise levels of the steps, N+1 numbers. For `nll`, increasing. Empty for `elbo`.
        per_image: `bits_per_dim` of each image.
        data: the images.
        levels: number of grey levels. None for a density.
        nfe: network evaluations per image.
        network_backward: backward passes through the network per image.
        estimate_evaluations: network evaluations of the estimates of the sampler.
        training: the same of the training images. None if it was not computed.
        importance_weighted: for `elbo`, the importance-weighted bound. Otherwise None.
    """

    method: Method
    sampler: str | None
    steps: int | None
    bits_per_dim: float
    standard_error: float | None
    prior: float
    reconstruction: float
    per_timestep: list[float]
    sigmas: list[float]
    per_image: list[float] = field(repr=False)
    data: str = ""
    levels: int | None = None
    nfe: float = 0
    network_backward: float = 0
    estimate_evaluations: int = 0
    training: Likelihood | None = None
    importance_weighted: ImportanceWeighted | None = None

    @property
    def nats_per_dim(self) -> float:
        """`bits_per_dim` in nats."""
        return self.bits_per_dim * math.log(2)

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.per_image)

    @property
    def gap(self) -> float | None:
        """Bits per dimension above those of the training images. None if they were not computed."""
        return None if self.training is None else self.bits_per_dim - self.training.bits_per_dim

    def as_dict(self) -> dict[str, Any]:
        """The values as plain data, which can be written as JSON."""
        training, weighted = self.training, self.importance_weighted
        return {
            "method": self.method,
            "sampler": self.sampler,
            "steps": self.steps,
            "bits_per_dim": self.bits_per_dim,
            "nats_per_dim": self.nats_per_dim,
            "standard_error": self.standard_error,
            "terms": {
                "prior": self.prior,
                "reconstruction": self.reconstruction,
                "per_timestep": self.per_timestep,
            },
            "sigmas": self.sigmas,
            "data": self.data,
            "grey_levels": self.levels,
            "n": self.n,
            "nfe": self.nfe,
            "network_backward": self.network_backward,
            "estimate_evaluations": self.estimate_evaluations,
            "training": None
            if training is None
            else {
                "data": training.data,
                "bits_per_dim": training.bits_per_dim,
                "standard_error": training.standard_error,
                "n": training.n,
                "gap": self.gap,
            },
            **({} if weighted is None else {"importance_weighted": weighted.as_dict()}),
        }


def likelihood(
    samplers: str | Sampler | Sequence[str | Sampler] = (),
    steps: int | Sequence[int] = 50,
    *,
    method: Method = "vlb",
    model: str | Path | Model = "digits",
    data: str | None = None,
    n: int | None = None,
    spacing: str | Spacing | None = None,
    labels: str | int | None = None,
    probes: int | Literal["exact"] = 1,
    probe: Probe = "rademacher",
    repeats: int = 1,
    samples: int = 16,
    decoder_variance: float | None = None,
    training: bool = True,
    seed: int = 0,
    batch_size: int = 256,
    dtype: str = "fp32",
    device: str | torch.device = "auto",
) -> list[Likelihood]:
    """Compute the variational bound or the likelihood of images, for each sampler and number of steps.

    `vlb` is the bound L_T + Σ L_{t-1} + L_0 of the chain of N steps (Ho et al. 2020, eq. 5), for samplers with Gaussian
    steps. `nll` is the likelihood of the probability-flow ODE (Song et al. 2021, section 4.3), for pf-ode. `elbo` is
    the evidence lower bound of the autoencoder of a latent model (Kingma & Welling 2014), without samplers. An image
    depends only on the seed and its place in the data, not on n and the batch size.

    Args:
        samplers: Specs or instances. Empty for `elbo`.
        steps: Numbers of steps. Not used by `elbo`.
        method: "vlb", "nll" or "elbo".
        model: The source of a model (see `load_model`), or a loaded model.
        data: Images, as for `evaluate`. If None, the images held out from the training of the model, or new samples of
            an exact distribution.
        n: Number of images. If None, all images, but at most 256.
        spacing: A spec or an instance. If None, the default spacing of each sampler.
        labels: "none" for the unconditional prediction. If None, the labels of the images, if the model has classes.
        probes: `nll`: number of random vectors for the divergence, or "exact" for one backward pass per dimension.
        probe: `nll`: distribution of the random vectors, "rademacher" or "gaussian".
        repeats: `nll`: number of dequantisations of each image.
        samples: `elbo`: number of samples of each posterior.
        decoder_variance: `elbo`: variance of the decoder. If None, the mean squared error on training images.
        training: Whether to compute the same of the training images, if `data` is None.
        seed: Seed of all noise.
        batch_size: Images per batch.
        dtype: Precision of the network. Ignored for a loaded model.
        device: Device of the model. Ignored for a loaded model.

    Returns:
        One `Likelihood` per sampler and number of steps, and one for `elbo`.

    Raises:
        UserError: If an argument is invalid, the sampler has no likelihood, or the data is not available.
        RunError: If a sampler fails.
    """
    settings = make_settings(method, data, n, probes, probe, repeats, training, samples, decoder_variance)
    one = isinstance(samplers, str | Sampler)
    grids = []
    if settings.method != "elbo":
        grid = one_grid(
            [samplers] if one else samplers,  # type: ignore[list-item, arg-type]
            [steps] if isinstance(steps, int) else steps,
            spacing=spacing,
        )
        grids = [grid]
    elif samplers:
        raise no_samplers()
    loaded = model if isinstance(model, Model) else None
    source = str(model.identity.get("source", "model")) if isinstance(model, Model) else str(model)
    request = Request(
        grids,
        model=source,
        labels=labels,
        n=n,
        seeds=(seed,),
        batch_size=check_whole("batch_size", batch_size, 1, 1_000_000),
        dtype=dtype,
    )
    if settings.method == "elbo":
        return [elbo(request, settings, str(device), loaded)]
    return list(likelihoods(prepare(request, str(device), loaded), settings))


def no_samplers() -> UserError:
    """The error for a sampler with `elbo`."""
    return UserError(
        f"{argument('method', 'elbo')} is the bound of an autoencoder, which has no sampler and no steps; leave them "
        "out."
    )


def make_settings(
    method: str,
    data: str | None = None,
    n: int | None = None,
    probes: int | str = 1,
    probe: str = "rademacher",
    repeats: int = 1,
    training: bool = True,
    samples: int = 16,
    decoder_variance: float | None = None,
) -> Settings:
    """Create the settings from the arguments of `likelihood`, which it checks.

    Raises:
        UserError: If an argument is invalid.
    """
    if method not in ("vlb", "nll", "elbo"):
        raise UserError(f"{argument('method', shorten(str(method)))}: choose vlb, nll or elbo.")
    if probe not in ("rademacher", "gaussian"):
        raise UserError(f"{argument('probe', shorten(str(probe)))}: choose rademacher or gaussian.")
    count = None
    if probes != "exact":
        if isinstance(probes, str):
            if not (probes.isascii() and probes.isdigit() and len(probes) < 10):
                raise UserError(f'{argument("probes", shorten(probes))}: give a whole number or "exact".')
            probes = int(probes)
        count = check_whole("probes", probes, 1, MAX_REPEATS)
    check_whole("repeats", repeats, 1, MAX_REPEATS)
    if check_whole("samples", samples, 0, MAX_REPEATS) < 1:
        raise UserError(f"{argument('samples', samples)}: at least 1 sample is needed.")
    if decoder_variance is not None and not 1e-12 <= decoder_variance <= 1e12:
        raise UserError(f"{argument('decoder_variance', decoder_variance)}: give a number from 1e-12 to 1e12.")
    return Settings(
        method,  # type: ignore[arg-type]
        data,
        n,
        training,
        Divergence(count, "rademacher" if probe == "rademacher" else "gaussian"),
        repeats,
        samples,
        decoder_variance,
    )


def likelihoods(prepared: Prepared, settings: Settings) -> Iterator[Likelihood]:
    """Compute the likelihood of each planned cell, in the order of the request.

    Args:
        prepared: the model and the cells. The request gives the seed and the labels.
        settings: what is computed.

    Raises:
        UserError: if a sampler has no likelihood, the model has none, or the data is not available.
        RunError: if a sampler fails.
    """
    model = prepared.model
    check_pixels(model)
    for cell in prepared.cells:
        cell.check()
        if settings.method == "nll":
            increasing_grid(cell.sampler, model, cell.sigmas)
        else:
            check_kernel(cell.sampler)
    images = load_images(model, settings.data or held_out(model), settings.n)
    training = None
    if settings.gap and settings.data is None and not model.draws:
        training = load_images(model, model.data, None, len(images))
    for cell in prepared.cells:
        bound = bound_cell(model, cell)
        found = _of_images(prepared, bound, settings, images)
        if training is None:
            yield found
        else:
            yield replace(found, training=_of_images(prepared, bound, settings, training))


def elbo(request: Request, settings: Settings, device: str, model: Model | None = None) -> Likelihood:
    """Compute the bound of the autoencoder of a latent model.

    Args:
        request: names the model, the seed and the batch size.
        settings: what is computed.
        device: name of the device, or "auto".
        model: a model that is already loaded. If None, the model of the request is loaded.

    Raises:
        UserError: if the model has no variational autoencoder, or the data is not available.
    """
    if model is None:
        # A text-to-image model needs no prompts here.
        options = replace(request.load, show=True)
        model = setup.load_model(request.model, setup.pick_device(device), request.dtype, options)
    if model.autoencoder is None:
        raise UserError(
            f"this model works in pixel space and has no autoencoder; use {argument('method', 'vlb')}, or a latent "
            "model."
        )
    model.autoencoder.posterior(torch.zeros(1, *model.image_shape, device=model.device))
    images = load_images(model, settings.data or held_out(model), settings.n)
    batch_size = 256 if request.batch_size == "auto" else request.batch_size
    seed, variance, fitted_to = request.seeds[0], settings.decoder_variance, None
    if variance is None:
        known = images if model.data is None else load_images(model, model.data, None, FITTED_IMAGES)
        variance, fitted_to = optimal_variance(model.autoencoder, known, seed, batch_size, model.device), known.name
    found = _elbo_of_images(model, settings, images, variance, fitted_to, seed, batch_size)
    if not settings.gap or settings.data is not None:
        return found
    training = load_images(model, model.data, None, len(images))
    return replace(found, training=_elbo_of_images(model, settings, training, variance, fitted_to, seed, batch_size))


def _elbo_of_images(
    model: Model,
    settings: Settings,
    images: Images,
    variance: float,
    fitted_to: str | None,
    seed: int,
    batch_size: int,
) -> Likelihood:
    assert model.autoencoder is not None
    rows, n, samples = torch.arange(len(images)), len(images), settings.samples
    with explain_memory(min(batch_size, n)), Meter(model.network, decoder=model.autoencoder.decoder) as meter:
        terms = elbo_terms(model.autoencoder, images, rows, variance, samples, seed, batch_size, model.device)
    scale, cost = 1 / (images.dimensions * math.log(2)), meter.cost.per_image(n)
    total, weighted = terms.total * scale, terms.importance_weighted * scale
    return Likelihood(
        "elbo",
        None,
        None,
        float(total.mean()),
        _standard_error(total),
        float((terms.divergence * scale).mean()),
        float((terms.reconstruction * scale).mean()),
        [],
        [],
        total.tolist(),
        images.name,
        images.levels,
        importance_weighted=ImportanceWeighted(
            samples,
            float(weighted.mean()),
            _standard_error(weighted),
            variance,
            fitted_to,
            cost["decoder_passes"],
        ),
    )


def _standard_error(values: Tensor) -> float | None:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None


def _inputs(prepared: Prepared, images: Images) -> Inputs:
    """The labels of the images: their own, or those of the request."""
    n, model = len(images), prepared.model
    if prepared.mode == "balanced":
        labels = images.labels if model.classes is not None else None
        return prepared.inputs_of(n, labels)
    return prepared.inputs(n)


def _of_images(prepared: Prepared, cell: Cell, settings: Settings, images: Images) -> Likelihood:
    model, seed, batch_size = prepared.model, prepared.request.seeds[0], prepared.batch_size
    inputs, rows = _inputs(prepared, images), torch.arange(len(images))
    scale = 1 / (images.dimensions * math.log(2))
    with explain_memory(min(batch_size, len(images))), Meter(model.network) as meter:
        if settings.method == "vlb":
            sigmas = cell.sigmas
            bound = bound_terms(model, cell.sampler, sigmas, images, inputs, rows, seed, batch_size)
            prior, rest, steps = bound.prior * scale, bound.reconstruction * scale, bound.denoising * scale
        else:
            sigmas = increasing_grid(cell.sampler, model, cell.sigmas)
            prior, rest = (
                part * scale for part in _ode(model, cell, sigmas, settings, images, inputs, rows, seed, batch_size)
            )
            if images.levels is not None:
                rest = rest + math.log2(images.levels / 2)
            steps = prior.new_zeros(len(images), 0)
    total = prior + steps.sum(1) + rest
    n = len(images)
    cost = meter.cost.per_image(n)
    return Likelihood(
        settings.method,
        cell.sampler.spec,
        cell.steps,
        float(total.mean()),
        _standard_error(total),
        float(prior.mean()),
        float(rest.mean()),
        steps.mean(0).tolist(),
        sigmas.tolist(),
        total.tolist(),
        images.name,
        images.levels,
        cost["nfe"],
        cost["network_backward"],
        int(getattr(cell.sampler, "bound_evaluations", 0)),
    )


def _ode(
    model: Model,
    cell: Cell,
    sigmas: Tensor,
    settings: Settings,
    images: Images,
    inputs: Inputs,
    rows: Tensor,
    seed: int,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """The two parts of -log p of the dequantised images in nats, the mean over the repetitions, each (n,)."""
    repeats = settings.repeats if images.levels is not None else 1
    found = []
    for repeat in range(repeats):
        x = images.dequantised(rows, seed, repeat)
        divergence = settings.divergence
        found.append(ode_terms(model, cell.sampler, sigmas, x, inputs, rows, divergence, seed, repeat, batch_size))
    prior = torch.stack([terms.prior for terms in found]).mean(0)
    return prior, torch.stack([terms.volume for terms in found]).mean(0)


__all__ = [
    "ImportanceWeighted",
    "Likelihood",
    "Settings",
    "elbo",
    "likelihood",
    "likelihoods",
    "make_settings",
    "no_samplers",
]
