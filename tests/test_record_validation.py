"""A sealed record of wrong types is set aside by a run and named by every reader: no mutation ends in a traceback."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.synthetic_results import put, record
from typer.testing import CliRunner

from samplerbench.bench import engine, prepare, request
from samplerbench.cli.app import app, main
from samplerbench.cli.run import _line
from samplerbench.report.load import load
from samplerbench.report.table import long_table, steps_table
from samplerbench.results.record import schema_errors
from samplerbench.results.seal import digest
from samplerbench.results.store import Store

DEEP: Any = [[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]
WRONG: list[Any] = [None, True, -1, 0, 1.5, 3, 10**400, 2**64, 1e308, math.nan, math.inf, "", "x", "3", "\ud800"]
WRONG += ["\x1b[31m", "ä" * 30_000, [], [None], {}, {"a": None}, {"name": 1}, ["fid"], DEEP]


class Missing:
    """In the place of a value: the key is taken out."""


def whole() -> dict[str, Any]:
    """A record with every part that a reader looks at: blocks, guidance, timings, extras."""
    made = record(
        "ddim:eta=0.5",
        guidance="cfg:scale=2.0",
        metrics={"fid": [4.0, 4.1, 4.2], "kid": [0.1, 0.2, 0.3]},
        network_backward=0,
        decoder_passes=0,
        decoder_seconds=0.0,
        processes=1,
        threads=2,
        resumed=0,
        finished="2026-01-01T00:00:00+00:00",
        protocol={"metric sources": {"fid": "ab"}, "classifier": "c", "compile": False},
    )
    timing = {"batch_size": 256, "processes": 1, "device": "cpu", "device_name": "", "threads": 2, "graphs": False}
    measured = {"seconds": 2.0, "decoder_seconds": 0.0, "metric_seconds": 1.0, "images_per_second": 100.0}
    made["timings"] = [timing | measured | {"finished": made["finished"]}]
    made["metrics"]["fid"]["standard_error"] = 0.5
    return made


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within plain data."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*at, key)
        yield from places(part, (*at, key))


def mutated(at: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The whole record with another value at a place, its protocol's hash made anew where that is not the place."""
    made = copy.deepcopy(whole())
    inner: Any = made
    for key in at[:-1]:
        inner = inner[key]
    if isinstance(value, Missing):
        del inner[at[-1]]
    else:
        inner[at[-1]] = value
    if at != ("protocol",) and "protocol_fields" in made:
        made["protocol"] = digest(made["protocol_fields"])
    return made


def seal(folder: Path, made: dict[str, Any]) -> Path:
    """Write a record as a result, sealed, whatever it is."""
    sealed = made | {"seal": digest(made)}
    name = made["protocol"] if isinstance(made.get("protocol"), str) and len(made["protocol"]) == 64 else "0" * 20
    file = folder / f"{name[:20]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(sealed), "utf-8")
    return file


EVERY = [(at, value) for at in places(whole()) for value in (*WRONG, Missing())]


def accepted() -> list[dict[str, Any]]:
    """The mutations that are valid all the same, as another text or number is."""
    return [m for m in (mutated(at, value) for at, value in EVERY) if not schema_errors(m | {"seal": "0" * 64})]


def test_the_record_that_is_mutated_is_valid() -> None:
    assert schema_errors(whole() | {"seal": "0" * 64}) == []
    assert len(EVERY) > 1500


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("steps",), True),
        (("steps",), 10.0),
        (("steps",), "10"),
        (("nfe",), "10"),
        (("nfe",), math.nan),
        (("n",), 10.5),
        (("n",), 10),
        (("blocks",), 2),
        (("seed",), 1),
        (("seed",), 2**64),
        (("sampler",), None),
        (("sampler",), ""),
        (("guidance",), None),
        (("parameters",), []),
        (("metrics",), []),
        (("metrics", "fid"), None),
        (("metrics", "fid", "value"), "4.1"),
        (("metrics", "fid", "value"), True),
        (("metrics", "fid", "value"), 1e200),
        (("metrics", "fid", "sd"), None),
        (("metrics", "fid", "blocks"), [4.0, 4.2]),
        (("metrics", "fid", "blocks"), [4.0, "4.1", 4.2]),
        (("metrics", "fid", "better"), "more"),
        (("metrics", "fid", "standard_error"), [1.0]),
        (("images_per_second",), math.inf),
        (("timings",), {}),
        (("timings", 0, "seconds"), -1.0),
        (("timings", 0, "threads"), True),
        (("protocol_fields", "guidance"), "cfg"),
        (("protocol_fields", "guidance", "parameters"), []),
        (("protocol_fields", "guidance", "parameters", "scale"), 10**400),
        (("protocol_fields", "reference"), []),
        (("protocol_fields", "metrics"), "fid"),
        (("protocol_fields", "metric sources"), ["fid"]),
        (("protocol_fields", "n"), 10),
        (("protocol_fields", "labels"), DEEP),
        (("versions",), {"torch": 2}),
        (("error",), "failed"),
        (("unmet",), "a budget"),
        (("model",), "\ud800"),
    ],
    ids=str,
)
def test_what_a_reader_would_stumble_over_is_no_valid_record(at: tuple[Any, ...], value: Any) -> None:
    made = whole()
    found = made if at in {("error",), ("unmet",)} else None
    bad = mutated(at, value) if found is None else found | {at[0]: value}
    errors = schema_errors(bad | {"seal": "0" * 64})
    assert errors
    assert not any("\n" in line or len(line) > 400 for line in errors)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_may_be_no_number_or_infinite(value: float) -> None:
    made = mutated(("metrics", "fid", "value"), value)
    made["metrics"]["fid"] |= {"blocks": [value, 1.0, 2.0], "sd": math.nan}
    assert schema_errors(made | {"seal": "0" * 64}) == []


