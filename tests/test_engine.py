"""The engine: what a cell leaves behind, when it is run again, and what survives a failure."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_cell
from PIL import Image
from torch import Tensor, nn

from samplerbench import cli
from samplerbench.bench import engine
from samplerbench.errors import OutOfMemoryError, RunError
from samplerbench.metrics import Accumulator, Batch, Context, Metric
from samplerbench.metrics.extractors import Extractor
from samplerbench.models import Model
from samplerbench.results.seal import digest
from samplerbench.sampling import Denoiser, Noise, Sampler, Step

MakeSession = Callable[..., engine.Session]

KEYS = {
    "sampler", "parameters", "guidance", "spacing", "steps", "nfe", "n", "seed", "model", "metrics", "seconds",
    "images_per_second", "protocol", "versions",
}  # fmt: skip


def outcome_of(session: engine.Session, model: Model, sampler: str = "ddim", steps: int = 2) -> engine.Outcome:
    return engine.run_cell(session, make_cell(model, sampler, None, steps))


# --- A result and its reuse -----------------------------------------------------------------------------------------


def test_a_cell_leaves_a_record_and_a_grid(digits: Model, make_session: MakeSession) -> None:
    session = make_session(n=8)
    outcome = outcome_of(session, digits, "ddim:eta=0.5")
    key = outcome.record["protocol"]
    record = json.loads(session.execution.store.path(key).read_text("utf-8"))
    assert record.keys() >= KEYS
    assert record["sampler"] == "ddim:eta=0.5"
    assert record["parameters"] == {"eta": 0.5, "cfg_pp": False}
    assert (record["spacing"], record["steps"], record["nfe"], record["n"], record["seed"]) == ("leading", 2, 2, 8, 0)
    assert record["model"] == "digits"
    assert record["guidance"] is None
    assert record["metrics"]["fid"]["features"] == "digits-cnn"
    assert record["metrics"]["fid"]["reference"] == "digits (train, 1442)"
    assert math.isfinite(record["metrics"]["fid"]["value"])
    assert record["images_per_second"] == pytest.approx(8 / record["seconds"], rel=0.1)
    assert {"samplerbench", "torch"} <= record["versions"].keys()
    assert record["protocol"] == digest(record["protocol_fields"])
    with Image.open(session.execution.store.path(key, ".png")) as image:
        assert image.format == "PNG"


def test_a_result_is_used_again_unless_told_otherwise(digits: Model, make_session: MakeSession) -> None:
    first = outcome_of(make_session(), digits)
    again = outcome_of(make_session(), digits)
    assert (first.reused, again.reused) == (False, True)
    assert again.record["finished"] == first.record["finished"]
    assert again.record["metrics"] == first.record["metrics"]
    anew = outcome_of(make_session(rerun=True), digits)
    assert not anew.reused
    assert anew.record["metrics"] == first.record["metrics"]


def improve(file: Path) -> None:
    record = json.loads(file.read_text("utf-8"))
    record["metrics"]["fid"]["value"] /= 2
    file.write_text(json.dumps(record), "utf-8")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


@pytest.mark.parametrize("damage", [improve, truncate])
def test_a_result_that_was_edited_or_cut_is_run_again(
    digits: Model, make_session: MakeSession, damage: Callable[[Path], None]
) -> None:
    session = make_session()
    first = outcome_of(session, digits)
    file = session.execution.store.path(first.record["protocol"])
    damage(file)
    again = outcome_of(session, digits)
    assert not again.reused
    assert again.record["metrics"] == first.record["metrics"]
    assert json.loads(file.read_text("utf-8"))["metrics"] == first.record["metrics"]


def test_the_protocol_is_another_for_every_choice_that_changes_the_number(
    digits: Model, make_session: MakeSession
) -> None:
    def key(session: engine.Session, sampler: str, spacing: str | None, guidance: str = "none") -> str:
        return digest(session.measurement.protocol(make_cell(digits, sampler, spacing, 4, guidance)))

    base = key(make_session(), "ddim", "leading")
    assert key(make_session(batch_size=3), "ddim", None) == base  # neither changes an image
    single = dataclasses.replace(digits, dtype=torch.bfloat16)
    weights = dataclasses.replace(digits, identity=digits.identity | {"weights": "0" * 64})
    others = [
        key(make_session(n=9), "ddim", "leading"),
        key(make_session(seed=1), "ddim", "leading"),
        key(make_session(), "ddim:eta=0.5", "leading"),
        key(make_session(), "ddim", "trailing"),
        key(make_session(), "ddim", "leading:offset=1"),
        key(make_session(), "ddpm", "leading"),
        key(make_session(), "ddim", "leading", "cfg"),
        key(make_session(), "ddim", "leading", "classifier"),
        key(make_session(model=single), "ddim", "leading"),
        key(make_session(model=weights), "ddim", "leading"),
    ]
    assert len({base, *others}) == 1 + len(others)


# --- Failures -------------------------------------------------------------------------------------------------------


class Hungry(nn.Module):
    """A network for which there is not enough memory."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, *_: Any, **__: Any) -> Any:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["device", "cpu-allocator", "python"],
)
@pytest.mark.parametrize(("batch_size", "advice"), [(6, "try batch_size=3"), (1, "a single image does not fit")])
def test_out_of_memory_says_which_batch_size_to_try(
    digits: Model, make_session: MakeSession, error: BaseException, batch_size: int, advice: str
) -> None:
    model = dataclasses.replace(digits, network=Hungry(error))
    outcome = outcome_of(make_session(model=model, batch_size=batch_size), model)
    assert isinstance(outcome.error, OutOfMemoryError)
    assert outcome.error.exit_code == 2
    assert outcome.record["error"].startswith(f"the device has not enough memory for a batch of {batch_size}; {advice}")
    assert "\n" not in outcome.record["error"]


