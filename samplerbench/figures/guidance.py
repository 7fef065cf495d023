"""One x_T and label, stronger and stronger guidance."""

from __future__ import annotations

import torch

from samplerbench.figures.panel import Drawing, Panel
from samplerbench.figures.scene import Scene, name_steps


def guidance_specs(guidance: str, scales: str) -> list[str]:
    """`cfg` and `0,1,2` as cfg:scale=0, cfg:scale=1, cfg:scale=2; other parameters of the guidance stay as they are."""
    joint = "," if ":" in guidance else ":"
    return [f"{guidance}{joint}scale={part.strip()}" for part in scales.split(",") if part.strip()]


def still(scene: Scene) -> Drawing:
    """Rows samples, columns the guidances of the scene's cells, in the order asked for."""
    images = [scene.pixels(scene.run(cell, scene.start(cell), scene.labels)) for cell in scene.cells]
    cell = scene.cells[0]
    assert cell.guidance is not None
    heads = [f"scale {c.guidance.parameters['scale']:g}" for c in scene.cells if c.guidance is not None]
    panel = Panel(torch.stack(images, dim=1), scene.name_rows(scene.labels), heads)
    spacing = [f"spacing {cell.spacing.spec}"] if cell.spacing is not None else []
    how = [cell.guidance.label(), scene.name, cell.sampler.spec, *spacing, name_steps(cell.steps), f"seed {scene.seed}"]
    return Drawing("One x_T, stronger and stronger guidance", [panel], " · ".join(how))