@given(
    at=st.sampled_from(list(places(whole()))),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_validation_gives_lines_and_never_raises(at: tuple[Any, ...], value: Any) -> None:
    for made in (mutated(at, value), value):
        assert all(isinstance(line, str) and "\n" not in line for line in schema_errors(made))


def invoke(*arguments: str) -> tuple[int, str]:
    """Exit code and output of a command. A traceback is an exception of another kind, which is raised."""
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        from samplerbench.errors import SamplerbenchError

        if not isinstance(done.exception, SamplerbenchError):
            raise done.exception
        assert "\n" not in str(done.exception)
        return done.exception.exit_code, str(done.exception)
    return done.exit_code, done.output + done.stderr


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_readers_name_every_invalid_record_and_show_the_rest(tmp_path: Path, every: int) -> None:
    """All rejected mutations, in one folder beside one whole result."""
    (good,) = put(tmp_path, record("unipc"))
    (clean,) = put(tmp_path / "clean", record("unipc"))
    names = set()
    for number, (at, value) in enumerate(EVERY[::every]):
        made = mutated(at, value)
        if schema_errors(made | {"seal": "0" * 64}):
            names.add(seal(tmp_path / "bad", made).rename(tmp_path / f"{number}.json").name)
    assert len(names) > 1000 / every
    before = sorted(tmp_path.rglob("*"))
    code, listed = invoke("results", "ls", str(tmp_path))
    assert code == 0
    assert all(name in listed for name in names)
    code, told = invoke("results", "validate", str(tmp_path))
    assert code == 1
    assert told.endswith(f"1 valid, {len(names)} invalid\n")
    loaded = load(tmp_path)
    assert [r["sampler"] for r in loaded.records] == ["unipc"]
    assert sum(any(name in line for line in loaded.problems) for name in names) == len(names)
    assert invoke("report", str(tmp_path), "--format", "md,csv,json,latex", "--out", str(tmp_path / "report"))[0] == 0
    assert invoke("compare", str(tmp_path), str(clean.parent))[0] == 0
    assert invoke("results", "show", good.stem, str(tmp_path))[0] == 0
    assert invoke("results", "merge", str(tmp_path), "--out", str(tmp_path / "merged"))[0] == 0
    assert [f.name for f in (tmp_path / "merged").iterdir()] == [good.name]
    # A reader renames nothing in a folder that may be someone else's.
    assert set(before) <= set(tmp_path.rglob("*"))


@pytest.mark.parametrize("every", [61, *(pytest.param(n, marks=pytest.mark.slow) for n in (13,))])
def test_every_valid_mutation_is_shown_by_every_reader(tmp_path: Path, every: int) -> None:
    """Another text or number in any place of a valid record ends in no traceback, anywhere."""
    made = [copy.deepcopy(one) for one in accepted()[::every]]  # some share a value
    assert len(made) > 100 / every
    for number, one in enumerate(made):
        one["protocol_fields"]["mutation"] = number  # so that each is a file of its own
        one["protocol"] = digest(one["protocol_fields"])
        seal(tmp_path, one)
    code, told = invoke("results", "validate", str(tmp_path))
    assert told.endswith(f"{len(made)} valid, 0 invalid\n")
    assert code == 0
    assert invoke("results", "ls", str(tmp_path))[0] == 0
    assert invoke("results", "show", made[0]["protocol"][:20], str(tmp_path))[0] == 0
    out = str(tmp_path / "report")
    code, told = invoke("report", str(tmp_path), "--format", "md,csv,json,latex,html", "--out", out, "--plot")
    assert code == 0, told
    whole_folder = tmp_path / "whole"
    put(whole_folder, whole())
    for one in made:
        pair = tmp_path / "pair"
        file = seal(pair, one)
        code, told = invoke("compare", str(whole_folder), str(pair))
        assert code in (0, 2), told
        file.unlink()


@pytest.mark.parametrize("formats", ["md,csv,json,latex,html", pytest.param("plots", marks=pytest.mark.slow)])
def test_odd_numbers_in_one_table_are_drawn(tmp_path: Path, formats: str) -> None:
    """One protocol, one row for each odd number, through tables, plots and the page."""
    odd = [math.nan, math.inf, -math.inf, 1e99, -1e99, 1e-99, 0.0, 5e-324]
    rows = [record(f"s{i}", metrics={"fid": [value, 1.0, 2.0]}) for i, value in enumerate(odd)]
    rows += [record(f"t{i}", images_per_second=value) for i, value in enumerate([0.0, 5e-324, 1e15])]
    rows += [record(f"u{i}", nfe=value) for i, value in enumerate([0, 5e-324, 1e15])]
    rows += [record(f"v{i}", guidance=f"cfg:scale={value}") for i, value in enumerate(["nan", "1e99", "0"])]
    put(tmp_path, *rows)
    code, told = invoke("report", str(tmp_path), "--format", formats, "--out", str(tmp_path / "report"), "--plot")
    assert code == 0, told
    assert "left out" not in told
    assert invoke("results", "ls", str(tmp_path))[0] == 0


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[engine.Session, engine.Cell]:
    asked = request.Request([request.Grid(["ddim"], [2])], model="exact:gaussian", n=20, data="digits")
    prepared = prepare.prepare(asked, "cpu")
    store = Store(tmp_path_factory.mktemp("run"))
    return prepare.make_session(prepared, prepare.measure_reference(prepared), 0, store), prepared.cells[0]


def test_a_run_takes_a_valid_record_and_sets_any_other_aside(
    session: tuple[engine.Session, engine.Cell], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every top-level field of a cell's own record, mutated and sealed again; the protocol stays the cell's."""
    run, cell = session
    store = run.execution.store
    first = engine.run_cell(run, cell).record
    stored = {k: v for k, v in (store.get(first["protocol"]) or {}).items() if k != "seal"}
    kept = aside = 0
    for number, name in enumerate([*stored, "more"]):
        for value in (*WRONG, Missing())[number % 4 :: 4]:
            if name == "protocol_fields" or (name, isinstance(value, Missing)) == ("more", True):
                continue
            made = {k: v for k, v in stored.items() if k != name or not isinstance(value, Missing)}
            made |= {} if isinstance(value, Missing) else {name: value}
            (store.path(first["protocol"])).write_text(json.dumps(made | {"seal": digest(made)}), "utf-8")
            found = store.get(first["protocol"])
            err = capsys.readouterr().err
            if found is None:
                aside += 1
                assert err.startswith("samplerbench: warning: ")
                assert err.count("\n") == 1
            else:
                kept += 1
                assert err == ""
                outcome = engine.run_cell(run, cell)
                assert outcome.reused
                _line(outcome, "a cell")
                long_table([outcome.record])
                steps_table([outcome.record], "fid")
    assert aside > 100
    assert kept > 5
    assert len(list(store.folder.glob("*.damaged"))) == aside
    again = engine.run_cell(run, cell)
    assert again.record["metrics"] == first["metrics"]


def test_a_record_of_wrong_types_is_run_again_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "-m", "exact:gaussian", "-s", "ddim", "--steps", "2", "--n", "20", "--data", "digits"]
    command += ["--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="0"):
        main(command)
    (file,) = tmp_path.glob("*.json")
    before = json.loads(file.read_text("utf-8"))
    forged = {k: v for k, v in before.items() if k != "seal"} | {"metrics": {"fid": 3.0}}
    seal(tmp_path, forged)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(command)
    err = capsys.readouterr().err
    assert f"{file.name} is not used: not a result of this version (metrics.fid: " in err
    assert "Traceback" not in err
    assert json.loads(file.read_text("utf-8"))["metrics"] == before["metrics"]
    assert json.loads(file.with_name(file.name + ".damaged").read_text("utf-8"))["metrics"] == {"fid": 3.0}


UNREADABLE = ["[" * 200_000, '{"a":' * 5_000, "1" * 5_000, '{"seal": ' + "9" * 5_000 + "}", "\ufeff{}"]


@pytest.mark.parametrize("text", UNREADABLE, ids=range(5))
def test_json_that_python_cannot_read_is_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / f"{'0' * 20}.json").write_text(text, "utf-8")
    ((file, found),) = Store(tmp_path).records()
    assert found is None
    assert Store(tmp_path).get("0" * 64) is None
    assert not file.exists()


@pytest.mark.parametrize("key", ["", "a", "abc", "xyz0", "../a", "*", "ABCD", "a" * 3 + "é"])
def test_a_key_of_fewer_than_four_digits_names_no_result(tmp_path: Path, key: str) -> None:
    (file,) = put(tmp_path, record())
    for verb in ("rm", "show"):
        code, told = invoke("results", verb, key, str(tmp_path))
        assert code == 2
        assert "is not a key: give the first 4 or more digits" in told
    assert file.exists()


def test_a_key_of_four_digits_or_of_all_names_its_result(tmp_path: Path) -> None:
    for digits in (4, 20, 64):
        (file,) = put(tmp_path, made := record())
        code, told = invoke("results", "rm", made["protocol"][: digits - 1] + "f", str(tmp_path))
        if made["protocol"][digits - 1] != "f":
            assert code == 2
            assert "has no result whose hash begins with" in told
        assert invoke("results", "rm", made["protocol"][:digits], str(tmp_path))[0] == 0
        assert not file.exists()
