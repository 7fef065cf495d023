"""The round trip image → x_T → image, and its reconstruction error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplerbench.bench.cell import Cell
from samplerbench.bench.generate import explain_memory
from samplerbench.errors import UserError, argument
from samplerbench.figures.invert import Method, encode
from samplerbench.figures.panel import Panel
from samplerbench.figures.scene import Scene, name_steps
from samplerbench.sampling.meter import Meter
from samplerbench.sampling.noise import Purpose, normal

SCALE = "per dimension, images in [0, 1]"


@dataclass(frozen=True)
class RoundTrip:
    """The round trip with one number of steps.

    Attributes:
        steps: number of steps in each direction.
        images: (n, C, H, W) uint8, the reconstructions.
        errors: (n,), mean squared error per dimension of each image in [0, 1].
        variance: variance of x_T relative to the prior; 1 for a sample of the prior.
        nfe: counted network evaluations per image, in both directions.
    """

    steps: int
    images: Tensor
    errors: Tensor
    variance: float
    nfe: float

    @property
    def mse(self) -> float:
        """The mean squared error over all images."""
        return float(self.errors.mean())

    @property
    def record(self) -> dict[str, Any]:
        """The entry in the JSON file."""
        return {
            "steps": self.steps,
            "nfe": self.nfe,
            "mse": self.mse,
            "mse_per_image": self.errors.tolist(),
            "x_T_variance": self.variance,
        }


def round_trip(
    scene: Scene, cell: Cell, x0: Tensor, labels: Tensor | None, method: Method = "euler", noised: bool = False
) -> RoundTrip:
    """Encode clean states on the grid of a run, and decode the result with its sampler.

    The error contains only the two integrations: for a latent model, the reconstruction is compared with the decoded
    x0, before quantisation (Song, Meng & Ermon 2021, section 5.4 and table 2).

    Args:
        scene: the model and the samples.
        cell: the run.
        x0: clean states, (n, *shape).
        labels: (n,) int64, or None.
        method: solver of the inversion.
        noised: start at the smallest noise level with noise, instead of the clean states (see `encode`).

    Raises:
        UserError: a sampler that draws noise, or that chooses its own steps.
    """
    if cell.steps is None:
        raise UserError(
            f"sampler {cell.sampler.spec} chooses its own steps, so there is no grid for the way up; name another "
            f"{argument('sampler')}, or leave it out with {argument('round_trip', 'none')}."
        )
    model = scene.model
    model.check_inputs(scene.inputs(labels, torch.arange(len(x0), device=model.device)))
    with Meter(model.network) as meter:
        z = normal(scene.seed, Purpose.ESTIMATE, torch.arange(len(x0)), 0, model.shape).to(x0) if noised else None
        parts = []
        for rows in torch.arange(len(x0), device=model.device).split(scene.batch_size):
            with explain_memory(len(rows)):
                denoise = model.denoiser(scene.inputs(labels, rows), cell.guidance)
                parts.append(encode(denoise, x0[rows], cell.sigmas, method, None if z is None else z[rows]))
        x_T = torch.cat(parts)
        back = scene.run(cell, x_T, labels, deterministic=True)
    with torch.no_grad():
        pairs = zip(back.split(scene.batch_size), x0.split(scene.batch_size), strict=True)
        difference = torch.cat([model.decode(one) - model.decode(other) for one, other in pairs]).double() / 2
    return RoundTrip(
        cell.steps,
        scene.pixels(back),
        difference.square().flatten(1).mean(1).cpu(),
        float(in_prior_units(scene, cell, x_T).square().mean()),
        meter.network / len(x0),
    )


def in_prior_units(scene: Scene, cell: Cell, x_T: Tensor) -> Tensor:
    """The z (n, *shape) float64 from which the model's prior would make x_T (n, *shape)."""
    sigma, one = float(cell.sigmas[0]), torch.ones_like(x_T[:1], dtype=torch.float64)
    zero = scene.model.prior(0 * one, sigma)
    return (x_T.double() - zero) / (scene.model.prior(one, sigma) - zero)


def panel(scene: Scene, x0: Tensor, labels: Tensor | None, trips: list[RoundTrip]) -> Panel:
    """The originals, and a row of reconstructions per number of steps."""
    rows = ["original", *(f"{name_steps(trip.steps)}\nMSE {_scientific(trip.mse)}" for trip in trips)]
    heads = [] if labels is None else scene.name_rows(labels)
    images = torch.stack([scene.pixels(x0), *(trip.images for trip in trips)])
    return Panel(images, rows, heads, f"Image → x_T → image: mean squared error {SCALE}")


def _scientific(value: float) -> str:
    """`1.9×10⁻³`."""
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits}×10" + str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
