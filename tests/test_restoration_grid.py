"""The grid of a cell with a task: truths, observations and restored images; and the gallery on the report's page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import Image
from support.synthetic_results import put, record

import samplerbench
from samplerbench.data.pixels import quantise
from samplerbench.errors import RunError
from samplerbench.models.exact import exact
from samplerbench.report.html import page
from samplerbench.report.load import load
from samplerbench.report.sheet import rows_of, tiles
from samplerbench.results.groups import group

TASK = "inpaint:mask=half,sigma=0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five restorations by two methods: two lines of the grid, of which the second has a white image."""
    made = tmp_path_factory.mktemp("grids")
    how: dict[str, Any] = {"steps": 2, "n": 5, "model": "exact:mixture", "metrics": "psnr", "quiet": True}
    samplerbench.evaluate("ddim", guidances=["ddnm", "none"], tasks=TASK, out=made, **how)
    return made


def array(image: Image) -> np.ndarray:
    return np.asarray(image)[::4, ::4]  # images of 8 x 8 pixels are enlarged to 32 x 32


def test_the_grid_has_truth_observation_and_restored_image_of_each_sample(folder: Path) -> None:
    found = load(folder)
    truth = quantise(exact("mixture").real(5)[0])[:, 0].numpy()
    for one in found.records:
        assert one["shown"] == {"images": 5, "rows": ["truth", "observation", "restored"]}
        rows = {row: tiles(found.pictures[one["protocol"]], one, 100, row) for row in rows_of(one)}
        assert [len(images) for images in rows.values()] == [5, 5, 5]
        for i in range(5):
            assert np.array_equal(array(rows["truth"][i]), truth[i])
            seen = array(rows["observation"][i])
            assert np.array_equal(seen[:, :4], truth[i][:, :4])
            assert bool((seen[:, 4:] == 128).all())
            restored = array(rows["restored"][i])
            assert not np.array_equal(restored[:, 4:], truth[i][:, 4:])
            # Without noise, ddnm keeps the observed half.
            assert np.array_equal(restored[:, :4], truth[i][:, :4]) == (one["guidance"] == "ddnm")


def test_a_resumed_cell_writes_the_same_grid(tmp_path: Path) -> None:
    from samplerbench.bench.prepare import prepare
    from samplerbench.bench.request import Request, one_grid
    from samplerbench.bench.run import Observer, Run
    from samplerbench.errors import Stopped
    from samplerbench.results.store import Store

    grid = one_grid(["ddim:eta=1"], [3], guidances=["diffpir"])
    request = Request([grid], model="exact:mixture", n=8, batch_size=4, metrics=["psnr"], tasks=["blur"])

    class Once(Observer):
        def stop(self) -> bool:
            return True

    files = []
    for name in ("whole", "parts"):
        if name == "parts":
            with pytest.raises(Stopped):
                Run(prepare(request, "cpu"), Store(tmp_path / name)).run(Once())
        Run(prepare(request, "cpu"), Store(tmp_path / name)).run()
        (file,) = (tmp_path / name).glob("*.png")
        files.append(file.read_bytes())
    assert files[0] == files[1]


def test_the_page_has_a_gallery_of_restorations(folder: Path, tmp_path: Path) -> None:
    found = load(folder)
    text = page(group(found.records), [], found.pictures)
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    data = json.loads(match[1])
    keys = {one["protocol"] for one in found.records}
    assert set(data["restored"]) == keys
    (samples,) = data["same"]
    assert len(samples) == 4
    for sample in samples:
        assert set(sample["tiles"]) == keys
        assert sample["truth"] != sample["observation"]
        assert sample["truth"].startswith("data:image/png")
    assert len({sample["truth"] for sample in samples}) == 4
    # The picture of a cell has three rows of four images, whose sides and gaps are those of the grid.
    assert _size(data["pictures"][keys.pop()]) == (4 * 34 - 2, 3 * 34 - 2)


def _size(uri: str) -> tuple[int, int]:
    import base64
    import io

    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as image:
        return image.size


def test_a_result_with_other_rows_is_not_recorded(tmp_path: Path) -> None:
    put(tmp_path, record(shown={"images": 9, "rows": ["truth", "observation", "restored"]}))
    for rows in (["truth", "truth", "restored"], ["truth"], []):
        with pytest.raises(RunError, match="rows must be truth, observation and restored"):
            put(tmp_path, record("heun", shown={"images": 9, "rows": rows}))


def test_a_grid_of_large_images_has_a_third_of_the_samples() -> None:
    from samplerbench import registry
    from samplerbench.bench.cell_grid import images_in_grid

    model = exact("gaussian", shape="1x512x512")
    observed = model.observed(registry.parse("task", "denoise"), torch.zeros(1, 1, 512, 512))
    assert (images_in_grid(100, model), images_in_grid(100, observed)) == (64, 21)
