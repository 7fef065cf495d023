"""Nothing is lost: interrupted, killed, shared and failing runs end with the results of an undisturbed one."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from samplerbench.bench import engine, prepare, request
from samplerbench.cli.app import main
from samplerbench.errors import Stopped
from samplerbench.results.store import Store

CELLS = [
    "-m",
    "exact:mixture",
    "-s",
    "ddim",
    "-s",
    "ddpm",
    "--steps",
    "4,12",
    "--n",
    "150",
    "--blocks",
    "2",
    "-b",
    "16",
]
METRICS = ["--metric", "fid", "--metric", "inception-score"]


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["run", *arguments])
    return int(ended.value.code or 0)


def start(out: Path, *more: str, launcher: tuple[str, ...] = ("-m", "samplerbench")) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "run", *CELLS, *METRICS, "--out", str(out), *more]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", env=environment
    )


def values(out: Path) -> dict[str, Any]:
    """What a result says, by its file: everything but times and how it came about."""
    found = {}
    for file in sorted(out.glob("*.json")):
        record = json.loads(file.read_text("utf-8"))
        found[file.name] = {k: record[k] for k in ("sampler", "steps", "nfe", "metrics", "n", "blocks")}
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("undisturbed")
    assert run([*CELLS, *METRICS, "--out", str(out)]) == 0
    assert len(values(out)) == 4
    return values(out)


def make(
    out: Path, metrics: tuple[str, ...] = ("fid", "inception-score"), blocks: int = 2
) -> tuple[engine.Session, engine.Cell]:
    asked = request.Request(
        [request.Grid(["ddpm"], [4])], model="exact:mixture", n=150, blocks=blocks, batch_size=16, metrics=metrics
    )
    prepared = prepare.prepare(asked, "cpu")
    store = Store(out)
    store.prepare()
    return prepare.make_session(prepared, prepare.measure_reference(prepared), 0, store), prepared.cells[0]


def test_stopped_after_any_checkpoint_a_cell_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    session, cell = make(tmp_path / "whole")
    whole = engine.run_cell(session, cell).record
    session, cell = make(tmp_path / "stopped")
    stops = 0

    def stop() -> bool:
        nonlocal stops
        stops += 1
        return stops % 3 == 0

    session.execution.stop = stop
    for _ in range(40):
        try:
            resumed = engine.run_cell(session, cell).record
            break
        except Stopped:
            assert list((tmp_path / "stopped").glob("*.partial.safetensors"))
    assert resumed["resumed"] >= 5
    assert {k: resumed[k] for k in ("metrics", "nfe", "protocol")} == {
        k: whole[k] for k in ("metrics", "nfe", "protocol")
    }
    assert not list((tmp_path / "stopped").glob("*.partial.safetensors"))
    assert (tmp_path / "stopped").joinpath(f"{whole['protocol'][:20]}.png").read_bytes() == (
        tmp_path / "whole"
    ).joinpath(f"{whole['protocol'][:20]}.png").read_bytes()


@pytest.mark.parametrize(
    ("model", "metrics"),
    [("digits", ("fid", "kid", "inception-score", "precision", "label-accuracy")), ("exact:mixture", ("fid", "gap"))],
)
def test_stopped_between_two_blocks_every_metric_goes_on(tmp_path: Path, model: str, metrics: tuple[str, ...]) -> None:
    grids = [request.Grid(["ddim"], [3])]
    asked = request.Request(grids, model=model, n=20, blocks=2, batch_size=20, metrics=metrics)
    prepared = prepare.prepare(asked, "cpu")
    measured = prepare.measure_reference(prepared)
    found = []
    for name in ("whole", "stopped"):
        store = Store(tmp_path / name)
        store.prepare()
        session = prepare.make_session(prepared, measured, 0, store)
        if name == "stopped":
            # Not earlier: a converged solution is stopped before there is a checkpoint.
            session.execution.stop = lambda: bool(list((tmp_path / "stopped").glob("*.partial.safetensors")))
            with pytest.raises(Stopped):
                engine.run_cell(session, prepared.cells[0])
            assert list((tmp_path / name).glob("*.partial.safetensors"))
            session.execution.stop = lambda: False
        found.append(engine.run_cell(session, prepared.cells[0]).record["metrics"])
    assert found[0] == found[1]


def test_a_damaged_checkpoint_costs_only_time(tmp_path: Path) -> None:
    session, cell = make(tmp_path, blocks=1)
    session.execution.stop = lambda: True
    with pytest.raises(Stopped):
        engine.run_cell(session, cell)
    (file,) = tmp_path.glob("*.partial.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    session.execution.stop = lambda: False
    record = engine.run_cell(session, cell).record
    assert record["resumed"] == 0
    other, _ = make(tmp_path / "other", blocks=1)
    assert engine.run_cell(other, cell).record["metrics"] == record["metrics"]


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_with_the_same_files(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    rng, killed = random.Random(0), 0
    for _ in range(2):
        process = start(tmp_path)
        assert process.stderr is not None
        # The first line means that the work has begun; the imports before it are no interesting moment.
        process.stderr.readline()
        time.sleep(rng.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    process = start(tmp_path)
    printed = process.communicate(timeout=240)[1]
    assert process.returncode == 0, printed
    assert killed >= 1
    assert values(tmp_path) == undisturbed


@pytest.mark.slow
def test_two_runs_on_one_folder_share_the_cells(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    runs = [start(tmp_path) for _ in range(2)]
    told = [process.communicate()[1] for process in runs]
    assert [process.returncode for process in runs] == [0, 0], told
    lines = [line for text in told for line in text.splitlines() if "NFE" in line]
    assert len(lines) == 8
    assert sum("from an earlier run" not in line for line in lines) == 4
    assert values(tmp_path) == undisturbed


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "samplerbench")
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "samplerbench")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_give_the_same_numbers(
    tmp_path: Path, undisturbed: dict[str, Any], launcher: tuple[str, ...]
) -> None:
    process = start(tmp_path, "--device", "cpu", launcher=launcher)
    printed = process.communicate(timeout=240)[1]
    assert process.returncode == 0, printed
    together = values(tmp_path)
    assert together.keys() == undisturbed.keys()
    for name, record in together.items():
        for metric in ("fid", "inception-score"):
            ours, theirs = record["metrics"][metric]["blocks"], undisturbed[name]["metrics"][metric]["blocks"]
            assert ours == pytest.approx(theirs, rel=1e-4)
        assert record["nfe"] == undisturbed[name]["nfe"]
    assert {json.loads(f.read_text("utf-8"))["processes"] for f in tmp_path.glob("*.json")} == {2}


@pytest.mark.slow
def test_one_process_failing_ends_the_cell_for_both_with_its_error(tmp_path: Path) -> None:
    process = start(tmp_path, "--device", "cpu", "-s", "ddpm:variance=learned", launcher=TORCHRUN)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "ddpm:variance=learned, 4 steps: failed: process 0: sampler ddpm: the model learned no variance" in err
    assert len(values(tmp_path)) == 4


def test_another_batch_size_gives_the_same_numbers(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    assert run([*CELLS, *METRICS, "-b", "50", "--out", str(tmp_path)]) == 0
    for name, record in values(tmp_path).items():
        assert record["metrics"]["fid"]["value"] == pytest.approx(
            undisturbed[name]["metrics"]["fid"]["value"], rel=1e-4
        )


def test_a_full_disk_is_one_line_for_the_cell_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, writes = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal writes
        writes += str(target).endswith(".json")
        if str(target).endswith(".json") and writes == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    cells = ["-m", "exact:mixture", "-s", "ddim", "--steps", "2,3", "--n", "20", "--json"]
    assert run([*cells, "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "No space left on device" in json.loads(out)[0]["error"]
    assert [record["steps"] for record in json.loads(out) if "error" not in record] == [3]
    assert len(list(tmp_path.glob("*.json"))) == 1
    assert not list(tmp_path.glob(".*.tmp"))
    assert "Traceback" not in err


def test_a_damaged_or_edited_result_is_set_aside_and_its_cell_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = ["-m", "exact:mixture", "-s", "ddim", "--steps", "2,3", "--n", "20", "--out", str(tmp_path)]
    assert run(cells) == 0
    before = values(tmp_path)
    first, second = sorted(tmp_path.glob("*.json"))
    first.write_text(first.read_text("utf-8")[:-40], "utf-8")
    second.write_text(second.read_text("utf-8").replace('"n": 20', '"n": 21'), "utf-8")
    capsys.readouterr()
    assert run(cells) == 0
    assert "from an earlier run" not in capsys.readouterr().err
    assert values(tmp_path) == before
    assert len(list(tmp_path.glob("*.json.damaged"))) == 2


@pytest.mark.slow
def test_memory_does_not_grow_with_n(tmp_path: Path) -> None:
    """Peak memory for n = 20,000 exceeds that for n = 2,000 by less than 50 MB with FID alone."""
    code = (
        "import resource, sys\n"
        "from samplerbench.cli.app import main\n"
        "try: main(['run', '-m', 'exact:gaussian', '-s', 'ddim', '--steps', '1', '--n', sys.argv[1],"
        " '--out', sys.argv[2]])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )

    def peak(n: int) -> int:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, str(n), str(tmp_path / str(n))]
        output = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, env=environment).stdout
        return int(output.split()[-1])

    assert peak(20_000) - peak(2_000) < 50 * 1024


def test_results_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def results(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["results", *arguments])
        return int(ended.value.code or 0), capsys.readouterr().out

    one, two, both = tmp_path / "one", tmp_path / "two", tmp_path / "both"
    for out, sampler in ((one, "ddim"), (two, "ddpm")):
        assert run(["-m", "exact:mixture", "-s", sampler, "--steps", "2", "--n", "20", "--out", str(out)]) == 0
    capsys.readouterr()
    assert results("merge", str(one), str(two), "--out", str(both)) == (0, f"2 results copied to {both}\n")
    assert results("validate", str(both)) == (0, "2 valid, 0 invalid\n")
    code, listing = results("ls", str(both))
    assert code == 0
    assert "ddim" in listing
    assert "ddpm" in listing
    file = sorted(both.glob("*.json"))[0]
    code, shown = results("show", file.stem[:6], str(both))
    assert json.loads(shown) == json.loads(file.read_text("utf-8"))
    file.write_text(file.read_text("utf-8").replace('"seed": 0', '"seed": 1'), "utf-8")
    code, told = results("validate", str(both))
    assert code == 1
    assert told == f"{file.name}: damaged or edited\n1 valid, 1 invalid\n"
    assert results("rm", file.stem, str(both))[0] == 0
    assert len(list(both.iterdir())) == 2


def test_the_published_schema_is_the_one_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["results", "schema"])
    published = Path(__file__).parent.parent / "docs" / "result.schema.json"
    assert json.loads(capsys.readouterr().out) == json.loads(published.read_text("utf-8"))


def test_the_state_of_every_metric_merges_to_the_same_result() -> None:
    from samplerbench import registry
    from samplerbench.metrics import Batch, Context, Moments, Reference

    generator = torch.Generator().manual_seed(0)
    features, real = torch.randn(90, 12, generator=generator), torch.randn(80, 12, generator=generator)
    context = Context(Reference(Moments.of(real), {}, {}), lambda _: real)
    labels = torch.arange(90) % 12
    for name in ("fid", "fid-inf", "kid", "inception-score", "precision", "recall", "label-accuracy"):
        metric = registry.parse("metric", name)
        whole, merged = metric.start(context), metric.start(context)
        for cut in (slice(0, 40), slice(40, 90)):
            part = metric.start(context)
            batch = Batch(torch.zeros(1), features[cut], labels[cut])
            whole.update(batch)
            part.update(batch)
            merged.merge(part.state())
        assert merged.result() == pytest.approx(whole.result(), rel=1e-12), name
