"""What a reader would refuse is refused where it is made; what is empty, too large or damaged is one line, at once."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, entry_points
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.synthetic_results import record
from torch import Tensor

from samplerbench import entry_point_guard, registry
from samplerbench.bench.setup import pick_extractor, pick_reference
from samplerbench.bench.suite import load_suite
from samplerbench.cli.app import main
from samplerbench.cli.numbers import parse_batch_size, parse_steps
from samplerbench.errors import RunError, UserError
from samplerbench.limits import MAX_KEY_PARTS, MAX_RECORDED_TEXT
from samplerbench.metrics.extractors import Extractor, _misfit, load_extractor
from samplerbench.metrics.guarded import Guarded
from samplerbench.metrics.metric import Accumulator, Batch, Context, Metric
from samplerbench.metrics.reference import load_published
from samplerbench.models import Model
from samplerbench.report.table import format_value
from samplerbench.results.store import Store
from samplerbench.sampling import Denoiser, Noise, Sampler, Step
from samplerbench.sampling.spacing import pick_spacing
from samplerbench.untrusted import parse_toml

# --- Results --------------------------------------------------------------------------------------------------------


class Says(Accumulator):
    """An accumulator with a given result."""

    def __init__(self, result: Any) -> None:
        self.given = result

    def update(self, batch: Batch) -> None:
        pass

    def result(self) -> Any:
        return self.given

    def state(self) -> dict[str, Tensor]:
        return {}

    def merge(self, state: dict[str, Tensor]) -> None:
        pass


@dataclass(frozen=True)
class Claim(Metric):
    """A metric with a given result."""

    def start(self, context: Context) -> Accumulator:
        return Says(RESULT)


RESULT: Any = {}


@dataclass(frozen=True)
class Sideways(Claim):
    """A metric of which neither less nor more is better."""

    better: ClassVar[Any] = "sideways"


def result_of(given: Any) -> dict[str, Any]:
    guarded = Guarded(Claim(), None)  # type: ignore[arg-type]
    guarded.inner = Says(given)
    return guarded.result()


def with_entry(entry: dict[str, Any]) -> dict[str, Any]:
    return record(metrics={"fid": 1.0}) | {
        "metrics": {"claim": entry | {"features": "", "reference": "", "better": "lower"}}
    }


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMPLERBENCH_DEBUG", "")


NUMBERS = (
    st.floats() | st.integers() | st.sampled_from([1e100, 1.1e100, -1e200, 2**63, 2**64, 10**99, 10**101, 10**400])
)
TEXTS = st.text() | st.sampled_from(["\ud800", "a\udfffb", "ä" * 20_000, "x" * 20_001, "x" * 100_000, "\0"])


@settings(max_examples=150, deadline=None)
@given(
    given=st.dictionaries(TEXTS, NUMBERS | TEXTS | st.none() | st.booleans(), max_size=3),
    value=NUMBERS | st.just(np.float32(1e30)),
)
def test_whatever_a_metric_is_let_say_is_read_back(tmp_path_factory: Any, given: dict[str, Any], value: Any) -> None:
    refused, entry = "", {}
    try:
        entry = result_of(given | {"value": value})
    except RunError as error:
        refused = str(error)
    if refused:
        assert len(refused) < 300
        return
    store = Store(tmp_path_factory.mktemp("results"))
    made = with_entry(entry)
    store.put(made)
    found = store.get(made["protocol"])
    assert found is not None
    kept = {name: found["metrics"]["claim"][name] for name in entry}
    assert kept == entry or any(isinstance(x, float) and math.isnan(x) for x in entry.values())


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"value": 1e200}, "value = 1e+200; numbers up to 1e+100 can be recorded."),
        ({"value": 1.0, "more": -1e300}, "more = -1e+300; numbers up to"),
        ({"value": 1.0, "text": "x" * 100_000}, f"texts of up to {MAX_RECORDED_TEXT} characters can be recorded."),
        ({"value": 1.0, "text": chr(0xD800)}, "it has half of a surrogate pair"),
        ({"value": 1.0, chr(0xD800): 1.0}, "which it may not use."),
        ({"value": 1.0} | {f"n{i}": 1 for i in range(100)}, "101 names; at most 100 can be recorded."),
    ],
)
def test_a_result_that_cannot_be_recorded_is_its_metric_s_error(entry: dict[str, Any], reason: str) -> None:
    with pytest.raises(RunError) as refused:
        result_of(entry)
    assert str(refused.value).startswith("metric Claim: result returned")
    assert reason in str(refused.value)
    assert len(str(refused.value)) < 250


def test_a_metric_says_which_way_is_better() -> None:
    with pytest.raises(RunError, match="metric Sideways: better is 'sideways'; it must be"):
        Guarded(Sideways(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"value": 1e200}, "metrics.claim: a number is larger than 1e+100"),
        ({"value": 1.0, "text": "x" * 100_000}, "metrics.claim: a text is longer than 20000 characters"),
        ({"value": 1.0, "text": "\ud800"}, "metrics.claim: a text is not valid Unicode"),
        ({"value": "3"}, "metrics.claim.value: "),
    ],
)
def test_nothing_is_written_that_would_not_be_read(tmp_path: Path, entry: dict[str, Any], reason: str) -> None:
    with pytest.raises(RunError) as refused:
        Store(tmp_path / "results").put(with_entry(entry))
    assert str(refused.value).startswith(f"the result cannot be recorded: {reason}")
    assert len(str(refused.value)) < 400
    assert not list(tmp_path.rglob("*.json"))


def test_large_values_are_short_in_tables() -> None:
    assert format_value(1e99) == "1.0e+99"
    assert format_value(123456.789) == "123456.8"
    assert format_value(math.inf) == "inf"


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match="a: it is a file, not a folder; choose another `out`"):
        Store(tmp_path / "a").prepare()
    with pytest.raises(UserError, match="a is a file, not a folder; choose another `out`"):
        Store(tmp_path / "a" / "b" / "c").prepare()


# --- Suites ---------------------------------------------------------------------------------------------------------

DOTTED = ".".join(["a"] * 20_000)


@pytest.mark.parametrize(
    "text",
    [
        f"{DOTTED} = 1",
        f"[{DOTTED}]",
        f'x = """\n{DOTTED}\n"""""\n{DOTTED} = 1',
        f"y = '''\"\"\"'''\n{DOTTED} = 1",
        f'# """\n{DOTTED} = 1',
        f'x = "\\""\n{DOTTED} = 1',
        '"a" . ' * 60 + "b = 1",
        "x = { " + ".".join(["'a.b'"] * 60) + " = 1 }",
    ],
)
def test_a_key_of_thousands_of_parts_is_refused_before_it_is_parsed(text: str, monkeypatch: Any) -> None:
    def parsed(_: str) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr("samplerbench.untrusted.tomllib.loads", parsed)
    with pytest.raises(ValueError, match=rf"a key has more than {MAX_KEY_PARTS} parts \(at line \d+\)"):
        parse_toml(text)


