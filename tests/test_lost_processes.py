"""Runs on several processes: one that the others wait for is named, one that is lost ends the run with one sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import make_cell

from samplerbench.bench import engine, last_word
from samplerbench.bench.presence import Member, Presence
from samplerbench.bench.team import Team
from samplerbench.errors import LostProcess
from samplerbench.models import Model

MakeSession = Callable[..., engine.Session]


def until(condition: Callable[[], Any]) -> Any:
    """Wait for what must come; the limit only ends a test that has failed."""
    for _ in range(2400):
        if found := condition():
            return found
        time.sleep(0.05)
    pytest.fail("it did not come in two minutes")


# --- Waiting for a process -------------------------------------------------------------------------------------------


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    mine = Clock()
    monkeypatch.setattr(time, "monotonic", mine)
    return mine


def make_team(said: list[str], size: int = 4) -> list[Presence]:
    store = torch.distributed.HashStore()
    members = [dataclasses.replace(Member.me(), pid=100 + rank, host=f"host{rank}") for rank in range(size)]
    return [Presence(rank, members, store, 60.0, said.append) for rank in range(size)]


def test_the_processes_that_have_not_arrived_are_named_after_a_minute(clock: Clock) -> None:
    said: list[str] = []
    team = make_team(said)
    for presence in team:
        with presence.waiting():
            pass  # the first exchange, in which all take part
    with team[0].waiting(), team[2].waiting():
        for clock.now in range(0, 60, 5):
            for presence in (team[0], team[2], team[3]):  # 3 works, 1 gives no sign of life
                presence.pulse()
            team[0].pulse()
            team[0].report()
        assert said == []
        clock.now = 60
        team[3].pulse()
        team[0].pulse()
        team[0].report()
        (line,) = said
        assert "waiting for 60 s for process 1 (pid 101 on host1, no sign of life" in line
        assert "; process 3 (pid 103 on host3, still alive)" in line
        assert "process 0" not in line
        assert "process 2" not in line
        assert "\n" not in line
        for clock.now in (61, 119):
            team[0].report()
        assert len(said) == 1  # it is said again after two minutes, four, …
        clock.now = 120
        team[0].report()
        assert "waiting for 120 s" in said[1]
    assert said[2:] == ["all processes have answered; the run continues."]


def test_a_process_that_is_stopped_within_an_exchange_is_named(clock: Clock) -> None:
    said: list[str] = []
    team = make_team(said, 3)
    with team[0].waiting(), team[1].waiting(), team[2].waiting():
        for clock.now in range(0, 90, 5):
            for presence in (team[2], team[0]):  # 1 gives no sign of life
                presence.pulse()
            team[0].report()
    assert said[0].startswith("waiting for 60 s for process 1 (pid 101 on host1, no sign of life")
    assert "process 2" not in said[0]


def test_nothing_is_said_of_an_exchange_in_which_all_are_alive(clock: Clock) -> None:
    said: list[str] = []
    team = make_team(said, 2)
    with team[0].waiting(), team[1].waiting():
        for clock.now in range(0, 300, 5):
            for presence in (team[1], team[0]):
                presence.pulse()
            team[0].report()
    assert said == []


def test_nothing_is_said_while_nobody_waits(clock: Clock) -> None:
    said: list[str] = []
    team = make_team(said, 2)
    with team[0].waiting():
        pass
    clock.now = 1000
    team[0].pulse()
    team[0].report()
    assert said == []


# --- Losing a process ----------------------------------------------------------------------------------------------


class Broken(Team):
    """A team whose connections are closed."""

    def gather(self, value: Any) -> list[Any]:
        def closed() -> None:
            raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:59464")

        self._exchange(closed)
        raise AssertionError("the exchange ended without an error")

    tell = gather


def test_a_closed_connection_is_one_sentence() -> None:
    with pytest.raises(LostProcess) as caught:
        Broken(0, 2).gather(1)
    assert str(caught.value) == (
        "another process of this run has ended unexpectedly. Nothing finished is lost: run the same command again to "
        "continue."
    )
    assert caught.value.exit_code == 1


def test_another_error_in_an_exchange_is_no_lost_process() -> None:
    def hungry() -> None:
        raise RuntimeError("CUDA error: out of memory")

    with pytest.raises(RuntimeError, match="out of memory") as caught:
        Team(0, 2)._exchange(hungry)
    assert not isinstance(caught.value, LostProcess)


def test_the_process_that_has_ended_is_named() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    gone = dataclasses.replace(Member.me(), pid=process.pid)
    presence = Presence(0, [Member.me(), gone], torch.distributed.HashStore(), 60.0, print)
    with pytest.raises(LostProcess, match=rf"^process 1 \(pid {gone.pid} on {gone.host}\) of this run has ended"):
        Broken(0, 2, presence=presence).gather(1)


def test_a_lost_process_fails_no_cell_but_ends_the_run(digits: Model, make_session: MakeSession) -> None:
    session = make_session(n=4)
    session.execution.team = Broken(0, 2)
    with pytest.raises(LostProcess):
        engine.run_cell(session, make_cell(digits, "ddim", None, 2))


# --- The last word ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/usr/bin/python -m torch.distributed.run --nproc-per-node 2 -m -- samplerbench run", True),
        ("/usr/bin/python /opt/bin/torchrun --nproc-per-node 2 -m samplerbench run", True),
        ("torchrun --nproc-per-node 2 x.py", True),
        ("/usr/bin/python -m accelerate.commands.launch --cpu -m samplerbench", True),
        ("/usr/bin/python /opt/bin/accelerate launch x.py", True),
        ("mpirun -n 2 samplerbench run", True),
        ("/bin/bash -c torchrun --nproc-per-node 2", False),
        ("/usr/bin/python -m samplerbench run --out torchrun", False),
        ("/usr/bin/python test.py torchrun", False),
        ("", False),
    ],
)
def test_a_launcher_is_known_by_its_command(command: str, expected: bool) -> None:
    assert last_word.is_launcher(command.split()) is expected


WORKER = """
import os, sys
from samplerbench.bench.last_word import LastWord
word = LastWord("the last word", int(sys.argv[1]))
print("ready", flush=True)
how = input()
if how == "fails": sys.exit(2)
if how == "lost": word.keep(); os._exit(1)
if how == "stopped": word.keep("another word"); sys.exit(130)
"""


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("killed", ["the last word"]),
        ("lost", ["the last word"]),
        ("stopped", ["another word"]),
        ("ends", []),
        ("fails", []),
    ],
)
def test_the_last_word_follows_the_launchers_lines(how: str, expected: list[str]) -> None:
    wait = "import sys; input(); print('the lines of the launcher', file=sys.stderr)"
    reader, writer = os.pipe()  # one stream for both, as on a terminal
    launcher = subprocess.Popen([sys.executable, "-c", wait], stdin=subprocess.PIPE, stderr=writer, encoding="utf-8")
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(launcher.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=writer,
        encoding="utf-8",
    )
    os.close(writer)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    if how == "killed":
        worker.kill()
        worker.wait()
    else:
        worker.communicate(how + "\n")
    launcher.communicate("\n")
    with os.fdopen(reader) as stream:
        lines = stream.read().splitlines()  # up to the end of the last process that has it
    assert lines == ["the lines of the launcher", *expected]


# --- Whole runs ------------------------------------------------------------------------------------------------------

# Each process waits in its fourth batch until the gate is open: what a test does to a process before that, it does to
# one with work left.
GATED = """
import os, time
from dataclasses import dataclass
from pathlib import Path
from samplerbench.sampling import Sampler, Step, intervals

