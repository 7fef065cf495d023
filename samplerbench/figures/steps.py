"""Images from the same x_T with increasing numbers of steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samplerbench.bench.cell import Cell
from samplerbench.figures.panel import Drawing, Panel
from samplerbench.figures.scene import Scene, name_steps
from samplerbench.sampling.meter import Meter


@dataclass(frozen=True)
class Column:
    """The images of one run, (n, C, H, W) uint8, and its counted evaluations per image."""

    cell: Cell
    images: Tensor
    nfe: float


def columns(scene: Scene) -> list[Column]:
    """Run every cell of the scene. All start from the same z, and so from the same x_T if their first σ is equal."""
    found = []
    for cell in scene.cells:
        with Meter(scene.model.network) as meter:
            x = scene.run(cell, scene.start(cell), scene.labels)
        found.append(Column(cell, scene.pixels(x), meter.network / scene.n))
    return found


def still(scene: Scene, found: list[Column]) -> Drawing:
    """A still figure: one panel per sampler; rows are samples, columns are numbers of steps."""
    panels = []
    for run in dict.fromkeys((c.cell.sampler, c.cell.spacing) for c in found):
        own = [c for c in found if (c.cell.sampler, c.cell.spacing) == run]
        spacing = f" · spacing {run[1].spec}" if run[1] is not None else ""
        heads = [f"{name_steps(c.cell.steps)}\n{c.nfe:g} NFE" for c in own]
        images = torch.stack([c.images for c in own], dim=1)
        panels.append(Panel(images, scene.name_rows(scene.labels), heads, f"{run[0].spec}{spacing}"))
    return Drawing("One x_T, more and more steps", panels, _note(scene))


def frames(scene: Scene, found: list[Column]) -> list[Drawing]:
    """An animation: one frame per number of steps. Samplers that choose their own steps do not change."""
    runs = list(dict.fromkeys((c.cell.sampler, c.cell.spacing) for c in found))
    drawn = []
    own: list[int | None] = [None]
    for steps in sorted({c.cell.steps for c in found if c.cell.steps is not None}) or own:
        shown = [c for run in runs for c in found if (c.cell.sampler, c.cell.spacing) == run]
        shown = [c for c in shown if c.cell.steps in (steps, None)]
        panel = Panel(
            torch.stack([c.images for c in shown]),
            [c.cell.sampler.spec for c in shown],
            scene.name_rows(scene.labels),
        )
        drawn.append(Drawing(name_steps(steps), [panel], _note(scene)))
    return drawn


def _note(scene: Scene) -> str:
    guidance = scene.cells[0].guidance
    return scene.describe() if guidance is None else f"{guidance.spec} · {scene.describe()}"