def test_dots_in_numbers_strings_and_comments_are_no_key() -> None:
    numbers = ", ".join(["0.5", "-1.25e-3", "1979-05-27T07:32:00.5"] * 100)
    strings = f's = "{DOTTED}"\nt = """{DOTTED}"""\n' + f"u = '{DOTTED}'\nv.w = '''\n{DOTTED}'''"
    text = f"# {DOTTED}\nx = [{numbers}]\n{strings}"
    found = parse_toml(text)
    assert found["x"][:2] == [0.5, -0.00125]
    assert found["s"] == found["t"] == found["u"] == found["v"]["w"] == DOTTED


def test_the_line_of_a_long_key_is_its_own(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(f'name = """\n\n"""  # x\n{DOTTED} = 1\n')
    with pytest.raises(UserError, match=r"a\.toml:4: it is not valid TOML: a key has more"):
        load_suite(file)


def test_a_suite_without_a_grid_says_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('name = "x"\n')
    with pytest.raises(UserError, match=r"a\.toml:1: grid is missing; a suite needs at least one \[\[grid\]\]\."):
        load_suite(file)


def test_a_large_suite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most 262,144 are read"):
        parse_toml("#" * 262_145)


# --- Weights and statistics -----------------------------------------------------------------------------------------


def test_weights_of_other_tensors_are_counted_not_listed(tmp_path: Path) -> None:
    file = tmp_path / "tens.pth"
    torch.save({f"other{i}": torch.ones(1) for i in range(10)}, file)
    with pytest.raises(UserError) as refused:
        load_extractor("inception-v3-compat", torch.device("cpu"), str(file))
    assert "tensors are missing, the first " in str(refused.value)
    assert len(str(refused.value)) < 300 + len(str(file))


def test_a_misfit_is_one_short_line() -> None:
    said = 'Error(s) in loading state_dict for X:\n\tUnexpected key(s) in state_dict: "a", "b". '
    assert _misfit(RuntimeError(said)) == '2 tensors are unknown, the first "a".'
    assert _misfit(RuntimeError(f'Missing key(s) in state_dict: "{"k" * 9000}". ')).startswith("one tensor is missing")
    assert len(_misfit(RuntimeError("size mismatch for w: " * 9000))) <= 300


@pytest.mark.parametrize(("mu", "sigma", "what"), [(0.0, 1e308, "covariance"), (1e200, 1.0, "mean"), (0, 1e61, "cov")])
def test_statistics_of_impossible_size_are_the_file_s_fault(
    tmp_path: Path, extractor: Extractor, mu: float, sigma: float, what: str
) -> None:
    file, d = tmp_path / "huge.npz", extractor(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).shape[1]
    np.savez(file, mu=np.full(d, float(mu)), sigma=np.eye(d) * sigma)
    with pytest.raises(UserError, match=rf"huge\.npz: the {what}.* has values above 1e\+"):
        load_published(file, extractor)


# --- Empty values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", ["--data", "--features", "--spacing", "--out", "-o", "--features-weights", "--model"]
)
@pytest.mark.parametrize("empty", ["", " "])
def test_an_option_without_a_value_is_refused(option: str, empty: str, capsys: pytest.CaptureFixture[str]) -> None:
    ways = [[option, empty]] + [[f"{option}="]] * (option.startswith("--") and not empty)
    for way in ways:
        with pytest.raises(SystemExit) as ended:
            main(["run", "-s", "ddim", "--steps", "1", "--n", "2", *way])
        assert ended.value.code == 2
        out, err = capsys.readouterr()
        assert (out, err) == ("", f"samplerbench: {option} is empty; give a value or omit the option.\n")