def test_out_of_memory_in_the_features_is_that_too(
    digits: Model, extractor: Extractor, make_session: MakeSession
) -> None:
    hungry = dataclasses.replace(extractor, module=Hungry(torch.OutOfMemoryError("CUDA out of memory.")))
    session = make_session(batch_size=4)
    session.measurement.extractor = hungry
    outcome = outcome_of(session, digits)
    assert isinstance(outcome.error, OutOfMemoryError)
    assert "try batch_size=2" in outcome.record["error"]


def test_another_runtime_error_is_no_lack_of_memory(digits: Model, make_session: MakeSession) -> None:
    model = dataclasses.replace(digits, network=Hungry(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    outcome = outcome_of(make_session(model=model), model)
    assert type(outcome.error) is RunError
    assert "in step 1 of 2: mat1 and mat2 shapes cannot be multiplied" in outcome.record["error"]


def test_a_failed_cell_keeps_no_result_and_no_memory(digits: Model, make_session: MakeSession) -> None:
    states: list[weakref.ref[Tensor]] = []

    @dataclass(frozen=True)
    class Failing(Sampler):
        def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
            mine = x + 1
            states.extend([weakref.ref(x), weakref.ref(mine)])
            yield Step(1.0, mine)
            raise ValueError("a fault")

    session = make_session()
    cell = dataclasses.replace(make_cell(digits, "ddim", None, 2), method=Failing())
    outcome = engine.run_cell(session, cell)
    assert isinstance(outcome.error, RunError)
    assert [f.name for f in session.execution.store.folder.iterdir()] == [".locks"]
    gc.collect()
    assert [state() for state in states] == [None, None]


# --- The commands ---------------------------------------------------------------------------------------------------

TOYS = """
from dataclasses import dataclass
from samplerbench.sampling import Sampler, Step, intervals


@dataclass(frozen=True)
class Sound(Sampler):
    def steps(self, denoise, x, sigmas, noise):
        for s, t in intervals(sigmas):
            x = denoise(x, s)
            yield Step(t, x)


@dataclass(frozen=True)
class Broken(Sampler):
    def steps(self, denoise, x, sigmas, noise):
        yield Step(float(sigmas[1]), x)
        raise ValueError("two words")


@dataclass(frozen=True)
class Interrupted(Sampler):
    def steps(self, denoise, x, sigmas, noise):
        yield Step(float(sigmas[1]), x)
        raise KeyboardInterrupt
"""


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third party's distribution with the samplers toy-sound, toy-broken and toy-interrupted."""
    site = tmp_path / "site"
    meta = site / "toys-1.0.dist-info"
    meta.mkdir(parents=True)
    (site / "samplerbench_toys.py").write_text(TOYS)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    names = ("Sound", "Broken", "Interrupted")
    points = "".join(f"toy-{name.lower()} = samplerbench_toys:{name}\n" for name in names)
    (meta / "entry_points.txt").write_text(f"[samplerbench.samplers]\n{points}")
    monkeypatch.syspath_prepend(site)


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.usefixtures("toys")
def test_a_cell_that_fails_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    samplers = ("--sampler", "toy-sound", "--sampler", "toy-broken", "--sampler", "ddim")
    code = command("run", *samplers, "--steps", "3", "--n", "8", "--out", str(out), "--json")
    assert code == 1
    sound, broken, ddim = json.loads(capsys.readouterr().out)
    assert broken["error"] == "sampler toy-broken raised ValueError in step 2 of 3: two words"
    assert broken["metrics"] == {}
    kept = {json.loads(file.read_text("utf-8"))["sampler"] for file in out.glob("*.json")}
    assert kept == {sound["sampler"], ddim["sampler"]} == {"toy-sound", "ddim"}
    assert sound["nfe"] == 3


@pytest.mark.usefixtures("toys")
def test_ctrl_c_keeps_the_cells_that_are_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    samplers = ("--sampler", "ddim", "--sampler", "toy-interrupted", "--sampler", "ddpm")
    code = command("run", *samplers, "--steps", "2", "--n", "8", "--out", str(out), "--json")
    assert code == 130
    captured = capsys.readouterr()
    assert [record["sampler"] for record in json.loads(captured.out)] == ["ddim"]
    assert f"stopped; 1 of 3 cells are done and kept in {out}/." in captured.err
    (file,) = out.glob("*.json")
    assert json.loads(file.read_text("utf-8"))["sampler"] == "ddim"
    assert not list(out.glob(".*.tmp"))  # no temporary file


def test_json_is_all_that_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("--sampler", "ddim", "--sampler", "ddim:eta=1", "--steps", "1,2", "--n", "8", "--seed", "5")
    assert command("run", *arguments, "--out", str(tmp_path), "--json") == 0
    records = json.loads(capfd.readouterr().out)
    assert [(r["sampler"], r["steps"]) for r in records] == [
        ("ddim", 1), ("ddim", 2), ("ddim:eta=1", 1), ("ddim:eta=1", 2),
    ]  # fmt: skip
    for record in records:
        assert record.keys() >= KEYS
        assert record["seed"] == 5
        assert record["metrics"]["fid"].keys() >= {"value", "features", "reference"}
        assert len(record["protocol"]) == 64


def test_sample_writes_the_same_pixels_everywhere(
    tmp_path: Path, digits: Model, labels: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, folder, npz = tmp_path / "grid.png", tmp_path / "numbered", tmp_path / "images.npz"
    outputs = ("--png-dir", str(folder), "--npz", str(npz))
    assert command("sample", str(grid), "--sampler", "ddim", "--steps", "3", "--n", "5", *outputs) == 0
    assert capsys.readouterr().out.strip() == str(grid)

    with np.load(npz) as file:
        images, given = file["images"], file["labels"]
    assert (images.shape, images.dtype) == ((5, 8, 8, 1), np.uint8)
    np.testing.assert_array_equal(given, labels[:5])
    assert sorted(file.name for file in folder.iterdir()) == [f"{i:06d}.png" for i in range(5)]
    sheet = np.asarray(Image.open(grid))
    zoom, gap, columns = 4, 2, 3  # the least side is 32 pixels, and 5 images make rows of 3
    assert sheet.shape == (2 * (8 * zoom + gap) + gap, columns * (8 * zoom + gap) + gap)
    for i, image in enumerate(images[..., 0]):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / f"{i:06d}.png")), image)
        top, left = (gap + place * (8 * zoom + gap) for place in divmod(i, columns))
        shown = sheet[top : top + 8 * zoom, left : left + 8 * zoom]
        np.testing.assert_array_equal(shown, image.repeat(zoom, 0).repeat(zoom, 1))


def test_a_metric_that_raises_is_one_line_for_the_cell(digits: Model, make_session: MakeSession) -> None:
    class Broken(Accumulator):
        def update(self, batch: Batch) -> None:
            raise ZeroDivisionError("a fault in the metric")

        def result(self) -> dict[str, Any]:
            return {"value": 0.0}

        def state(self) -> dict[str, Tensor]:
            return {}

        def merge(self, state: dict[str, Tensor]) -> None:
            return

    @dataclass(frozen=True)
    class Mine(Metric):
        """A metric with a fault."""

        def start(self, context: Context) -> Accumulator:
            return Broken()

    session = make_session()
    session.measurement.metrics = [Mine()]
    outcome = engine.run_cell(session, make_cell(digits, "ddim", None, 1))
    assert isinstance(outcome.error, RunError)
    assert str(outcome.error) == "metric Mine raised ZeroDivisionError in update: a fault in the metric"
