"""The notebooks in examples/: they run from top to bottom, and are committed without outputs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SMALL = "6"
"""Images per cell of a table."""


def cells(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text("utf-8"))["cells"]


def test_there_are_three() -> None:
    assert [file.name for file in NOTEBOOKS] == [
        "01_first_table.ipynb",
        "02_my_sampler.ipynb",
        "03_my_checkpoint.ipynb",
    ]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_committed_without_outputs(notebook: Path) -> None:
    """No image, no number of an execution, and nothing of the machine it was written on."""
    for cell in cells(notebook):
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
        assert "attachments" not in cell
    metadata = json.loads(notebook.read_text("utf-8"))["metadata"]
    assert metadata["language_info"] == {"name": "python"}
    assert metadata["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_says_what_to_install_and_shows_how_it_is_made_small(notebook: Path) -> None:
    first, code, *rest = ("".join(cell["source"]) for cell in cells(notebook))
    assert "pip install 'samplerbench[notebook]'" in first
    assert 'N = int(os.environ.get("SAMPLERBENCH_EXAMPLE_N", 500))' in code
    assert any("n=N" in text for text in rest)


def test_links_between_notebooks_lead_somewhere() -> None:
    for notebook in NOTEBOOKS:
        for cell in cells(notebook):
            for link in re.findall(r"\]\(([^)#]+)\)", "".join(cell["source"])):
                assert (notebook.parent / link).exists(), f"{notebook.name}: {link}"


def shown(cell: Any) -> dict[str, Any]:
    """The data of everything that an executed cell shows, by type."""
    found: dict[str, Any] = {}
    for output in cell.outputs:
        found |= output.get("data", {})
        found["text"] = found.get("text", "") + output.get("text", "")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom in an empty folder; its tables, figures and pictures are shown."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("SAMPLERBENCH_EXAMPLE_N", SMALL)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    folder = tmp_path / "work"
    folder.mkdir()
    book = nbformat.read(notebook, as_version=4)
    nbformat.validate(book)
    client = nbclient.NotebookClient(
        book, timeout=400, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})
    values = {
        "".join(cell.source).strip().splitlines()[-1]: shown(cell) for cell in book.cells if cell.cell_type == "code"
    }
    assert "FID" in values["results"]["text/html"]
    assert "DiffusersUNet" in values.get("model", {"text/plain": "DiffusersUNet"})["text/plain"]
    assert all("image/png" in value for line, value in values.items() if line.startswith(("show(", "results.figure")))
    text = "".join(value.get("text", "") for value in values.values())
    assert "FAILED" not in text
    if match := re.search(r"largest difference: (\S+)", text):
        assert float(match[1]) < 1e-4
    assert (notebook.stem != "03_my_checkpoint") or match is not None
    errors = re.findall(r"steps: Euler ([\d.]+), Ahead ([\d.]+), dpm\+\+ ([\d.]+)", text)
    assert all(ahead == dpm for _, ahead, dpm in errors)  # as the notebook says
    assert len(errors) == (4 if notebook.stem == "02_my_sampler" else 0)
    assert list(folder.iterdir()) == []
