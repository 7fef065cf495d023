"""Claims: each cell belongs to one run at a time, on any file system, and a run that waits says for whom."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_cell

from samplerbench.bench import cell_run, engine
from samplerbench.cli.app import main
from samplerbench.errors import RunError, Stopped, UserError
from samplerbench.models import Model
from samplerbench.results import claims as module
from samplerbench.results.claims import Claimed, ClaimLost, Claims, Lease, Owner, Timing, Waiting, start_time
from samplerbench.results.store import Store

MakeSession = Callable[..., engine.Session]
KEY = "0123456789abcdef0123" + 44 * "0"
FAST = Timing(beat=0.05, stale=30.0, observe=0.0, poll=0.05)
LONG_AGO = 3600


@pytest.fixture
def claims(tmp_path: Path) -> Claims:
    return Claims(tmp_path / ".locks", FAST)


@pytest.fixture
def other(tmp_path: Path) -> Claims:
    """A second run on the same folder."""
    return Claims(tmp_path / ".locks", FAST)


def taken(claims: Claims, key: str = KEY) -> Lease:
    lease = claims.take(key)
    assert lease is not None
    return lease


def forge(claims: Claims, key: str = KEY, age: float = 0.0, **changes: Any) -> Path:
    """A lease as a process on another machine would have left it, last renewed `age` seconds ago."""
    owner = dataclasses.replace(Owner.me(), **{"machine": "elsewhere", "host": "far", **changes})
    claims.folder.mkdir(exist_ok=True)
    file = claims.folder / f"{key[:20]}.lease"
    file.write_text(json.dumps(dataclasses.asdict(owner)), "utf-8")
    then = time.time() - age
    os.utime(file, (then, then))
    return file


def suspend(lease: Lease) -> None:
    """Make a lease what it is after its process was stopped for an hour."""
    lease._end.set()
    lease._thread.join()
    then = time.time() - LONG_AGO
    os.utime(lease.file, (then, then))


def until(condition: Callable[[], Any]) -> Any:
    """Wait for what must come; the limit only ends a test that has failed."""
    for _ in range(600):
        if found := condition():
            return found
        time.sleep(0.05)
    pytest.fail("it did not come in 30 s")


@pytest.fixture
def ended_process() -> tuple[int, str]:
    """(id, start time) of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_time(process.pid)
    process.communicate(b"\n")
    return process.pid, started


# --- One owner -------------------------------------------------------------------------------------------------------


def test_a_cell_is_held_by_one_run_until_it_is_released(claims: Claims, other: Claims) -> None:
    lease = taken(claims)
    assert other.take(KEY) is None
    assert claims.take(KEY) is None
    holder = other.holder(KEY)
    assert holder == lease.owner
    assert holder.pid == os.getpid()
    assert holder.is_alive() is True
    taken(other, "f" * 64).release()  # another cell is free
    lease.release()
    assert list(claims.folder.iterdir()) == []
    taken(other).release()


def test_a_lease_appears_with_its_whole_content(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    link, seen = os.link, []

    def look(source: Any, target: Any, **rest: Any) -> None:
        seen.append((Path(target).exists(), Owner.read(Path(source).read_bytes())))
        link(source, target, **rest)

    monkeypatch.setattr(os, "link", look)
    lease = taken(claims)
    assert seen == [(False, lease.owner)]
    lease.release()


def test_old_lock_files_are_no_claims(claims: Claims) -> None:
    claims.folder.mkdir()
    (claims.folder / f"{KEY[:20]}.lock").touch()
    taken(claims).release()


WORKER = """
import sys
from pathlib import Path
from samplerbench.results.claims import Claims, Timing
claims = Claims(Path(sys.argv[1]), Timing(observe=0.0))
print("ready", flush=True)
input()
held = [lease for lease in (claims.take(key) for key in sys.argv[2:]) if lease is not None]
print(*(lease.owner.token for lease in held), flush=True)
input()
print(*(lease.is_held() for lease in held), flush=True)
"""


def test_of_eight_processes_exactly_one_takes_over_each_stale_lease(claims: Claims) -> None:
    keys = [f"{i:02d}{'0' * 62}" for i in range(12)]
    for key in keys:
        forge(claims, key, age=LONG_AGO)
    command = [sys.executable, "-c", WORKER, str(claims.folder), *keys]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", bufsize=1)
        for _ in range(8)
    ]

    def line(worker: subprocess.Popen[str], go: bool = True) -> list[str]:
        assert worker.stdin is not None
        assert worker.stdout is not None
        if go:
            worker.stdin.write("\n")
        return worker.stdout.readline().split()

    assert [line(w, go=False) for w in workers] == [["ready"]] * 8
    for w in workers:
        assert w.stdin is not None
        w.stdin.write("\n")
    tokens = [token for w in workers for token in line(w, go=False)]
    leases = {owner.token for key in keys if (owner := claims.holder(key)) is not None}
    assert len(tokens) == len(keys)
    assert set(tokens) == leases
    assert [held for w in workers for held in line(w)] == ["True"] * len(keys)
    for w in workers:
        w.communicate()


