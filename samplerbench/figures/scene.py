"""The common part of all figures: the model, its samples with labels and x_T, and runs from x_T."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from samplerbench.bench.cell import Cell
from samplerbench.bench.generate import bound_cell, explain_memory
from samplerbench.bench.prepare import Prepared
from samplerbench.data.pixels import quantise
from samplerbench.errors import UserError, argument
from samplerbench.models.model import Model
from samplerbench.models.sample import start_batch, start_noise
from samplerbench.sampling import Inputs, Noise, Sampler
from samplerbench.sampling.driver import OnStep
from samplerbench.sampling.noise import Purpose, uniform
from samplerbench.sampling.process import VARIANCE_PRESERVING
from samplerbench.text import show_sigma
from samplerbench.untrusted import is_dir, user_path


class NoNoise(Noise):
    """Noise for a sampler that must be deterministic. Raises UserError if it draws noise."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.draws = sampler, 0

    def __call__(self) -> Tensor:
        raise UserError(
            f"sampler {self.sampler.spec} draws noise on its way, so x_T alone does not say which image it makes; "
            "this figure needs a deterministic sampler."
        )


@dataclass(frozen=True)
class Scene:
    """The samples of a figure. Sample i depends only on the seed and i, as in every other command.

    Attributes:
        prepared: the model and the requested runs.
        n: number of samples.
        seed: random seed.
        batch_size: images per batch.
        data: source of the real images; None for the training data of the model.
    """

    prepared: Prepared
    n: int
    seed: int = 0
    batch_size: int = 256
    data: str | None = None

    def __post_init__(self) -> None:
        for cell in self.cells:
            cell.check()

    @property
    def model(self) -> Model:
        """The model."""
        return self.prepared.model

    @property
    def cells(self) -> list[Cell]:
        """The requested runs."""
        return self.prepared.cells

    @cached_property
    def labels(self) -> Tensor | None:
        """(n,) int64, the label or prompt of each sample, or None. Raises UserError as `Prepared.inputs`."""
        return self.prepared.inputs(self.n).chosen

    @property
    def name(self) -> str:
        """The name of the model in titles; for a folder, its base name."""
        source = self.prepared.request.model
        return user_path(source).resolve().name if is_dir(source) else source

    def z(self, first: int = 0) -> Tensor:
        """z ~ N(0, I) of the samples first … first+n-1, (n, *shape), in the state's precision."""
        index = torch.arange(first, first + self.n, device=self.model.device)
        return start_noise(self.model, index, self.seed)

    def start(self, cell: Cell, first: int = 0) -> Tensor:
        """x_T of the samples first … first+n-1 for a run, (n, *shape)."""
        return self.model.prior(self.z(first), float(cell.sigmas[0]))

    def run(
        self,
        cell: Cell,
        x: Tensor,
        labels: Tensor | None,
        deterministic: bool = False,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Run a sampler from given start states. Row i uses the step noise of sample i.

        Args:
            cell: the run.
            x: start states, (B, *shape).
            labels: (B,) int64, or None.
            deterministic: raise an error if the sampler draws noise.
            on_step: callback after each step of each batch.

        Returns:
            The final states, (B, *shape).

        Raises:
            UserError: a sampler that draws noise although it must be deterministic.
            RunError: the sampler failed.
        """
        cell = bound_cell(self.model, cell)
        rows, parts = torch.arange(len(x), device=self.model.device), []
        for part in rows.split(self.batch_size):
            inputs = self.inputs(labels, part)
            noise = NoNoise(cell.sampler) if deterministic else None
            with explain_memory(len(part)):
                batch = start_batch(
                    self.model,
                    cell.sampler,
                    cell.sigmas,
                    part,
                    inputs,
                    guidance=cell.guidance,
                    seed=self.seed,
                    x=x[part],
                    noise=noise,
                )
                parts.append(batch.states(on_step))
        return torch.cat(parts)

    def inputs(self, labels: Tensor | None, rows: Tensor) -> Inputs:
        """The inputs of some rows with these labels or prompts (B,), on the model's device."""
        chosen = None if labels is None else labels.to(self.model.device)[rows]
        count = len(rows)
        given = Inputs(count, prompts=chosen) if self.model.text else Inputs(count, labels=chosen)
        return self.model.inputs(rows, given)

    def pixels(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """Convert states to uint8 images for display.

        States are scaled to x/√(1+σ²), the input of a variance-preserving network. Variance-exploding states are scaled
        too, because otherwise only noise would be visible. Latents are scaled, then decoded.

        Args:
            x: states, (B, *shape).
            sigma: noise level of the states.

        Returns:
            (B, C, H, W) uint8.
        """
        scale, parts = (1 + sigma**2) ** -0.5, []
        for part in x.split(self.batch_size):
            with torch.no_grad(), explain_memory(len(part)):
                latent = self.model.autoencoder is not None
                images = self.model.decode(part * scale) if latent else self.model.decode(part) * scale
            parts.append(quantise(images).cpu())
        return torch.cat(parts)

    def real(self, n: int) -> tuple[Tensor, Tensor | None]:
        """Real images as states. The seed selects the images.

        Args:
            n: number of images.

        Returns:
            States (n, *shape), and labels (n,) int64 if the model has class labels, else None.

        Raises:
            UserError: the data is unknown or not available, or its images do not have the shape of the model.
        """
        from samplerbench.data import load_data
        from samplerbench.data.pixels import dequantise

        source = self.data or self.model.data
        if source is None and not self.model.draws:
            raise UserError(
                f"the model does not say what it was trained on; name the real images with {argument('data')}."
            )
        if source is None:
            x0, labels = self.model.real(n)
        else:
            found = load_data(source)
            if found.shape != self.model.image_shape:
                here, there = ("x".join(map(str, shape)) for shape in (found.shape, self.model.image_shape))
                raise UserError(
                    f"{source} has images of {here}, the model makes {there}; name others with {argument('data')}."
                )
            if len(found) < n:
                raise UserError(f"{source} has {len(found)} image{'s' * (len(found) != 1)}; {n} are needed here.")
            order = uniform(self.seed, Purpose.ESTIMATE, torch.arange(len(found))).argsort()[:n]
            x0 = torch.cat(
                [self.model.encode(dequantise(part).to(self.model.device)) for part in found.images[order].split(64)]
            )
            labels = None if found.labels is None else found.labels[order]
        known = self.prepared.classes
        if known is None or self.labels is None or self.model.text:
            labels = None
        elif labels is not None and not int(labels.max()) < known:
            raise UserError(f"the data has the label {int(labels.max())}, the model only 0 to {known - 1}.")
        return x0.to(self.model.device, self.z().dtype), labels

    def name_rows(self, labels: Tensor | None, what: str = "sample") -> list[str]:
        """The label of each row: `label 3`, or `sample 3` (`what` and a number) for a model without labels."""
        if labels is None:
            return [f"{what} {i}" for i in range(self.n)]
        kind = "prompt" if self.model.text else "label"
        return [f"{kind} {int(label)}" for label in labels]

    def denoised(self, cell: Cell, x: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
        """D(x, σ), (B, *shape), with the guidance and clipping of the run."""
        rows, parts = torch.arange(len(x), device=self.model.device), []
        for part in rows.split(self.batch_size):
            with torch.no_grad(), explain_memory(len(part)):
                denoise = self.model.denoiser(self.inputs(labels, part), cell.guidance)
                parts.append(denoise(x[part], sigma))
        return torch.cat(parts)

    def describe(self, cell: Cell | None = None, steps: bool = True, noisy: bool = False) -> str:
        """The subtitle: model, sampler, guidance, spacing, steps and seed.

        noisy: states above σ = 0 are shown, so that a scale which is not the model's own has to be named.
        """
        words = [self.name]
        if cell is not None:
            words.append(cell.sampler.spec)
            words += [cell.guidance.spec] if cell.guidance is not None else []
            words += [f"spacing {cell.spacing.spec}"] if cell.spacing is not None else []
            words += [name_steps(cell.steps)] if steps else []
        words.append(f"seed {self.seed}")
        return " · ".join(
            words + (["shown as x/√(1+σ²)"] if noisy and self.model.process is not VARIANCE_PRESERVING else [])
        )


def name_steps(steps: int | None) -> str:
    """`1 step`, `50 steps`, or `its own steps`."""
    return "its own steps" if steps is None else f"{steps} step{'s' if steps != 1 else ''}"


def name_sigma(sigma: float) -> str:
    """`σ = 157`: three digits."""
    return show_sigma(sigma)


def spread(count: int, columns: int) -> list[int]:
    """At most `columns` of 0 … count-1, evenly, the first and the last among them."""
    if columns == 1:
        return [0]
    return sorted({round(i * (count - 1) / (columns - 1)) for i in range(columns)})


def nearest(levels: list[float], wanted: list[float]) -> list[int]:
    """The indices of the levels nearest to the wanted ones in log σ, in the levels' order; 0 is the lowest level."""
    at = [math.log(max(level, 1e-12)) for level in levels]
    found = {min(range(len(at)), key=lambda i, w=w: abs(at[i] - math.log(max(w, 1e-12)))) for w in wanted}  # type: ignore[misc]
    return sorted(found)
