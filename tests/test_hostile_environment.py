"""What surrounds a command and is not in its hands: the cache, the home folder, other distributions, their plugins."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CPU
from test_registry import GOOD, distribution

import samplerbench
from samplerbench import cache, registry
from samplerbench.bench.batch_size import fastest_batch_size
from samplerbench.bench.cell import versions
from samplerbench.cache import cache_dir, cached_json
from samplerbench.cli.app import main
from samplerbench.data import load_data
from samplerbench.errors import UserError
from samplerbench.metrics.extractors import load_extractor
from samplerbench.metrics.reference import measure_once
from samplerbench.models.exact import exact
from samplerbench.untrusted import user_path

IDENTITY = {"of": "this"}


# --- The cache ------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAMPLERBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(add: dict[str, float] | None = None) -> dict[str, float]:
    """What the cache knows; then `add` is added."""
    with cached_json("numbers", IDENTITY) as known:
        before = dict(known)
        known |= add or {}
    return before


def test_what_is_kept_is_there_the_next_time(root: Path) -> None:
    assert kept({"a": 1.5, "b": 0}) == {}
    assert kept() == {"a": 1.5, "b": 0}
    assert len(list(root.iterdir())) == 1


@pytest.mark.parametrize(
    "values",
    [
        *({"a": value} for value in ("1", None, True, [1], {"b": 1}, float("nan"), float("inf"), -1.0, -float("inf"))),
        *([1, 2], "ab", 3, None, [["a", 1]]),
    ],
)
def test_a_poisoned_cache_is_empty_and_written_anew(root: Path, values: Any) -> None:
    kept({"a": 1.0})
    (file,) = root.iterdir()
    written = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(written | {"values": values}))
    assert kept({"a": 2.0}) == {}
    assert kept() == {"a": 2.0}


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "null", "[]", "\xff", "[" * 200_000, '{"values": {"a": 1}}'),
        '{"identity": {"of": "another"}, "values": {"a": 1}}',
        '{"identity": {"of": "this"}, "values": {"a": ' + "9" * 5000 + "}}",
    ],
)
def test_a_cache_file_of_something_else_is_empty(root: Path, content: str) -> None:
    kept({"a": 1.0})
    (file,) = root.iterdir()
    file.write_bytes(content.encode("latin-1"))
    assert kept() == {}


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "no folder"])
def test_a_cache_that_cannot_be_used_only_costs_time(root: Path, kind: str) -> None:
    kept({"a": 1.0})
    (file,) = root.iterdir()
    file.unlink()
    if kind == "fifo":
        if not hasattr(os, "mkfifo"):
            pytest.skip("this system has no named pipes")
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file)
    else:
        root.rmdir()
        root.write_text("no folder", encoding="utf-8")
    assert kept({"a": 2.0}) == {}


def test_a_cache_that_may_not_be_read_only_costs_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, for whom there is no such folder: the system's answer is put in its place."""

    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    data, extractor = load_data("digits"), load_extractor("digits-cnn", CPU)
    expected = measure_once(data, extractor)
    for name in ("exists", "mkdir"):
        monkeypatch.setattr(Path, name, denied)
    monkeypatch.setattr(cache, "read_text", denied)
    assert kept({"a": 1.0}) == {}
    assert measure_once(data, extractor).moments.n == expected.moments.n


def test_a_poisoned_rate_does_not_choose_the_batch_size(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samplerbench.bench.batch_size._rate", lambda _, size, __: float(size <= 32) + 1)
    model = exact("mixture")
    assert fastest_batch_size(model, 64) == 16
    (file,) = root.iterdir()
    written = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(written | {"values": dict.fromkeys(written["values"], "fast")}))
    assert fastest_batch_size(model, 64) == 16


# --- The home folder ------------------------------------------------------------------------------------------------


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user whom the system does not know, as in many containers."""
    for name in ("SAMPLERBENCH_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(*_: Any) -> Any:
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("pwd.getpwnam", unknown)
    yield
    cache._temporary.cache_clear()


@pytest.mark.usefixtures("nobody")
def test_without_a_home_folder_the_cache_is_temporary() -> None:
    assert cache_dir() == cache_dir()
    assert kept({"a": 1.0}) == {}
    assert kept() == {"a": 1.0}
    assert cache_dir().is_relative_to(os.environ.get("TMPDIR", "/tmp"))


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("home", ["relative", "~", "~nobody"])
def test_an_odd_home_folder_is_none(monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    monkeypatch.setenv("HOME", home)
    assert cache_dir().is_absolute()
    assert kept() == {}


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("name", ["SAMPLERBENCH_CACHE", "XDG_CACHE_HOME"])
def test_a_cache_below_an_unknown_home_is_temporary(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "~someone/cache")
    assert "~" not in str(cache_dir())


def test_a_named_cache_is_taken_with_the_home_folder_resolved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SAMPLERBENCH_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(
    "arguments",
    [
        "run -s ddim --data ~someone/images",
        "run -s ddim --data ~/images",
        "run -s ddim --model ~someone/model",
        "run -s ~someone/mine.py:Mine",
        "run -s ddim --features-weights ~someone/w.pth",
        "run -s ddim -g classifier:weights=~someone/c",
        "run -s ddim -g image-classifier:weights=~someone/c",
        "run -s ddim --spacing list:levels=~someone/list",
        "show ~someone/mine.py:Mine",
        "stats ~someone/images --out x.safetensors",
    ],
)
def test_a_path_below_an_unknown_home_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMPLERBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("SAMPLERBENCH_DEBUG", "")
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "home" in err


@pytest.mark.parametrize("text", ["a\0b", "x" * 5000, "x/" * 5000])
def test_what_cannot_be_a_path_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="cannot be the name of a file"):
        user_path(text)


# --- Other distributions --------------------------------------------------------------------------------------------


def python(*path: Path, code: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "SAMPLERBENCH_DEBUG"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, cwd=path[0], capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of distributions, in front of all others."""
    monkeypatch.syspath_prepend(tmp_path)
    registry.load.cache_clear()
    return tmp_path