def test_of_eight_threads_exactly_one_takes_over_a_stale_lease_whoever_is_slow(tmp_path: Path) -> None:
    for round_ in range(40):
        folder = tmp_path / str(round_)
        forge(Claims(folder), age=LONG_AGO)
        barrier, won = threading.Barrier(8), []

        def attempt(folder: Path = folder, barrier: threading.Barrier = barrier, won: list[Lease] = won) -> None:
            mine = Claims(folder, FAST)
            barrier.wait()
            for _ in range(3):
                won.extend([lease] if (lease := mine.take(KEY)) is not None else [])

        threads = [threading.Thread(target=attempt) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (lease,) = won
        assert lease.is_held()
        lease.release()
        assert list(folder.iterdir()) == []


def test_while_one_process_takes_a_lease_over_no_other_can(
    claims: Claims, other: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge(claims, age=LONG_AGO)
    remove, between = claims._remove, []

    def interleaved(*arguments: Any) -> bool:
        between.append(other.take(KEY))
        return remove(*arguments)

    monkeypatch.setattr(claims, "_remove", interleaved)
    lease = taken(claims)
    assert between == [None]
    monkeypatch.undo()
    lease.release()


def test_a_process_that_judged_a_lease_before_another_took_it_over_removes_nothing(
    claims: Claims, other: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = forge(claims, age=LONG_AGO)
    judged = claims._read(file)
    assert judged is not None
    lease = taken(other)
    with monkeypatch.context() as patch:
        patch.setattr(claims, "_remove", lambda *_: pytest.fail("a new lease was touched"))
        assert claims._take_over(file, judged, "is late") is None
    assert lease.is_held()
    assert not claims._remove(file, judged.identity)  # not even if it came to that
    assert lease.is_held()
    lease.release()


# --- Owners that are gone ------------------------------------------------------------------------------------------


def test_the_lease_of_an_ended_process_is_taken_over_at_once(claims: Claims, ended_process: tuple[int, str]) -> None:
    pid, started = ended_process
    forge(claims, machine=module.this_machine(), pid=pid, started=started)
    lease = taken(claims)
    assert lease.before is not None
    assert (lease.before.pid, lease.reason) == (pid, "has ended")
    lease.release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no zombies here")
def test_a_zombie_has_ended(claims: Claims) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_time(process.pid)
    forge(claims, machine=module.this_machine(), pid=process.pid, started=started)
    assert claims.take(KEY) is None
    process.kill()
    until(lambda: module._status(process.pid)[0] == "Z")
    taken(claims).release()
    process.communicate()


def test_a_process_id_that_was_used_again_is_not_the_owner(claims: Claims) -> None:
    parent = os.getppid()
    forge(claims, machine=module.this_machine(), pid=parent, started=start_time(parent))
    assert claims.take(KEY) is None
    forge(claims, machine=module.this_machine(), pid=parent, started=start_time(parent) + "1")
    taken(claims).release()


def test_process_ids_of_other_machines_say_nothing(claims: Claims, ended_process: tuple[int, str]) -> None:
    forge(claims, pid=ended_process[0], started=ended_process[1])
    assert claims.take(KEY) is None


def test_a_lease_without_renewal_is_taken_over(claims: Claims) -> None:
    file = forge(claims, age=FAST.stale - 5)
    assert claims.take(KEY) is None
    forge(claims, age=FAST.stale + 5)
    lease = taken(claims)
    assert lease.reason is not None
    assert lease.reason.startswith("has given no sign of life for 3")
    assert lease.file == file
    lease.release()


def test_an_owner_renews_its_lease(claims: Claims, other: Claims) -> None:
    lease = taken(claims)
    then = time.time() - LONG_AGO
    os.utime(lease.file, (then, then))
    until(lambda: lease.file.stat().st_mtime > then + 1)
    assert other.take(KEY) is None
    lease.release()


def test_after_a_machine_woke_up_a_living_owner_gets_the_time_to_renew(tmp_path: Path) -> None:
    patient = Claims(tmp_path / ".locks", dataclasses.replace(FAST, observe=0.3))
    file = forge(patient, age=LONG_AGO)
    assert patient.take(KEY) is None  # the stamp is old, but who knows since when the owner could not write
    os.utime(file)
    time.sleep(0.4)
    assert patient.take(KEY) is None  # it was renewed
    then = time.time() - LONG_AGO
    os.utime(file, (then, then))
    until(lambda: patient.take(KEY)).release()


def test_the_clocks_of_hosts_do_not_matter(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    file, now = forge(claims, age=0), time.time()
    for offset in (-1e6, 1e6):
        monkeypatch.setattr(time, "time", lambda offset=offset: now + offset)
        assert claims.take(KEY) is None
    os.utime(file, (0, 0))
    taken(claims).release()


def test_a_stamp_in_the_future_does_not_hold_a_cell_for_ever(tmp_path: Path) -> None:
    short = Claims(tmp_path / ".locks", dataclasses.replace(FAST, stale=0.2))
    forge(short, age=-1e6)
    until(lambda: short.take(KEY)).release()


def test_a_takeover_that_was_killed_midway_blocks_nobody(claims: Claims) -> None:
    file = forge(claims, age=LONG_AGO)
    seen = claims._read(file)
    assert seen is not None
    marker = claims.folder / f"{KEY[:20]}.{seen.identity}.takeover"
    marker.touch()
    assert claims.take(KEY) is None  # another is at it
    os.utime(marker, (0, 0))
    assert claims.take(KEY) is None  # it is removed
    taken(claims).release()
    assert list(claims.folder.iterdir()) == []


# --- Owners that come back -----------------------------------------------------------------------------------------


def test_an_owner_that_was_suspended_notices_and_leaves_the_new_lease(claims: Claims, other: Claims) -> None:
    lease = taken(claims)
    lease.check()
    suspend(lease)
    new = taken(other)
    with pytest.raises(ClaimLost, match=f"another run took the cell over: process {os.getpid()} on ") as caught:
        lease.check()
    assert "\n" not in str(caught.value)
    lease.release()
    assert new.is_held()
    new.release()
    with pytest.raises(ClaimLost):
        lease.check()  # also when the other one has finished


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no process can be stopped here")
def test_a_stopped_process_loses_its_lease_and_learns_it(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom samplerbench.results.claims import *\n"
        "lease = Claims(Path(sys.argv[1]), Timing(beat=0.02)).take(sys.argv[2])\nprint('held', flush=True)\n"
        "input()\nlease.check()\n"
    )
    claims = Claims(tmp_path, Timing(beat=0.02, stale=0.5, observe=0.5))
    command = [sys.executable, "-c", code, str(tmp_path), KEY]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGSTOP)
    lease = until(lambda: claims.take(KEY))
    assert lease.before.pid == process.pid
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate("\n")
    assert process.returncode != 0
    assert "ClaimLost" in err
    assert lease.is_held()
    lease.release()


@pytest.fixture
def steal(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """After the first cell is sampled its run is suspended, and another run takes the cell over and finishes it."""
    finish, stolen = cell_run.CellRun.finish, []

    def interrupted(run: cell_run.CellRun) -> dict[str, Any]:
        record = finish(run)
        if not stolen and run.lease is not None:
            suspend(run.lease)
            store = Store(run.store.folder)
            store.claims.timing = FAST
            lease = taken(store.claims, run.key)
            fields = run.session.measurement.protocol(run.cell)
            stolen.append(store.put(record | {"protocol": run.key, "protocol_fields": fields, "resumed": 7}))
            lease.release()
        return record

    monkeypatch.setattr(cell_run.CellRun, "finish", interrupted)
    return stolen


def test_a_run_that_was_suspended_takes_the_result_of_the_run_that_took_over(
    digits: Model, make_session: MakeSession, steal: list[Path]
) -> None:
    session, said = make_session(n=4), []
    session.execution.say = said.append
    outcome = engine.run_cell(session, make_cell(digits, "ddim", None, 2))
    assert outcome.reused
    assert outcome.record["resumed"] == 7
    assert json.loads(steal[0].read_text("utf-8"))["resumed"] == 7
    (line,) = said
    assert "another run took the cell over" in line


def test_a_suspended_run_writes_no_checkpoint(digits: Model, make_session: MakeSession) -> None:
    session = make_session(n=4)
    run = cell_run.CellRun(session, make_cell(digits, "ddim", None, 2), KEY)
    run.resume()
    claims = session.execution.store.claims
    claims.timing = FAST
    run.lease = taken(claims)
    suspend(run.lease)
    new = taken(claims)
    with pytest.raises(ClaimLost):
        run.checkpoint(0)
    assert not list(session.execution.store.folder.glob("*.safetensors"))
    new.release()


# --- Odd file systems and odd files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_without_hard_links_there_is_still_one_owner(
    claims: Claims, other: Claims, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def unsupported(*_: Any, **__: Any) -> None:
        raise OSError(number, "not supported")

    monkeypatch.setattr(os, "link", unsupported)
    lease = taken(claims)
    assert other.take(KEY) is None
    suspend(lease)
    new = taken(other)
    assert not lease.is_held()
    assert not claims._remove(new.file, lease.owner.token)
    assert new.is_held()
    new.release()
    assert list(claims.folder.iterdir()) == []


def test_a_link_that_was_made_but_reported_as_failed_is_a_claim(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def lost_reply(source: Any, target: Any, **rest: Any) -> None:
        link(source, target, **rest)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", lost_reply)
    taken(claims).release()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "{", '{"pid": 1}', "[" * 100_000, "9" * 5000],
    ids=["empty", "list", "null", "cut", "incomplete", "nested", "digits"],
)
def test_a_lease_that_cannot_be_read_holds_until_it_is_stale(claims: Claims, content: str) -> None:
    file = forge(claims)
    file.write_text(content, "utf-8")
    assert claims.take(KEY) is None
    assert claims.holder(KEY) is None
    os.utime(file, (0, 0))
    taken(claims).release()


@pytest.mark.parametrize("changes", [{"pid": -1}, {"pid": True}, {"pid": 2**40}, {"token": "../../x"}, {"host": 3}])
def test_a_lease_with_odd_values_has_no_owner(claims: Claims, changes: dict[str, Any]) -> None:
    forge(claims, **changes)
    assert claims.holder(KEY) is None
    assert claims.take(KEY) is None


def test_what_is_no_file_is_one_line(claims: Claims, tmp_path: Path) -> None:
    claims.folder.mkdir()
    file = claims.folder / f"{KEY[:20]}.lease"
    target = tmp_path / "target"
    target.write_text("untouched")

    def refused() -> None:
        with pytest.raises(UserError, match="is not a regular file; remove it") as caught:
            claims.take(KEY)
        assert "\n" not in str(caught.value)

    file.symlink_to(target)
    refused()
    file.unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(file)
        refused()
        file.unlink()
    file.mkdir()
    refused()
    assert target.read_text("utf-8") == "untouched"


def test_a_folder_of_leases_behind_a_link_is_refused(claims: Claims, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    claims.folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a symbolic link"):
        claims.take(KEY)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*choose another path"):
        Claims(tmp_path / "file" / ".locks").take(KEY)


def test_a_cell_that_cannot_be_claimed_fails_before_anything_is_sampled(
    digits: Model, make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    session = make_session(n=4)
    monkeypatch.setattr(module, "_write_new", full)
    outcome = engine.run_cell(session, make_cell(digits, "ddim", None, 2), lambda *_: pytest.fail("it was sampled"))
    assert type(outcome.error) is RunError
    assert "No space left on device" in outcome.record["error"]


# --- Waiting -------------------------------------------------------------------------------------------------------


def test_who_holds_a_cell_is_said_once_and_then_every_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = 0.0, []
    monkeypatch.setattr(time, "monotonic", lambda: now)
    waiting = Waiting(said.append, "ddim, 10 steps")
    owner = dataclasses.replace(
        Owner.me(), pid=77, host="box", since="2026-01-02T03:04:05+00:00", command="samplerbench run -s a\x1b[31m\nb"
    )
    pauses = []
    for now in (float(t) for t in range(130)):  # noqa: B007 - the clock above reads it
        pauses += [waiting.pause(owner)]
    who = "process 77 on box, since 2026-01-02 03:04:05 UTC: samplerbench run -s a\\x1b[31m\\nb"
    assert said == [
        f"ddim, 10 steps: waiting for another run that works on this cell ({who}). Ctrl-C stops waiting.",
        f"ddim, 10 steps: still waiting after 1 min ({who}).",
        f"ddim, 10 steps: still waiting after 2 min ({who}).",
    ]
    assert max(pauses) <= 1.0  # so fast an interrupt is seen
    waiting.pause(dataclasses.replace(owner, token="f" * 32, pid=78))
    assert "process 78" in said[-1]


def test_a_run_that_does_not_wait_goes_past_a_claimed_cell(digits: Model, make_session: MakeSession) -> None:
    session, cell = make_session(n=4), make_cell(digits, "ddim", None, 2)
    key = engine.digest(session.measurement.protocol(cell))
    lease = taken(Claims(session.execution.store.claims.folder), key)
    with pytest.raises(Claimed):
        engine.run_cell(session, cell, None, False)
    lease.release()
    assert not engine.run_cell(session, cell, None, False).reused
    lease = taken(Claims(session.execution.store.claims.folder), key)
    assert engine.run_cell(session, cell).reused  # what is finished needs no claim
    lease.release()


def test_waiting_ends_when_the_other_run_is_done_or_a_stop_is_asked_for(
    digits: Model, make_session: MakeSession
) -> None:
    session, cell = make_session(n=4), make_cell(digits, "ddim", None, 2)
    key = engine.digest(session.measurement.protocol(cell))
    lease = taken(Claims(session.execution.store.claims.folder), key)
    said: list[str] = []
    session.execution.say = said.append
    session.execution.stop = lambda: bool(said)
    with pytest.raises(Stopped):
        engine.run_cell(session, cell)
    assert str(lease.owner) in said[0]
    assert lease.is_held()
    session.execution.stop = lambda: False

    def say(_: str) -> None:
        lease.release()

    session.execution.say = say
    assert engine.run_cell(session, cell).error is None


def test_ctrl_c_ends_waiting_and_what_was_free_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "-m", "exact:mixture", "-s", "ddim", "--steps", "2,3", "--n", "20", "--out", str(tmp_path)]

    def run(*more: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main([*command, *more])
        return int(ended.value.code or 0)

    assert run() == 0
    (first,) = (f for f in tmp_path.glob("*.json") if json.loads(f.read_text("utf-8"))["steps"] == 2)
    for file in tmp_path.glob("*.json"):
        file.unlink()
    lease = taken(Claims(tmp_path / ".locks"), first.stem)
    pause = Waiting.pause

    def interrupted(waiting: Waiting, holder: Owner | None) -> float:
        signal.raise_signal(signal.SIGINT)
        return pause(waiting, holder)

    monkeypatch.setattr(Waiting, "pause", interrupted)
    capsys.readouterr()
    assert run("--json") == 130
    out, err = capsys.readouterr()
    assert [record["steps"] for record in json.loads(out)] == [3]
    assert f"2 steps: waiting for another run that works on this cell ({lease.owner})" in err.replace("\n", " ")
    assert "stopped; 1 of 2 cells are done and kept" in err.splitlines()[-1]
    assert lease.is_held()
    lease.release()
