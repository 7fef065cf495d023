"""Nothing outside a results folder is read or written through links in it, and what is no file is never opened."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.synthetic_results import put, record
from typer.testing import CliRunner

from samplerbench.cli.app import app, main
from samplerbench.report.load import load
from samplerbench.results.files import append_line, is_regular, open_regular, read_regular, write_atomically
from samplerbench.results.store import Store

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="links and pipes as POSIX has them")

SECRET = "the content of a file elsewhere"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A file outside of every results folder."""
    file = tmp_path / "elsewhere" / "secret"
    file.parent.mkdir()
    file.write_text(SECRET)
    return file


def link(file: Path, elsewhere: Path) -> None:
    file.symlink_to(elsewhere)


def dangling(file: Path, elsewhere: Path) -> None:
    file.symlink_to(elsewhere.with_name("new"))


def pipe(file: Path, _: Path) -> None:
    os.mkfifo(file)


def device(file: Path, _: Path) -> None:
    file.symlink_to("/dev/zero")


def directory(file: Path, _: Path) -> None:
    file.mkdir()


KINDS: list[Callable[[Path, Path], None]] = [link, dangling, pipe, device, directory]


def unchanged(elsewhere: Path) -> bool:
    return elsewhere.read_text(encoding="utf-8") == SECRET and [f.name for f in elsewhere.parent.iterdir()] == [
        "secret"
    ]


def invoke(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.output + done.stderr + str(done.exception or "")


# --- The functions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_regular_file_is_opened_and_no_pipe_blocks(
    tmp_path: Path, elsewhere: Path, kind: Callable[[Path, Path], None]
) -> None:
    file = tmp_path / "x"
    assert not is_regular(file)
    with pytest.raises(FileNotFoundError):
        read_regular(file)
    kind(file, elsewhere)
    assert not is_regular(file)
    for call in (open_regular, read_regular, lambda f: append_line(f, "more")):
        with pytest.raises(OSError):  # noqa: PT011 - of any kind
            call(file)
    assert unchanged(elsewhere)


def test_a_regular_file_is_read_and_a_line_is_added(tmp_path: Path) -> None:
    append_line(tmp_path / "x", "one")
    append_line(tmp_path / "x", "two")
    assert is_regular(tmp_path / "x")
    assert read_regular(tmp_path / "x") == b"one\ntwo\n"
    with pytest.raises(OSError, match="larger"):
        read_regular(tmp_path / "x", 7)