def test_an_entry_points_file_that_cannot_be_decoded_hides_nothing(fresh: Path) -> None:
    before = {(e.kind, e.name) for kind in registry.BASES for e in registry.entries(kind)}
    distribution(fresh, "bad_bytes", "", {"x": "bad_bytes:X"})
    (fresh / "bad_bytes-1.0.dist-info" / "entry_points.txt").write_bytes(b"[samplerbench.samplers]\n\xff\xfe = x:Y\n")
    distribution(fresh, "bad_metadata", "", {"other": "bad_metadata:X"})
    (fresh / "bad_metadata-1.0.dist-info" / "METADATA").write_bytes(b"Name: \xff\xfe\n")
    after = {(e.kind, e.name) for kind in registry.BASES for e in registry.entries(kind)}
    assert after - before <= {("sampler", "other")}
    assert before <= after
    assert [line for line in registry.unreadable() if "bad_bytes-1.0" in line and "UnicodeDecodeError" in line]
    assert registry.parse("sampler", "ddim").spec == "ddim"


EVIL = "import pathlib\npathlib.Path({mark!r}).touch()\n" + textwrap.dedent(GOOD)


@pytest.mark.parametrize("name", ["samplerbench", "Samplerbench", "SAMPLERBENCH"])
def test_another_distribution_of_this_name_is_not_trusted(fresh: Path, tmp_path: Path, name: str) -> None:
    """Wherever it is on the path. It neither hides what is built in, nor is its code imported by `list`."""
    mark = tmp_path / "MARK"
    before = {kind: registry.entries(kind) for kind in registry.BASES}
    defaults = registry.default("spacing")
    distribution(fresh, "evil", EVIL.format(mark=str(mark)), {"evil": "evil:Good", "ddim": "evil:Good"})
    info = fresh / "samplerbench-99.0.dist-info"
    (fresh / "evil-1.0.dist-info").rename(info)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
    assert {kind: registry.entries(kind) for kind in registry.BASES} == before
    assert registry.default("spacing") == defaults
    assert versions()["samplerbench"] == samplerbench.__version__
    assert str(info) in registry.other_installations()
    assert registry.failures(e for entries in before.values() for e in entries).keys() <= {
        e for entries in before.values() for e in entries if e.distribution != registry.OWN
    }
    assert not mark.exists()


def test_the_own_distribution_is_where_this_package_is() -> None:
    own = registry.own_distribution()
    assert own is not None
    assert own.metadata["Name"] == registry.OWN
    assert str(own._path) not in registry.other_installations()


def test_a_copy_that_is_not_installed_trusts_no_distribution_of_this_name(tmp_path: Path) -> None:
    """A checkout on the path, beside an installation elsewhere: what that one registers is usable, and foreign."""
    shutil.copytree(
        Path(samplerbench.__file__).parent, tmp_path / "samplerbench", ignore=shutil.ignore_patterns("*.pyc")
    )
    told = python(
        tmp_path,
        code="""
            import samplerbench
            from samplerbench import registry
            print(samplerbench.__file__)
            print(sorted({e.distribution for e in registry.entries("sampler") if e.name == "ddim"}))
        """,
    ).splitlines()
    assert told == [str(tmp_path / "samplerbench" / "__init__.py"), "['samplerbench (another installation)']"]


# --- Plugins that do not return -------------------------------------------------------------------------------------


SLEEPER = "import time\ntime.sleep(600)\n"
ASKER = "answer = input('Run the code of this plugin? ')\n" + textwrap.dedent(GOOD)


def test_a_plugin_that_sleeps_at_import_is_a_row(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given a time; those beside it are looked at, with a time of their own."""
    monkeypatch.setattr(registry, "IMPORT_SECONDS", 1)
    distribution(fresh, "sleeper", SLEEPER, {"asleep": "sleeper:Asleep"})
    entry = registry.find("sampler", "asleep")
    found = registry.findings([entry])
    assert found[entry].error == "its import takes longer than 1 seconds"


def test_a_plugin_can_ask_nothing(fresh: Path) -> None:
    distribution(fresh, "asker", ASKER, {"asking": "asker:Good"})
    entry = registry.find("sampler", "asking")
    assert "EOFError" in registry.findings([entry])[entry].error


def test_of_a_slow_child_only_the_one_at_work_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child answers for one, is ended, and a new one goes on with the next."""
    entries = [registry.Entry("sampler", name, f"{name}:X", "other", "1") for name in ("a", "b", "c")]
    asked: list[list[str]] = []

    def child(_: str, question: str, waiting: Any) -> tuple[str, str, int | None]:
        names = [row[1] for row in json.loads(question)]
        asked.append(names)
        if names[0] == "b":
            return "", "", None
        return '\0[0, ["", "dull"]]\n', "", None if len(names) > 1 else 0

    monkeypatch.setattr(registry, "_run_child", child)
    found = registry.findings(entries)
    assert asked == [["a", "b", "c"], ["b", "c"], ["c"]]
    assert found[entries[0]] == found[entries[2]] == registry.Finding(remark="dull")
    assert found[entries[1]].error == "its import takes longer than 20 seconds"


def test_source_that_is_nested_too_deeply_has_no_summary(fresh: Path) -> None:
    distribution(fresh, "deep_one", "x = " + "(" * 10_000 + ")" * 10_000, {"deep": "deep_one:Deep"})
    assert registry.summary(registry.find("sampler", "deep")) == ""
