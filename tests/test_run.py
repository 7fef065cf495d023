"""The run of a request: the order of the cells, what watches it, and how it is stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from samplerbench.bench import engine
from samplerbench.bench.prepare import Prepared, prepare
from samplerbench.bench.request import Grid, Request
from samplerbench.bench.run import Observer, Run
from samplerbench.cli.app import main
from samplerbench.errors import Stopped, UserError
from samplerbench.metrics.metric import check_requirements
from samplerbench.progress import Progress
from samplerbench.results.seal import digest
from samplerbench.results.store import Store


class Diary(Observer):
    """Writes down what happens; stops the run after so many cells."""

    def __init__(self, last: int = 10**9) -> None:
        self.lines: list[str] = []
        self.left = last

    @contextmanager
    def running(self) -> Iterator[None]:
        self.lines.append("begin")
        yield
        self.lines.append("end")

    @contextmanager
    def cell(self, title: str, steps: int | None, n: int, batch_size: int, blocks: int = 1) -> Iterator[Any]:
        yield lambda index, step: None

    def done(self, outcome: engine.Outcome, title: str) -> None:
        self.left -= 1
        self.lines.append(f"{title}{' again' if outcome.reused else ''}")

    def stop(self) -> bool:
        return self.left <= 0


def prepared(**fields: Any) -> Prepared:
    grids = fields.pop("grids", [Grid(["ddim", "heun"], [2])])
    return prepare(Request(grids, **{"model": "exact:mixture", "n": 4, "metrics": ["gap"]} | fields), "cpu")


def test_every_cell_runs_once_under_every_seed(tmp_path: Path) -> None:
    run, diary = Run(prepared(seeds=[0, 1]), Store(tmp_path)), Diary()
    assert [record["seed"] for record in run.pending] == [0, 0, 1, 1]
    assert all(record["pending"] for record in run.pending)
    assert (run.records, run.finished) == ([], 0)
    run.run(diary)
    assert diary.lines == ["begin", "ddim, 2 steps", "heun, 2 steps", "ddim, 2 steps", "heun, 2 steps", "end"]
    assert [(r["sampler"], r["seed"]) for r in run.records] == [("ddim", 0), ("heun", 0), ("ddim", 1), ("heun", 1)]
    assert run.pending == run.records
    assert (run.finished, run.failed) == (4, [])
    diary = Diary()
    run.run(diary)  # nothing is left
    assert diary.lines == ["begin", "end"]
    again = Run(prepared(seeds=[0, 1]), Store(tmp_path))
    again.run(diary)
    assert [line.endswith(" again") for line in diary.lines[3:-1]] == [True] * 4


def test_a_cell_that_another_run_works_on_comes_last(tmp_path: Path) -> None:
    run = Run(prepared(), Store(tmp_path))
    session, cell = run.jobs[0].session, run.jobs[0].cell
    lease = Store(tmp_path).claims.take(digest(session.measurement.protocol(cell)))
    assert lease is not None

    class Releasing(Diary):
        def done(self, outcome: engine.Outcome, title: str) -> None:
            super().done(outcome, title)
            lease.release()

    diary = Releasing()
    run.run(diary)
    assert diary.lines[1:3] == ["heun, 2 steps", "ddim, 2 steps"]


def test_a_run_that_is_stopped_keeps_what_is_finished_and_continues(tmp_path: Path) -> None:
    run = Run(prepared(), Store(tmp_path))
    with pytest.raises(Stopped):
        run.run(Diary(last=1))
    assert (run.finished, [r["sampler"] for r in run.records]) == (1, ["ddim"])
    assert [record.get("pending", False) for record in run.pending] == [False, True]
    run.run()
    assert run.finished == 2


def test_cells_of_equal_steps_are_sampled_once_under_their_budgets(tmp_path: Path) -> None:
    request = Request([Grid(["heun"], nfe=[3, 4, 5])], model="exact:mixture", n=4, metrics=["gap"])
    run, diary = Run(prepare(request, "cpu"), Store(tmp_path)), Diary()
    assert [len(unit) for unit in run.units] == [2, 1]
    run.run(diary)
    assert len(diary.lines) == 4
    assert [(r["steps"], r["budget"]) for r in run.records] == [(2, 3), (2, 4), (3, 5)]


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another `out`"):
        Run(prepared(), Store(tmp_path / "file"))


def test_few_images_are_warned_of(tmp_path: Path) -> None:
    run = Run(prepare(Request([Grid(["ddim"], [2])], model="digits", n=20), "cpu"), Store(tmp_path))
    (warning,) = run.warnings()
    assert warning == (
        "20 images for 64 features: the covariance is singular and the FID strongly biased; use n=640 or more."
    )
    check_requirements(run.prepared.metrics[0], n=640, dimension=64)
    assert Run(prepared(), Store(tmp_path)).warnings() == []


def test_what_a_plugin_prints_while_it_is_imported_is_not_in_the_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = "print('printed')\nfrom samplerbench.sampling import Sampler, Step\n\n\nclass Talks(Sampler):\n"
    body = "    def steps(self, denoise, x, sigmas, noise):\n        yield Step(0.0, denoise(x, float(sigmas[0])))\n"
    Path("talks.py").write_text(source + body, encoding="utf-8")
    run = ["run", "-s", "./talks.py:Talks", "--steps", "1", "--n", "2", "-m", "exact:mixture", "--metric", "gap"]
    with pytest.raises(SystemExit) as ended:
        main([*run, "--json"])
    out, err = capsys.readouterr()
    assert (ended.value.code, len(json.loads(out))) == (0, 1)
    assert "printed" in err


@pytest.mark.parametrize(("n", "blocks", "batch_size"), [(5, 2, 4), (4, 3, 4), (7, 1, 3), (3, 2, 64)])
def test_the_bar_of_a_cell_ends_at_its_total(
    n: int, blocks: int, batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block has its own batches, and the last one of a block can be small."""
    bars = Progress(1)
    ended: list[tuple[float, float | None]] = []
    remove = bars.bars.remove_task

    def removed(task: Any) -> None:
        ended.append((bars.bars.tasks[-1].completed, bars.bars.tasks[-1].total))
        remove(task)

    monkeypatch.setattr(bars.bars, "remove_task", removed)

    class Shown(Observer):
        cell = bars.cell

    job = prepared(grids=[Grid(["ddim"], [3])], n=n, blocks=blocks, batch_size=batch_size)
    Run(job, Store(tmp_path)).run(Shown())
    (done,) = ended
    assert done[0] == done[1] == 3 * blocks * -(-n // batch_size)