started = 0

@dataclass(frozen=True)
class Gated(Sampler):
    '''Euler's method that waits for a file (unpublished).'''

    def steps(self, denoise, x, sigmas, noise):
        global started
        started += 1
        while started > 3 and not Path(os.environ["GATE"]).exists():
            time.sleep(0.02)
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            x = x0 + t / s * (x - x0)
            yield Step(t, x, x0)
"""
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "samplerbench"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "samplerbench"]
LONGEST = 240
"""Seconds after which a run is taken for hung."""


def start(out: Path, launcher: list[str], gate: Path | None = None) -> subprocess.Popen[str]:
    """Start a run whose processes wait for the gate; without one, they do not wait."""
    out.mkdir(exist_ok=True)
    file = out / "gated.py"
    file.write_text(GATED, "utf-8")
    cells = ["-m", "exact:mixture", "-s", f"./{file.name}:Gated", "--steps", "4,6", "--n", "300", "-b", "16"]
    command = [sys.executable, *launcher, "run", *cells, "--device", "cpu", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SAMPLERBENCH_REPORT_AFTER": "2", "GATE": str(gate or file)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", env=environment, cwd=out
    )


def worker_of(process: subprocess.Popen[str], out: Path, rank: int) -> psutil.Process:
    """The process of a rank, once it is at work."""
    until(lambda: list(out.glob("*.partial.safetensors")))
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank) and "samplerbench.bench.last_word" not in child.cmdline():
            return child
    pytest.fail("there is no such process")


def values(out: Path) -> dict[str, Any]:
    return {f.name: json.loads(f.read_text("utf-8"))["metrics"] for f in out.glob("*.json")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("undisturbed")
    process = start(out, TORCHRUN)
    printed = process.communicate(timeout=LONGEST)[0]
    assert process.returncode == 0, printed
    return values(out)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "rank"), [(TORCHRUN, 1), (ACCELERATE, 0)], ids=["torchrun-1", "accelerate-0"])
def test_after_the_launchers_lines_one_sentence_says_how_to_continue(
    tmp_path: Path, undisturbed: dict[str, Any], launcher: list[str], rank: int
) -> None:
    process = start(tmp_path, launcher, tmp_path / "gate")
    worker_of(process, tmp_path, rank).kill()
    lines = process.communicate(timeout=LONGEST)[0].rstrip().splitlines()
    assert process.returncode == 1
    assert lines[-1] == (
        "samplerbench: a process of this run has ended unexpectedly (see above). Nothing finished is lost: finished "
        f"cells and the last checkpoint are kept in {tmp_path}/. Run the same command again to continue."
    )
    assert sum("Nothing finished is lost" in line for line in lines) <= 2
    process = start(tmp_path, launcher)
    printed = process.communicate(timeout=LONGEST)[0]
    assert process.returncode == 0, printed
    assert values(tmp_path) == undisturbed


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no process can be stopped here")
def test_a_frozen_process_is_named_and_the_run_continues_with_it(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    process = start(tmp_path, TORCHRUN, tmp_path / "gate")
    worker = worker_of(process, tmp_path, 1)
    worker.suspend()
    (tmp_path / "gate").touch()
    assert process.stdout is not None
    while True:
        line = process.stdout.readline()
        assert line, "the run ended"
        if "waiting for" in line:
            break
    assert f"process 1 (pid {worker.pid} on " in line
    worker.resume()
    rest = process.communicate(timeout=LONGEST)[0]
    assert process.returncode == 0, rest
    assert "all processes have answered; the run continues." in rest
    assert values(tmp_path) == undisturbed
