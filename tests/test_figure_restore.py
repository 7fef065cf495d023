"""The figure of restorations: what each column is made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from samplerbench.cli.figure import Canvas
from samplerbench.data.pixels import dequantise, quantise
from samplerbench.errors import UserError
from samplerbench.figures.restore import restorations, still
from samplerbench.figures.scene import Scene
from samplerbench.models.exact import exact
from samplerbench.registry import parse
from samplerbench.sampling import Inputs, Observation

CANVAS = Canvas(Path("figure.png"), {"model": "exact:mixture", "dtype": "fp64"}, 3, 5, 4, "cpu")


def scene(
    task: str, guidances: tuple[str, ...], samples: int, canvas: Canvas = CANVAS, data: str | None = None
) -> Scene:
    return canvas.restoring(["ddim"], 4, guidances, None, task, samples, data)


def test_the_columns_are_truth_observation_restorations_and_spreads() -> None:
    seen = scene("inpaint:mask=half,sigma=0", ("ddnm", "none"), 6)
    restored = restorations(seen, 6)
    model = exact("mixture")
    assert torch.equal(restored.truth, quantise(model.real(3)[0]))
    assert torch.equal(restored.observed[..., :4], restored.truth[..., :4])
    assert bool((restored.observed[..., 4:] == 128).all())  # a missing pixel is 0
    # Without noise, ddnm returns the observed half, and the samples differ only in the other one.
    assert torch.equal(restored.images[0, ..., :4], restored.truth[..., :4])
    assert restored.spread is not None
    assert float(restored.spread[0, ..., :4].max()) == 0
    assert float(restored.spread[0, ..., 4:].min()) > 0
    assert restored.images.shape == (2, 3, 1, 8, 8)
    drawing = still(seen, restored)
    (panel,) = drawing.panels
    assert list(panel.columns) == ["truth", "observation", "ddnm", "none", "spread\nddnm", "spread\nnone"]
    assert list(panel.rows) == ["image 0", "image 1", "image 2"]
    # White is the largest spread of all methods.
    assert int(panel.images[:, 4:].max()) == 255
    largest = float(restored.spread.max())
    assert f"white is {largest:.2g}" in drawing.note
    expected = (restored.spread[1, 2] / largest * 255).round().to(torch.uint8)
    assert torch.equal(panel.images[2, 5, 0], expected)


def test_the_samples_are_those_of_a_run() -> None:
    """Sample i of a run with images=3 observes image i mod 3; the spread is over samples i, i + 3, …"""
    from samplerbench.bench.generate import generate
    from samplerbench.bench.prepare import make_session, measure_reference, prepare
    from samplerbench.bench.request import Request, one_grid
    from samplerbench.results.store import Store

    seen = scene("blur:sigma=0.2", ("exact",), 4)
    restored = restorations(seen, 4)
    grid = one_grid(["ddim"], [4], guidances=["exact"])
    tasks = ["blur:sigma=0.2,images=3"]
    request = Request([grid], model="exact:mixture", dtype="fp64", n=12, metrics=["psnr"], tasks=tasks)
    prepared = prepare(request, "cpu")
    session = make_session(prepared, measure_reference(prepared), 5, Store(Path("unused")), task=prepared.tasks[0])
    measurement = session.measurement
    batches = generate(measurement.model, prepared.cells[0], torch.arange(12), measurement.inputs, 5, 12)
    images = quantise(torch.cat([batch.images for batch in batches]))
    assert torch.equal(images[:3], restored.images[0])
    deviation = dequantise(images).unflatten(0, (4, 3)).std(dim=0).mean(dim=1)
    torch.testing.assert_close(restored.spread, deviation[None])


def test_one_sample_has_no_spread() -> None:
    seen = scene("denoise", ("diffpir",), 1)
    restored = restorations(seen, 1)
    assert restored.spread is None
    assert list(still(seen, restored).panels[0].columns) == ["truth", "observation", "diffpir"]


def picture(task: str, shape: str = "1x8x8") -> tuple[Tensor, Observation]:
    plain = exact("gaussian", shape=shape)
    model = plain.observed(parse("task", task), plain.real(2)[0])
    assert model.observation is not None
    y = model.inputs(torch.arange(2), Inputs(2)).tensors["observation"]
    return model.observation.picture(y), model.observation


def test_an_observation_is_shown_in_the_space_of_images() -> None:
    shown, observation = picture("super-resolution:factor=2,filter=average,sigma=0")
    blocks = observation.images.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    torch.testing.assert_close(shown, blocks.repeat_interleave(2, 2).repeat_interleave(2, 3))
    shown, observation = picture("colourise:sigma=0", "3x4x4")
    torch.testing.assert_close(shown, observation.images.mean(1, keepdim=True).expand(-1, 3, -1, -1))
    shown, observation = picture("compressed-sensing:rate=1,sigma=0")
    torch.testing.assert_close(shown, observation.images)  # A⁺ A = I
    shown, observation = picture("clip:gain=3,sigma=0")
    assert torch.equal(shown, (3 * observation.images).clamp(-1, 1))


@pytest.mark.parametrize(
    ("task", "n", "says"),
    [
        ("inpaint:images=2", 3, r"task=\"inpaint:images=2\": the figure has 3 images; remove images from the task"),
        ("inpaint:size=9", 3, "a box of 9x9 pixels does not fit into images of 8x8"),
    ],
)
def test_a_task_that_does_not_fit_the_figure_is_refused(task: str, n: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        restorations(scene(task, ("ddnm",), 2, replace(CANVAS, n=n)), 2)


@pytest.mark.slow
def test_more_rows_than_images_are_refused() -> None:
    canvas = replace(CANVAS, request={"model": "digits"}, n=400)
    with pytest.raises(UserError, match="n=400: there are only 355 real images"):
        restorations(scene("denoise", ("ddnm",), 1, canvas, "digits:split=held-out"), 1)