@pytest.mark.parametrize("kind", [link, dangling, pipe, device])
def test_a_write_replaces_a_link_and_does_not_follow_it(
    tmp_path: Path, elsewhere: Path, kind: Callable[[Path, Path], None]
) -> None:
    kind(tmp_path / "x", elsewhere)
    write_atomically(tmp_path / "x", b"new")
    assert is_regular(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert unchanged(elsewhere)


# --- Readers of a folder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_merge_copies_nothing_through_a_link(
    tmp_path: Path, elsewhere: Path, kind: Callable[[Path, Path], None]
) -> None:
    (file,) = put(tmp_path / "theirs", record())
    kind(file.with_suffix(".png"), elsewhere)
    code, told = invoke("results", "merge", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours"))
    assert code == 0
    assert f"not copied: {file.with_suffix('.png')}" in told
    assert [f.name for f in (tmp_path / "ours").iterdir()] == [file.name]


@pytest.mark.parametrize("kind", KINDS)
def test_merge_writes_nothing_through_a_link(
    tmp_path: Path, elsewhere: Path, kind: Callable[[Path, Path], None]
) -> None:
    (file,) = put(tmp_path / "theirs", record(), shade=10)
    ours = tmp_path / "ours"
    ours.mkdir()
    kind(ours / file.name, elsewhere)
    assert invoke("results", "merge", str(tmp_path / "theirs"), "--out", str(ours))[0] == 0
    assert unchanged(elsewhere)
    (ours / file.name).rename(tmp_path / "aside")
    if kind is not directory:
        kind(ours / f"{file.stem}.png", elsewhere)
    assert invoke("results", "merge", str(tmp_path / "theirs"), "--out", str(ours))[0] == 0
    assert is_regular(ours / f"{file.stem}.png")
    assert unchanged(elsewhere)


@pytest.mark.parametrize("kind", KINDS)
def test_readers_name_what_is_no_file_and_leave_it_where_it_is(
    tmp_path: Path, elsewhere: Path, kind: Callable[[Path, Path], None]
) -> None:
    """A record, a picture, a log and a checkpoint that are links, pipes, devices or folders."""
    folder = tmp_path / "theirs"
    (good,) = put(folder, record("unipc"))
    (true,) = put(tmp_path / "other", record("ddim"))
    odd = [folder / true.name, folder / "run.log", good.with_suffix(".png"), folder / "ab.partial.safetensors"]
    for file in odd:
        # Even a link to a valid record of this very name is not followed.
        kind(file, true if kind is link and file.suffix == ".json" else elsewhere)
    formats = "md,json,html,plots" if kind is link else "md,json"
    for command in (["results", "ls"], ["results", "validate"], ["report", "--format", formats]):
        where = ["--out", str(tmp_path / "out")] if command[0] == "report" else []
        code, told = invoke(*command, str(folder), *where)
        assert code == (1 if command[-1] == "validate" else 0), told
        assert f"{true.name}" in told
        assert SECRET not in told
    loaded = load(folder)
    assert [r["sampler"] for r in loaded.records] == ["unipc"]
    assert loaded.pictures == {}
    assert any(line.startswith("cannot be read (") and true.name in line for line in loaded.problems)
    assert all(os.path.lexists(file) for file in odd)
    assert unchanged(elsewhere)


# --- Writers of a folder --------------------------------------------------------------------------------------------


RUN = ["run", "-m", "exact:gaussian", "-s", "ddim", "--steps", "2", "--n", "20", "--data", "digits"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_writes_nothing_through_what_lies_in_its_folder(
    tmp_path: Path, elsewhere: Path, kind: Callable[[Path, Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    with pytest.raises(SystemExit, match="0"):
        main([*RUN, "--out", str(out)])
    (file,) = out.glob("*.json")
    before = json.loads(file.read_text("utf-8"))
    names = [file.name, f"{file.stem}.partial.safetensors", "run.log"]
    names += [] if kind is directory else [f"{file.stem}.png"]
    shutil.rmtree(out)
    out.mkdir()
    for name in names:
        kind(out / name, elsewhere)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main([*RUN, "--out", str(out)])
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert f"{file.name} is not used: cannot be read" in err
    assert json.loads(file.read_text("utf-8"))["metrics"] == before["metrics"]
    assert is_regular(file)
    assert is_regular(file.with_suffix(".png"))
    assert os.path.lexists(out / f"{file.name}.damaged")
    assert not is_regular(out / "run.log")
    assert unchanged(elsewhere)


def test_a_run_keeps_no_locks_in_a_folder_that_is_a_link(tmp_path: Path, elsewhere: Path) -> None:
    out = tmp_path / "results"
    out.mkdir()
    (out / ".locks").symlink_to(elsewhere.parent)
    code, told = invoke(*RUN, "--out", str(out))
    assert code != 0
    assert f"{out / '.locks'} is a symbolic link, which is not followed; name another `out`." in told
    assert unchanged(elsewhere)


@pytest.mark.parametrize("name", ["report", "report/plots"])
def test_a_report_is_not_written_into_a_folder_that_is_a_link(tmp_path: Path, elsewhere: Path, name: str) -> None:
    folder = tmp_path / "theirs"
    put(folder, record())
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(elsewhere.parent)
    code, told = invoke("report", str(folder), "--format", "md")
    assert code != 0
    assert f"{folder / name} is a symbolic link, which is not followed; name another `out`." in told
    assert unchanged(elsewhere)


def test_a_folder_that_the_user_names_may_be_a_link(tmp_path: Path) -> None:
    (file,) = put(tmp_path / "real", record())
    (tmp_path / "named").symlink_to(tmp_path / "real")
    assert [f.name for f, r in Store(tmp_path / "named").records() if r is not None] == [file.name]
    (tmp_path / "tables").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "tables")
    assert invoke("report", str(tmp_path / "named"), "--format", "md", "--out", str(tmp_path / "out"))[0] == 0
    assert (tmp_path / "tables" / "report.md").exists()
    assert invoke("report", str(tmp_path / "named"), "--format", "md")[0] == 0
    assert (tmp_path / "real" / "report" / "report.md").exists()
