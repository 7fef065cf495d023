"""`samplerbench likelihood`: the variational bound, the likelihood of the ODE, or the bound of an autoencoder."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from samplerbench.cli import common
from samplerbench.cli.numbers import parse_batch_size
from samplerbench.errors import UserError
from samplerbench.limits import MAX_IMAGES, MAX_REPEATS
from samplerbench.text import console, literal, print_json

if TYPE_CHECKING:
    from samplerbench.likelihoods.run import Likelihood


def likelihood(
    sampler: Annotated[
        list[str],
        typer.Option(
            "--sampler",
            "-s",
            help="Sampler, with optional parameters: `ddim:eta=1`. Can be repeated.",
            autocompletion=common.complete("sampler"),
        ),
    ] = [],  # noqa: B006 - Typer copies it
    method: Annotated[
        Literal["vlb", "nll", "elbo"],
        typer.Option(
            "--method",
            help="`vlb`: variational bound. `nll`: likelihood of the probability-flow ODE. `elbo`: bound of the "
            "autoencoder of a latent model.",
        ),
    ] = "vlb",
    steps: Annotated[
        str | None, typer.Option("--steps", help="Comma-separated numbers of steps: `10,20,50`. Default: 50.")
    ] = None,
    spacing: common.Spacing = None,
    model: common.ModelName = "digits",
    revision: common.Revision = None,
    variant: common.Variant = None,
    offline: common.Offline = False,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Images: a data set name, a folder, zip or npz file. Default: the images held out from the training "
            "of the model, with the gap to its training images.",
            autocompletion=common.complete("data set"),
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option("--n", min=1, max=MAX_IMAGES, help="Number of images. Default: all, but at most 256."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", help="`none`: unconditional prediction. Default: the labels of the images."),
    ] = None,
    probes: Annotated[
        str,
        typer.Option(
            "--probes",
            help="`nll`: number of random vectors for the divergence, or `exact`: one backward pass per dimension.",
        ),
    ] = "1",
    probe: Annotated[
        Literal["rademacher", "gaussian"], typer.Option("--probe", help="`nll`: distribution of the random vectors.")
    ] = "rademacher",
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, max=MAX_REPEATS, help="`nll`: dequantisations of each image.")
    ] = 1,
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            min=1,
            max=MAX_REPEATS,
            help="`elbo`: samples K of each posterior, also of the importance-weighted bound.",
        ),
    ] = 16,
    decoder_variance: Annotated[
        float | None,
        typer.Option(
            "--decoder-variance",
            help="`elbo`: variance of the Gaussian decoder. Default: its mean squared error on training images.",
        ),
    ] = None,
    training: Annotated[
        bool, typer.Option("--gap/--no-gap", help="Whether to compute the gap to the training images.")
    ] = True,
    seed: common.Seed = 0,
    batch_size: common.BatchSize = "256",
    dtype: common.Dtype = "fp32",
    device: common.Device = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print only a JSON list with one object per sampler and number of steps.")
    ] = False,
) -> None:
    """Compute the likelihood of held-out images in bits per dimension.

    `vlb` is the variational bound of the chain of N steps, for samplers with Gaussian steps: ddpm, ddim with eta > 0,
    analytic-dpm. `nll` is the likelihood of the probability-flow ODE, with the solvers of pf-ode.
    `elbo` is the evidence lower bound of the autoencoder of a latent model, without a sampler.

    Examples:

    `samplerbench likelihood -s ddpm -s analytic-dpm:y=none --steps 10,25,50`

    `samplerbench likelihood --method nll -s pf-ode:solver=rk45 --model digits --n 64 --json`

    `samplerbench likelihood --method elbo --model runs/latent --data digits:split=held-out --samples 64`
    """
    from samplerbench.bench.prepare import prepare
    from samplerbench.bench.request import Request
    from samplerbench.likelihoods.run import elbo, likelihoods, make_settings, no_samplers

    settings = make_settings(method, data, n, probes, probe, repeats, training, samples, decoder_variance)
    if method == "elbo" and (sampler or steps or spacing):
        raise no_samplers()
    if method != "elbo" and not sampler:
        raise UserError("name a sampler with --sampler; `samplerbench list samplers` shows them.")
    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # plugins may print
        request = Request(
            [] if method == "elbo" else [common.grid(sampler, steps, None, [], spacing)],
            model=model,
            labels=labels,
            n=n,
            seeds=(seed,),
            batch_size=parse_batch_size(batch_size),
            dtype=dtype,
            revision=revision,
            variant=variant,
            offline=offline,
        )
        if method == "elbo":
            found = [elbo(request, settings, device)]
        else:
            found = list(likelihoods(prepare(request, device), settings))
    if as_json:
        print_json([one.as_dict() for one in found])
    elif method == "elbo":
        _show_elbo(found[0])
    else:
        _show(found)


def _show(found: list[Likelihood]) -> None:
    from rich.table import Table

    screen, first = console(), found[0]
    gaps = any(one.gap is not None for one in found)
    what = "variational bound" if first.method == "vlb" else "likelihood of the probability-flow ODE"
    levels = "a density" if first.levels is None else f"{first.levels} grey levels"
    title = f"{what} of {first.n} images, {first.data} ({levels}), in bits/dim"
    table = Table(title=literal(title, "bold"), title_justify="left", header_style="bold")
    table.add_column("sampler", overflow="fold")
    vlb = first.method == "vlb"
    middle = ["denoising Σ L_t-1", "reconstruction L_0"] if vlb else ["volume"]
    for head in ["steps", "bits/dim", "±", "prior L_T" if vlb else "prior", *middle, *(["gap"] if gaps else []), "NFE"]:
        table.add_column(head, justify="right")
    for one in found:
        error = "" if one.standard_error is None else f"{one.standard_error:.3g}"
        sums = [f"{sum(one.per_timestep):.4g}"] if vlb else []
        gap = [] if not gaps else ["" if one.gap is None else f"{one.gap:+.3g}"]
        cells = [f"{one.bits_per_dim:.4f}", error, f"{one.prior:.4g}", *sums, f"{one.reconstruction:.4g}", *gap]
        table.add_row(literal(one.sampler or ""), str(one.steps or ""), *cells, f"{one.nfe:g}")
    screen.print(table)
    if gaps and first.training is not None:
        screen.print(literal(f"gap: bits/dim above {first.training.n} training images, {first.training.data}", "dim"))


def _show_elbo(one: Likelihood) -> None:
    from rich.table import Table

    screen, weighted = console(), one.importance_weighted
    assert weighted is not None
    levels = "a density" if one.levels is None else f"{one.levels} grey levels"
    title = f"bounds of the autoencoder on {one.n} images, {one.data} ({levels}), in bits/dim"
    table = Table(title=literal(title, "bold"), title_justify="left", header_style="bold")
    table.add_column("bound")
    trained = one.training
    weighted_gap = None
    if trained is not None and trained.importance_weighted is not None:
        weighted_gap = weighted.bits_per_dim - trained.importance_weighted.bits_per_dim
    for head in ["bits/dim", "±", "KL", "reconstruction", *([] if trained is None else ["gap"]), "decoder passes"]:
        table.add_column(head, justify="right")
    terms = [f"{one.prior:.4g}", f"{one.reconstruction:.4g}"]
    rows = [
        ("ELBO", one.bits_per_dim, one.standard_error, terms, one.gap),
        (f"IWAE, K = {weighted.samples}", weighted.bits_per_dim, weighted.standard_error, ["", ""], weighted_gap),
    ]
    for name, value, error, middle, gap in rows:
        gaps = [] if gap is None else [f"{gap:+.3g}"]
        shown = "" if error is None else f"{error:.3g}"
        table.add_row(name, f"{value:.4f}", shown, *middle, *gaps, f"{weighted.decoder_passes:g}")
    screen.print(table)
    source = "given" if weighted.fitted_to is None else f"fitted to {weighted.fitted_to}"
    screen.print(literal(f"decoder variance: {weighted.decoder_variance:.4g}, {source}", "dim"))
    if trained is not None:
        screen.print(literal(f"gap: bits/dim above {trained.n} training images, {trained.data}", "dim"))
