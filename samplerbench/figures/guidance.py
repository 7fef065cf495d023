"""Images from the same x_T and label with increasing guidance scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from samplerbench.figures.panel import Drawing, Panel
from samplerbench.figures.scene import Scene, name_steps


def guidance_specs(guidance: str, scales: Sequence[str]) -> list[str]:
    """Specs for each scale: `cfg` and the scales 0, 1, 2 give cfg:scale=0, cfg:scale=1 and cfg:scale=2."""
    joint = "," if ":" in guidance else ":"
    return [f"{guidance}{joint}scale={scale}" for scale in scales]


def still(scene: Scene) -> Drawing:
    """A still figure: rows are samples, columns are the guidances of the scene's cells."""
    images = [scene.pixels(scene.run(cell, scene.start(cell), scene.labels)) for cell in scene.cells]
    cell = scene.cells[0]
    assert cell.guidance is not None
    heads = [f"scale {c.guidance.parameters['scale']:g}" for c in scene.cells if c.guidance is not None]
    panel = Panel(torch.stack(images, dim=1), scene.name_rows(scene.labels), heads)
    spacing = [f"spacing {cell.spacing.spec}"] if cell.spacing is not None else []
    how = [cell.guidance.label(), scene.name, cell.sampler.spec, *spacing, name_steps(cell.steps), f"seed {scene.seed}"]
    return Drawing("One x_T, stronger and stronger guidance", [panel], " · ".join(how))
