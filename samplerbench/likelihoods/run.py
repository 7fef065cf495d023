"""`likelihood`: the bound or the likelihood of held-out images, for each sampler and number of steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from samplerbench.bench.cell import Cell
from samplerbench.bench.generate import bound_cell, explain_memory
from samplerbench.bench.prepare import Prepared, prepare
from samplerbench.bench.request import Request, check_whole, one_grid
from samplerbench.errors import UserError, argument
from samplerbench.likelihoods.images import Images, check_pixels, held_out, load_images
from samplerbench.likelihoods.ode import Divergence, Probe, increasing_grid, ode_terms
from samplerbench.likelihoods.vlb import bound_terms, check_kernel
from samplerbench.limits import MAX_REPEATS
from samplerbench.models.model import Model
from samplerbench.sampling import Inputs, Sampler, Spacing
from samplerbench.sampling.meter import Meter
from samplerbench.untrusted import shorten

Method = Literal["vlb", "nll"]


@dataclass(frozen=True)
class Settings:
    """What is computed, besides the samplers and the model.

    Attributes:
        method: "vlb", the variational bound, or "nll", the likelihood of the probability-flow ODE.
        data: the images. None: the held-out images of the model.
        n: number of images. None: all, at most 256.
        gap: whether to compute the same of the training images, if no data set is given.
        divergence: how `nll` computes the divergence.
        repeats: number of dequantisations of each image in `nll`.
    """

    method: Method = "vlb"
    data: str | None = None
    n: int | None = None
    gap: bool = True
    divergence: Divergence = field(default_factory=Divergence)
    repeats: int = 1


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of images under a model with one sampler and number of steps.

    All terms are means over the images in bits per dimension, and their sum is `bits_per_dim`. Without grey levels,
    for draws of an exact distribution, they are those of a density.

    Attributes:
        method: "vlb" or "nll".
        sampler: spec of the sampler.
        steps: number of steps N. None if the sampler chooses its own steps.
        bits_per_dim: the bound, or -log₂ p(x₀)/d of the discrete images.
        standard_error: standard error of `bits_per_dim` over the images. None for one image.
        prior: L_T of the bound. For `nll`, that of the density of the end x_T.
        reconstruction: L_0 of the bound. For `nll`, the change of volume along the ODE and the width of a grey level.
        per_timestep: L_{t-1} of the bound, from the highest noise level to the lowest, N-1 terms. Empty for `nll`.
        sigmas: noise levels of the steps, N+1 numbers. For `nll`, increasing.
        per_image: `bits_per_dim` of each image.
        data: the images.
        levels: number of grey levels. None for a density.
        nfe: network evaluations per image.
        network_backward: backward passes through the network per image.
        estimate_evaluations: network evaluations of the estimates of the sampler.
        training: the same of the training images. None if it was not computed.
    """

    method: Method
    sampler: str
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
        training = self.training
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
        }


def likelihood(
    samplers: str | Sampler | Sequence[str | Sampler],
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
    training: bool = True,
    seed: int = 0,
    batch_size: int = 256,
    dtype: str = "fp32",
    device: str | torch.device = "auto",
) -> list[Likelihood]:
    """Compute the variational bound or the likelihood of images, for each sampler and number of steps.

    `vlb` is the bound L_T + Σ L_{t-1} + L_0 of the chain of N steps (Ho et al. 2020, eq. 5), for samplers with Gaussian
    steps. `nll` is the likelihood of the probability-flow ODE (Song et al. 2021, section 4.3), for pf-ode. An image
    depends only on the seed and its place in the data, not on n and the batch size.

    Args:
        samplers: Specs or instances.
        steps: Numbers of steps.
        method: "vlb" or "nll".
        model: The source of a model (see `load_model`), or a loaded model.
        data: Images, as for `evaluate`. If None, the images held out from the training of the model, or new samples of
            an exact distribution.
        n: Number of images. If None, all images, but at most 256.
        spacing: A spec or an instance. If None, the default spacing of each sampler.
        labels: "none" for the unconditional prediction. If None, the labels of the images, if the model has classes.
        probes: `nll`: number of random vectors for the divergence, or "exact" for one backward pass per dimension.
        probe: `nll`: distribution of the random vectors, "rademacher" or "gaussian".
        repeats: `nll`: number of dequantisations of each image.
        training: Whether to compute the same of the training images, if `data` is None.
        seed: Seed of all noise.
        batch_size: Images per batch.
        dtype: Precision of the network. Ignored for a loaded model.
        device: Device of the model. Ignored for a loaded model.

    Returns:
        One `Likelihood` per sampler and number of steps.

    Raises:
        UserError: If an argument is invalid, the sampler has no likelihood, or the data is not available.
        RunError: If a sampler fails.
    """
    one = isinstance(samplers, str | Sampler)
    grid = one_grid(
        [samplers] if one else samplers,  # type: ignore[list-item, arg-type]
        [steps] if isinstance(steps, int) else steps,
        spacing=spacing,
    )
    loaded = model if isinstance(model, Model) else None
    source = str(model.identity.get("source", "model")) if isinstance(model, Model) else str(model)
    request = Request(
        [grid],
        model=source,
        labels=labels,
        n=n,
        seeds=(seed,),
        batch_size=check_whole("batch_size", batch_size, 1, 1_000_000),
        dtype=dtype,
    )
    settings = make_settings(method, data, n, probes, probe, repeats, training)
    return list(likelihoods(prepare(request, str(device), loaded), settings))


def make_settings(
    method: str,
    data: str | None = None,
    n: int | None = None,
    probes: int | str = 1,
    probe: str = "rademacher",
    repeats: int = 1,
    training: bool = True,
) -> Settings:
    """Create the settings from the arguments of `likelihood`, which it checks.

    Raises:
        UserError: If an argument is invalid.
    """
    if method not in ("vlb", "nll"):
        raise UserError(f"{argument('method', shorten(str(method)))}: choose vlb or nll.")
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
    return Settings(
        "vlb" if method == "vlb" else "nll",
        data,
        n,
        training,
        Divergence(count, "rademacher" if probe == "rademacher" else "gaussian"),
        repeats,
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
        float(total.std() / math.sqrt(n)) if n > 1 else None,
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


__all__ = ["Likelihood", "Settings", "likelihood", "likelihoods", "make_settings"]
