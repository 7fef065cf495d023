"""A checkpoint that is not what was written for this cell is set aside, and the cell ends as if there were none."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from samplerbench.assets import asset
from samplerbench.bench import engine, prepare, request
from samplerbench.errors import RunError, Stopped, UserError
from samplerbench.metrics import Moments, Reference
from samplerbench.metrics.reference import load_reference
from samplerbench.results.files import set_aside
from samplerbench.results.partial import PARTIAL, Extent, Progress, load_partial, save_partial
from samplerbench.results.store import Store
from samplerbench.results.tensors import load_tensors, save_tensors
from samplerbench.sampling.cost import Cost
from samplerbench.tensor_seal import DamagedError, content_digest
from samplerbench.training.loop import TrainResult, _load_checkpoint, _save_checkpoint

KEY = "5a" * 32
EXTENT = Extent(metrics=2, n=10, blocks=3, image_shape=(1, 2, 2), keep=4)
AT = Progress(block=1, done=4, results=[[{"value": 3.5}, {}]], cost=Cost(network=12))
STATES = [{"n": torch.tensor([4]), "mean": torch.arange(3.0, dtype=torch.float64)}, {}]
SHOWN = torch.arange(8, dtype=torch.uint8).reshape(2, 1, 2, 2)


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    file = tmp_path / f"{KEY[:20]}{PARTIAL}"
    save_partial(file, KEY, AT, STATES, SHOWN)
    return file


# --- The file -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was_written(partial: Path) -> None:
    found = load_partial(partial, KEY, EXTENT)
    assert found is not None
    assert found.progress == AT
    assert torch.equal(found.shown, SHOWN)
    assert found.states[1] == {}
    assert all(torch.equal(found.states[0][name], STATES[0][name]) for name in ("n", "mean"))
    assert load_partial(partial.with_name("other"), KEY, EXTENT) is None


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_no_single_flipped_bit_is_accepted(partial: Path, every: int) -> None:
    """Every bit of the file, header and all; of the quick test every eleventh."""
    whole = partial.read_bytes()
    for place in range(0, 8 * len(whole), every):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        partial.write_bytes(damaged)
        with pytest.raises(DamagedError):
            load_partial(partial, KEY, EXTENT)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, -1])
def test_a_cut_checkpoint_is_not_accepted(partial: Path, size: int) -> None:
    partial.write_bytes(partial.read_bytes()[:size])
    with pytest.raises(DamagedError):
        load_partial(partial, KEY, EXTENT)


def test_a_checkpoint_of_another_cell_is_not_accepted(partial: Path) -> None:
    with pytest.raises(DamagedError, match="another cell"):
        load_partial(partial, "5b" * 32, EXTENT)


def test_a_checkpoint_without_a_digest_is_not_accepted(partial: Path) -> None:
    found = load_tensors(partial)
    save_file(found.tensors, partial, found.metadata)
    with pytest.raises(DamagedError, match="no digest"):
        load_partial(partial, KEY, EXTENT)


@pytest.mark.parametrize(
    "change",
    [
        {"block": 3},
        {"block": -1},
        {"block": 0},
        {"block": 2},
        {"block": True},
        {"block": 1.0},
        {"done": 10},
        {"done": -1},
        {"done": "4"},
        {"done": 10**40},
        {"resumed": None},
        {"results": []},
        {"results": [[{"value": 3.5}]]},
        {"results": [[{"value": "3.5"}, {}]]},
        {"results": [[{"value": True}, {}]]},
        {"results": {"0": 1}},
        {"cost": {}},
        {"cost": asdict(Cost()) | {"network": -1}},
        {"cost": asdict(Cost()) | {"network": 1.5}},
        {"seconds": {"sampling": float("nan"), "decoding": 0.0, "measuring": 0.0}},
        {"seconds": None},
        {"mixed": 0},
        {"conditions": []},
        {"more": 1},
    ],
    ids=str,
)
def test_progress_out_of_range_is_not_accepted_even_if_sealed(partial: Path, change: dict[str, Any]) -> None:
    found = load_tensors(partial)
    progress = json.loads(found.metadata["progress"]) | change
    save_tensors(partial, found.tensors, found.metadata | {"progress": json.dumps(progress)})
    with pytest.raises(DamagedError):
        load_partial(partial, KEY, EXTENT)


@pytest.mark.parametrize("text", ["", "null", "[]", "{", '{"block": 1}', "[" * 100_000])
def test_progress_that_cannot_be_read_is_not_accepted(partial: Path, text: str) -> None:
    found = load_tensors(partial)
    save_tensors(partial, found.tensors, found.metadata | {"progress": text})
    with pytest.raises(DamagedError, match="progress"):
        load_partial(partial, KEY, EXTENT)


@pytest.mark.parametrize(
    "tensors",
    [
        {"shown": SHOWN.float()},
        {"shown": SHOWN.reshape(1, 2, 2, 2)},
        {"shown": SHOWN.repeat(3, 1, 1, 1)},
        {"2.n": SHOWN},
        {"-1.n": SHOWN},
        {"x": SHOWN},
        {"0.": SHOWN},
        {"9" * 5000 + ".n": SHOWN},
    ],
    ids=lambda t: next(iter(t))[:9],
)
def test_tensors_that_do_not_fit_the_cell_are_not_accepted(partial: Path, tensors: dict[str, torch.Tensor]) -> None:
    found = load_tensors(partial)
    save_tensors(partial, found.tensors | tensors, found.metadata)
    with pytest.raises(DamagedError):
        load_partial(partial, KEY, EXTENT)


def test_the_digest_depends_on_names_dtypes_shapes_bytes_and_metadata_and_not_on_the_order() -> None:
    x, y = torch.zeros(4), torch.ones(4)
    of = content_digest({"x": x, "y": y}, {"a": "1", "b": "2"})
    assert of == content_digest({"y": y, "x": x}, {"b": "2", "a": "1"})
    others = [
        content_digest({"x": y, "y": x}, {"a": "1", "b": "2"}),
        content_digest({"x": x.reshape(2, 2), "y": y}, {"a": "1", "b": "2"}),
        content_digest({"x": x.view(torch.int32), "y": y}, {"a": "1", "b": "2"}),
        content_digest({"x": x, "z": y}, {"a": "1", "b": "2"}),
        content_digest({"x": x}, {"a": "1", "b": "2"}),
        content_digest({"x": x, "y": y}, {"a": "1", "b": "3"}),
        content_digest({"x": x, "y": y}, {"a": "1"}),
        content_digest({"x": x, "y": torch.nextafter(y, 2 * y)}, {"a": "1", "b": "2"}),
    ]
    assert len({of, *others}) == 1 + len(others)


def test_every_kind_of_tensor_is_sealed(tmp_path: Path) -> None:
    made = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "bool": torch.tensor([True, False]),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "view": torch.arange(6.0).reshape(2, 3).T,
    }
    save_tensors(tmp_path / "x", made, {})
    found = load_tensors(tmp_path / "x")
    assert found.sealed
    assert all(torch.equal(found.tensors[name], t) for name, t in made.items())


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        save_partial(tmp_path / "x", KEY, AT, STATES, SHOWN)
    assert list(tmp_path.iterdir()) == []


def test_what_is_set_aside_replaces_nothing_set_aside_before(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / "x.json").write_text(str(i))
        set_aside(tmp_path / "x.json")
    found = {f.name: f.read_text("utf-8") for f in tmp_path.iterdir()}
    assert found == {"x.json.damaged": "0", "x.json.2.damaged": "1", "x.json.3.damaged": "2"}


# --- A run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared() -> tuple[prepare.Prepared, prepare.Measured]:
    asked = request.Request(
        [request.Grid(["ddpm"], [2, 3])],
        model="exact:gaussian",
        n=40,
        blocks=2,
        batch_size=20,
        metrics=("fid", "inception-score"),
        data="digits",
    )
    made = prepare.prepare(asked, "cpu")
    return made, prepare.measure_reference(made)


Make = Callable[[Path], engine.Session]


@pytest.fixture(scope="module")
def make(prepared: tuple[prepare.Prepared, prepare.Measured]) -> Make:
    def session(folder: Path) -> engine.Session:
        store = Store(folder)
        store.prepare()
        return prepare.make_session(*prepared, 0, store)

    return session


def stop_after(session: engine.Session, cell: engine.Cell, checkpoints: int) -> Path:
    """Run a cell until it has written so many checkpoints; the last one's file."""
    asked = itertools.count()  # once when the cell is claimed, then after each checkpoint
    session.execution.stop = lambda: next(asked) == checkpoints
    with pytest.raises(Stopped):
        engine.run_cell(session, cell)
    session.execution.stop = lambda: False
    (file,) = session.execution.store.folder.glob(f"*{PARTIAL}")
    return file