@dataclass(frozen=True)
class Lost(Sampler):
    """A sampler whose own spacing does not exist."""

    name: ClassVar[str] = "lost"
    spacing: ClassVar[str] = "nosuch"

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        yield Step(0.0, x)


def test_empty_values_of_suites_and_of_the_api_are_refused(digits: Model, extractor: Extractor) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="`data` is empty"):
        pick_reference(digits, "", extractor)
    with pytest.raises(UserError, match="`features` is empty"):
        pick_extractor(digits, "", None, cpu)
    with pytest.raises(UserError, match="`features_weights` is empty"):
        pick_extractor(digits, None, "", cpu)
    with pytest.raises(UserError, match="`spacing` is empty"):
        pick_spacing(Lost(), "")


def test_a_sampler_whose_own_spacing_does_not_exist_is_named() -> None:
    for sampler in (Lost, Lost()):
        with pytest.raises(UserError, match='the default spacing of the sampler lost: no spacing "nosuch"'):
            pick_spacing(sampler)


@pytest.mark.parametrize("text", ["2,,3", "2,3,", ",2", "٢", "1_0", "２"])
def test_steps_are_written_in_plain_digits(text: str) -> None:
    with pytest.raises(UserError, match=f"^--steps {text}: "):
        parse_steps(text)


def test_a_batch_size_is_written_in_plain_digits() -> None:
    with pytest.raises(UserError, match="give a whole number"):
        parse_batch_size("٢")
    assert (parse_batch_size("12"), parse_batch_size("auto"), parse_steps("10, 20,10")) == (12, "auto", [10, 20])


# --- Distributions --------------------------------------------------------------------------------------------------


def distribution(folder: Path, name: str, points: bytes) -> Path:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_bytes(points)
    return info


@pytest.mark.slow
def test_a_run_works_beside_a_damaged_distribution(tmp_path: Path) -> None:
    """torch and pydantic alone raise UnicodeDecodeError there."""
    distribution(tmp_path, "bad", b"[samplerbench.samplers]\n\xff\xfe = x:Y\n")
    command = [sys.executable, "-m", "samplerbench", "run", "-s", "ddim", "--steps", "1", "--n", "2", "--out", "o"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.glob("o/*.json"))


def test_a_damaged_distribution_has_no_entry_points_and_is_still_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = vars(Distribution)["entry_points"]
    monkeypatch.setattr(Distribution, "entry_points", entry_point_guard._read)
    entry_point_guard.check_entry_points()
    assert vars(Distribution)["entry_points"] is entry_point_guard._read  # nothing is damaged, nothing changed
    names = {point.name for point in entry_points(group="samplerbench.samplers")}
    info = distribution(tmp_path, "bad", b"\xff\xfe = x:Y\n")
    monkeypatch.syspath_prepend(tmp_path)
    entry_point_guard.check_entry_points()
    assert {point.name for point in entry_points(group="samplerbench.samplers")} == names
    assert any(str(info) in line for line in registry.unreadable())
    monkeypatch.undo()
    assert vars(Distribution)["entry_points"] is before


def test_list_names_a_damaged_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = distribution(tmp_path, "bad", b"\xff\xfe = x:Y\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["list", "spacings"])
    assert ended.value.code == 0
    assert f"unreadable distribution: {info}: UnicodeDecodeError" in capsys.readouterr().err


def test_a_slow_import_is_named_while_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(600)\n")
    entry = registry.Entry("sampler", "asleep", "sleeper:Asleep", "sleeper", "1.0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "IMPORT_SECONDS", 1)
    monkeypatch.setattr(registry, "SILENT_SECONDS", 0.1)
    assert "takes longer than" in registry.findings([entry])[entry].error
    said = capsys.readouterr().err
    assert "waiting for the import of the sampler asleep of sleeper 1.0; it is stopped after 1 seconds." in said
