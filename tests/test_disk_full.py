"""A full or failing disk: the cell fails with exit code 1, what is finished is kept, the same command continues."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from samplerbench.cli.app import main
from samplerbench.errors import RunError, UserError
from samplerbench.results.files import write_atomically
from samplerbench.results.store import Store, sound

CELLS = ["-m", "exact:mixture", "-s", "ddim", "--n", "20"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["run", *CELLS, *arguments])
    return int(ended.value.code or 0)


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG", "EIO", "ESTALE"])
@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_disk_that_is_full_or_fails_is_a_failure_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, name: str
) -> None:
    if not hasattr(errno, name):
        pytest.skip(f"this system has no {name}")
    number = getattr(errno, name)

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(RunError, match=f"cannot write .*: {os.strerror(number)}; .*same command again") as caught:
        write_atomically(tmp_path / "x.json", b"new")
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["EACCES", "EROFS", "EPERM", "ENAMETOOLONG", "ENOTDIR", "EISDIR"])
def test_a_folder_that_was_never_writable_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = getattr(errno, name)

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="choose another path") as caught:
        write_atomically(tmp_path / "x.json", b"new")
    assert caught.value.exit_code == 2


def test_a_disk_that_is_full_from_the_start_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        Store(tmp_path / "out").prepare()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root on Linux mounts a small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_on_a_disk_that_fills_up_nothing_finished_is_lost(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ballast = small_disk / "ballast"
    steps, out = ["--steps", "1,2,3"], ["--out", str(small_disk / "results")]
    assert run("--steps", "1", *out) == 0
    (finished,) = (small_disk / "results").glob("*.json")
    before = finished.read_bytes()
    status = os.statvfs(small_disk)
    ballast.write_bytes(bytes((status.f_bavail - 2) * status.f_frsize))  # room for less than one more cell
    capsys.readouterr()
    assert run(*steps, *out, "--json") == 1
    printed, err = capsys.readouterr()
    assert "Traceback" not in err
    failed = [record for record in json.loads(printed) if "error" in record]
    assert failed
    assert all("No space left on device; free some space" in record["error"] for record in failed)
    assert finished.read_bytes() == before
    assert all(sound(json.loads(file.read_text("utf-8"))) for file in (small_disk / "results").glob("*.json"))
    ballast.unlink()
    assert run(*steps, *out) == 0
    assert len(list((small_disk / "results").glob("*.json"))) == 3
    assert list((small_disk / "results" / ".locks").iterdir()) == []
    assert not list((small_disk / "results").glob(".*.tmp"))