def flip(file: Path, _: Path) -> None:
    """The lowest bit of the mean's first byte: a number that is off in its last digit."""
    data = bytearray(file.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1
    file.write_bytes(data)


def exchange(file: Path, other: Path) -> None:
    shutil.copy(other, file)


def reseal(**change: Any) -> Callable[[Path, Path], None]:
    def tamper(file: Path, _: Path) -> None:
        found = load_tensors(file)
        progress = json.loads(found.metadata["progress"]) | change
        save_tensors(file, found.tensors, found.metadata | {"progress": json.dumps(progress)})

    return tamper


def forge_shape(file: Path, _: Path) -> None:
    found = load_tensors(file)
    save_tensors(file, found.tensors | {"0.mean": torch.zeros(1, 2, 3)}, found.metadata)


def unseal(file: Path, _: Path) -> None:
    found = load_tensors(file)
    save_file(found.tensors, file, found.metadata)


def link(file: Path, other: Path) -> None:
    file.unlink()
    file.symlink_to(other)


def pipe(file: Path, _: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def folder(file: Path, _: Path) -> None:
    file.unlink()
    file.mkdir()


TAMPERED = [flip, exchange, reseal(done=40), reseal(block=2), reseal(results=[[]]), forge_shape, unseal, link, folder]
TAMPERED += [pipe] if hasattr(os, "mkfifo") else []


def test_a_tampered_checkpoint_is_set_aside_and_the_numbers_are_those_of_an_undisturbed_run(
    tmp_path: Path, make: Make, prepared: tuple[prepare.Prepared, prepare.Measured], capsys: pytest.CaptureFixture[str]
) -> None:
    cell, another = prepared[0].cells
    whole = engine.run_cell(make(tmp_path / "whole"), cell).record
    other = stop_after(make(tmp_path / "other"), another, 2)
    for number, tamper in enumerate(TAMPERED):
        session = make(tmp_path / f"{number}")
        file = stop_after(session, cell, 1 + number % 2)
        tamper(file, other)
        capsys.readouterr()
        record = engine.run_cell(session, cell).record
        err = capsys.readouterr().err
        assert {k: record[k] for k in ("metrics", "nfe", "n", "protocol", "resumed")} == {
            k: whole[k] for k in ("metrics", "nfe", "n", "protocol", "resumed")
        }, tamper
        assert err.startswith(f"samplerbench: warning: {file.name} is not used: "), tamper
        assert err.count("\n") == 1, tamper
        assert os.path.lexists(file.with_name(file.name + ".damaged")), tamper
        assert not os.path.lexists(file)
    assert load_tensors(other).sealed  # what the link led to is as it was


def test_an_intact_checkpoint_is_taken_over(
    tmp_path: Path, make: Make, prepared: tuple[prepare.Prepared, prepare.Measured], capsys: pytest.CaptureFixture[str]
) -> None:
    """The counterpart of the test above: it is the tampering that is noticed."""
    cell = prepared[0].cells[0]
    whole = engine.run_cell(make(tmp_path / "whole"), cell).record
    session = make(tmp_path / "resumed")
    stop_after(session, cell, 2)
    capsys.readouterr()
    record = engine.run_cell(session, cell).record
    assert capsys.readouterr().err == ""
    assert record["resumed"] == 1
    assert record["metrics"] == whole["metrics"]


# --- Training -------------------------------------------------------------------------------------------------------


class Trained:
    """A network of two numbers after one step, with its optimizer and averaged weights."""

    def __init__(self) -> None:
        from diffusers.training_utils import EMAModel

        torch.manual_seed(0)
        self.network = nn.Linear(1, 1)
        self.optimizer = torch.optim.AdamW(self.network.parameters())
        self.ema = EMAModel(self.network.parameters(), decay=0.9)

    def step(self) -> Trained:
        self.network(torch.ones(1, 1)).sum().backward()
        self.optimizer.step()
        self.ema.step(self.network.parameters())
        return self

    def save(self, file: Path) -> None:
        result = TrainResult(1, 8, 2.0, 0.5, False)
        _save_checkpoint(file, self.network, self.ema, self.optimizer, {"lr": 0.1}, "unet", result, None)

    def load(self, file: Path) -> TrainResult:
        return _load_checkpoint(file, self.network, self.ema, self.optimizer, {"lr": 0.1}, "unet", None)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    file = tmp_path / "checkpoint" / "state.safetensors"
    Trained().step().save(file)
    return file


def test_no_flipped_bit_of_a_training_checkpoint_gives_other_weights(state: Path) -> None:
    whole, trained = state.read_bytes(), Trained()
    for place in range(0, 8 * len(whole), 61):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        state.write_bytes(damaged)
        with pytest.raises(UserError, match=r"^the checkpoint .* is damaged \(.*; remove it to start anew\.$"):
            trained.load(state)


def test_a_training_checkpoint_of_an_older_version_without_a_digest_is_taken_over(state: Path) -> None:
    found = load_tensors(state)
    assert found.sealed
    save_file(load_file(state), state, found.metadata)
    assert not load_tensors(state).sealed
    trained = Trained()
    assert replace(trained.load(state), seconds=0) == TrainResult(1, 8, 0, 0.5, False)
    expected = Trained().step().network.weight
    assert torch.equal(trained.network.weight, expected)


@pytest.mark.parametrize("change", [{"result": "{}"}, {"result": "[]"}, {"settings": "null"}, {"ema_steps": "x"}])
def test_a_sealed_training_checkpoint_of_wrong_types_is_one_line(state: Path, change: dict[str, str]) -> None:
    found = load_tensors(state)
    save_tensors(state, found.tensors, found.metadata | change)
    with pytest.raises(UserError, match=r"is damaged \(.*\); remove it to start anew\.$") as caught:
        Trained().load(state)
    assert "\n" not in str(caught.value)


# --- Statistics of real images --------------------------------------------------------------------------------------


@pytest.fixture
def statistics(tmp_path: Path) -> Path:
    features = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "statistics.safetensors"
    described = {"name": "made", "split": "all", "n": 9, "sha256": "ab"}
    Reference(Moments.of(features), described, {"name": "x", "layer": "y", "weights": "z"}).save(file)
    return file


def test_no_flipped_bit_of_statistics_gives_another_distance(statistics: Path) -> None:
    whole = statistics.read_bytes()
    for place in range(0, 8 * len(whole), 7):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        statistics.write_bytes(damaged)
        with pytest.raises(UserError, match="is not a reference file of `samplerbench stats`"):
            load_reference(statistics)


def test_statistics_of_an_older_version_without_a_digest_are_read(statistics: Path) -> None:
    before, found = load_reference(statistics), load_tensors(statistics)
    assert found.sealed
    save_file(found.tensors, statistics, found.metadata)
    after = load_reference(statistics)
    assert torch.equal(after.moments.scatter, before.moments.scatter)
    assert (after.data, after.features) == (before.data, before.features)


def test_the_embedded_statistics_are_sealed() -> None:
    assert load_tensors(asset("references/digits-all.safetensors")).sealed
