"""The Python API: what the commands do, without the command line."""

import builtins
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import samplerbench
from samplerbench import notebook, registry
from samplerbench.api import Results
from samplerbench.cli.app import main
from samplerbench.errors import RunError, UserError
from samplerbench.models import Model
from samplerbench.sampling import Sampler, Step, intervals


@dataclass(frozen=True)
class Jump(Sampler):
    """x ← D at every level (this work)."""

    def steps(self, denoise, x, sigmas, noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            x = denoise(x, s)
            yield Step(t, x, x)


@dataclass(frozen=True)
class Thrice(Jump):
    """x ← D three times at every level (this work)."""

    def nfe(self, steps: int) -> int:
        return 3 * steps

    def steps(self, denoise, x, sigmas, noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            x = denoise(denoise(denoise(x, s), s), s)
            yield Step(t, x, x)


@dataclass(frozen=True)
class Failing(Sampler):
    """It fails (this work)."""

    def steps(self, denoise, x, sigmas, noise) -> Iterator[Step]:
        raise RuntimeError("no luck")
        yield


@pytest.fixture(scope="module")
def gaussian() -> Model:
    return samplerbench.load_model("exact:gaussian", device="cpu")


@pytest.fixture(scope="module")
def measured(digits: Model) -> Results:
    """Two samplers at two budgets, and one whose one step costs more than the smaller."""
    samplers = ["ddim", Jump(), Thrice()]
    metrics = ["fid", "inception-score"]
    return samplerbench.evaluate(samplers, nfe=[2, 4], model=digits, metrics=metrics, n=20, blocks=2, quiet=True)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import samplerbench, sys; dir(samplerbench); assert 'torch' not in sys.modules; samplerbench.sample"
    code += "\nassert 'torch' in sys.modules\nassert 'evaluate' in dir(samplerbench)\nsamplerbench.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.stderr.strip().endswith("AttributeError: module 'samplerbench' has no attribute 'nothing'")


# --- sample --------------------------------------------------------------------------------------------------------


def test_sample_gives_the_images_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.chdir(tmp_path)
    words = "sample a.png -s ddim:eta=1 --steps 2 --n 3 --model exact:gaussian --npz a.npz --device cpu"
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert not ended.value.code
    images = samplerbench.sample("ddim:eta=1", 2, n=3, model="exact:gaussian", device="cpu", quiet=True)
    assert images.dtype == torch.uint8
    assert images.permute(0, 2, 3, 1).numpy().tolist() == np.load("a.npz")["images"].tolist()


def test_an_image_is_a_function_of_its_number_alone(gaussian: Model) -> None:
    more = samplerbench.sample("ddpm", 2, n=5, model=gaussian, batch_size=2, quiet=True)
    assert more.shape == (5, 1, 8, 8)
    assert torch.equal(more[:2], samplerbench.sample("ddpm", 2, n=2, model=gaussian, quiet=True))
    assert not torch.equal(more, samplerbench.sample("ddpm", 2, n=5, model=gaussian, seed=1, quiet=True))


def test_sample_takes_instances(gaussian: Model) -> None:
    """One jump from the first level is D of the prior, whatever the spacing between."""
    spacing = registry.parse("spacing", "karras")
    images = samplerbench.sample(Jump(), 1, n=2, model=gaussian, spacing=spacing, quiet=True)
    assert torch.equal(images, samplerbench.sample("ddim", 1, n=2, model=gaussian, spacing="karras", quiet=True))


def test_labels_and_guidance_reach_the_model() -> None:
    model = samplerbench.load_model("exact:mixture", device="cpu")
    given = {"steps": 2, "n": 4, "model": model, "quiet": True}
    one = samplerbench.sample("ddim", labels=1, guidance="cfg:scale=3", **given)
    assert torch.equal(
        one, samplerbench.sample("ddim", labels="1", guidance=registry.parse("guidance", "cfg:scale=3"), **given)
    )
    assert not torch.equal(one, samplerbench.sample("ddim", labels=0, guidance="cfg:scale=3", **given))
    assert not torch.equal(one, samplerbench.sample("ddim", labels=1, **given))


def test_progress_is_told_unless_quiet(digits: Model, capsys: pytest.CaptureFixture[str]) -> None:
    for quiet, lines in ((True, 0), (False, 1)):
        samplerbench.evaluate("ddim", steps=1, model=digits, n=2, quiet=quiet)
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("ddim, 1 steps") == lines


def test_in_a_notebook_there_are_bars_for_the_cells_and_for_the_one_at_work(
    digits: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failed cell says why below them; quiet, nothing is said."""
    asked = {"steps": 2, "n": 3, "model": digits}
    monkeypatch.setattr(notebook, "in_notebook", lambda: True)
    samplerbench.evaluate(["ddim", "ddpm:variance=learned"], **asked)
    out, err = capsys.readouterr()
    assert "cells: 100%" in err
    assert "ddim, 2 steps: " in err
    assert "ddpm:variance=learned, 2 steps: failed: sampler ddpm: the model learned no variance" in out
    samplerbench.sample("ddim", 2, n=3, model=digits)
    assert re.search(r"ddim, 2 steps: 100%.* 2/2 .*\d+ images/s", capsys.readouterr().err)
    samplerbench.evaluate("ddim", quiet=True, **asked)
    assert capsys.readouterr() == ("", "")


def test_a_notebook_shows_the_table(measured: Results) -> None:
    """As the value of a cell, of the results and of their table alike."""
    for value in (measured, measured.table("fid")):
        shown = value._repr_mimebundle_([], [])
        assert "ddim" in shown["text/html"]
        assert "sampler" in shown["text/plain"]


def test_a_notebook_is_known_by_its_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """As rich knows it: by the class of IPython's shell."""
    assert not notebook.in_notebook()
    shell = type("ZMQInteractiveShell", (), {"__module__": "ipykernel.zmqshell"})()
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    assert notebook.in_notebook()


# --- evaluate ------------------------------------------------------------------------------------------------------


def test_records_are_one_per_cell_and_those_of_the_command(
    measured: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [(r["sampler"], r["steps"], r["nfe"]) for r in measured if "unmet" not in r]
    assert cells == [("ddim", 2, 2), ("ddim", 4, 4), ("Jump", 2, 2), ("Jump", 4, 4), ("Thrice", 1, 3)]
    assert [r["sampler"] for r in measured if "unmet" in r] == ["Thrice"]
    monkeypatch.chdir(tmp_path)
    words = "run -s ddim --nfe 2,4 --metric fid --metric inception-score --n 20 --blocks 2 --device cpu --json"
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert not ended.value.code
    for mine, theirs in zip(measured[:2], json.loads(capsys.readouterr().out), strict=True):
        assert mine["protocol"] == theirs["protocol"]
        assert mine["metrics"] == theirs["metrics"]


def test_results_are_a_sequence(measured: Results) -> None:
    assert measured[0] is measured.records[0]
    assert isinstance(measured[1:3], Results)
    assert list(measured) == measured.records
    assert measured.metrics == ["fid", "inception-score"]
    assert repr(measured) == "Results(6 cells: fid, inception-score)"


def test_the_table_is_the_terminal_s(measured: Results) -> None:
    for shown, name in ((measured, "FID"), (measured.table("inception-score"), "Inception score")):
        console = Console(width=120, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        console.print(shown)
        text = console.export_text()
        assert text.startswith(name)
        assert "ddim" in text
        assert "unmet" in text


def test_the_figure_has_a_line_for_each_sampler(measured: Results) -> None:
    for horizontal in ("nfe", "steps", "seconds_per_image"):
        (axes,) = measured.figure("fid", horizontal).axes  # type: ignore[arg-type]
        lines = {str(line.get_label()): line for line in axes.lines}
        assert {"ddim", "Jump"} <= set(lines)
    (axes,) = measured.figure("inception-score", "steps").axes
    (ddim,) = (line for line in axes.lines if line.get_label() == "ddim")
    assert list(ddim.get_xdata()) == [2, 4]
    assert list(ddim.get_ydata()) == [r["metrics"]["inception-score"]["value"] for r in measured[:2]]


def test_a_data_frame_has_a_row_per_cell(measured: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    frame = measured.to_pandas()
    assert len(frame) == 6
    assert frame["fid"][0] == measured[0]["metrics"]["fid"]["value"]
    assert frame["fid_sd"][0] == measured[0]["metrics"]["fid"]["sd"]
    assert frame["sampler"].tolist() == [r["sampler"] for r in measured]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="to_pandas needs pandas"):
        measured.to_pandas()


def test_a_folder_of_results_is_taken_up_again(digits: Model, tmp_path: Path) -> None:
    (first,) = samplerbench.evaluate("ddim", steps=1, model=digits, n=2, out=tmp_path, quiet=True)
    file = next(tmp_path.glob("*.json"))
    written = file.stat().st_mtime_ns
    (again,) = samplerbench.evaluate("ddim", steps=1, model=digits, n=2, out=str(tmp_path), quiet=True)
    assert file.stat().st_mtime_ns == written
    assert again["finished"] == first["finished"]
    samplerbench.evaluate("ddim", steps=1, model=digits, n=2, out=tmp_path, rerun=True, quiet=True)
    assert file.stat().st_mtime_ns > written


def test_a_cell_that_fails_is_a_record_unless_all_do(digits: Model) -> None:
    found = samplerbench.evaluate([Failing(), "ddim"], steps=1, model=digits, n=2, quiet=True)
    assert "no luck" in found[0]["error"]
    assert found[0]["metrics"] == {}
    assert found.metrics == ["fid"]
    with pytest.raises(RunError, match="no luck"):
        samplerbench.evaluate(Failing(), steps=1, model=digits, n=2, quiet=True)


def test_a_class_without_a_file_keeps_no_results(digits: Model, tmp_path: Path) -> None:
    space: dict[str, Any] = {"__name__": "a_prompt"}
    source = (
        "from dataclasses import dataclass\nfrom samplerbench.sampling import Sampler, Step\n@dataclass(frozen=True)\n"
    )
    source += "class Prompt(Sampler):\n    def steps(self, denoise, x, sigmas, noise):\n        yield Step(0.0, x)\n"
    sys.modules["a_prompt"] = type(sys)("a_prompt")
    try:
        exec(source, space)
        given: dict[str, Any] = {"steps": 1, "model": digits, "n": 2, "quiet": True}
        assert len(samplerbench.evaluate(space["Prompt"](), **given)) == 1
        with pytest.raises(UserError, match="the sampler Prompt has no source file"):
            samplerbench.evaluate(space["Prompt"](), out=tmp_path, **given)
    finally:
        del sys.modules["a_prompt"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"samplers": []}, "name a sampler"),
        ({"samplers": "ddmi"}, 'no sampler "ddmi". Did you mean "ddim"?'),
        ({"samplers": "ddim", "steps": 5, "nfe": 5}, "`steps` and `nfe` cannot both"),
        ({"samplers": "ddim", "steps": 0}, "steps=0: at least 1 step is needed"),
        ({"samplers": "ddim", "nfe": [2, 2.5]}, "nfe=2.5: give a whole number of at least 1"),
        ({"samplers": "ddim", "n": 0}, "n=0: at least 1 image is needed"),
        ({"samplers": registry.parse("spacing", "karras")}, "karras is a spacing, but a sampler is required here."),
        ({"samplers": "ddim", "metrics": "fidd"}, 'no metric "fidd"'),
        ({"samplers": "ddim", "model": "exact:gaussian", "labels": 3}, "the model has no classes"),
    ],
)
def test_bad_input_is_one_line(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        samplerbench.evaluate(**given)
    assert reason in str(caught.value)


def test_a_metric_that_is_not_there_is_named(measured: Results) -> None:
    with pytest.raises(UserError, match='there is no metric "kid" in these results; they contain fid, inception-score'):
        measured.table("kid")
    with pytest.raises(UserError, match="these results contain no metrics"):
        Results([]).figure()
