"""A plugin in a file of its own: `./my_sampler.py:MySampler` wherever a name may stand."""

import json
import pickle
import re
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from samplerbench import plugin_file, registry
from samplerbench.bench.cell import describe_plugin, metric_sources
from samplerbench.bench.suite import load_suite
from samplerbench.cli.app import main
from samplerbench.errors import UserError
from samplerbench.report.reproduce import command
from samplerbench.results.groups import group, merge_metrics
from samplerbench.sampling import Sampler

SAMPLER = '''
    from dataclasses import dataclass
    from samplerbench.sampling import Sampler, Spacing, Step, intervals, option
    from samplerbench_plugins.ddim import DDIM
    import torch

    COUNT = globals().get("COUNT", 0) + 1

    @dataclass(frozen=True)
    class Mine(Sampler):
        """An idea [of today] (this work)."""

        eta: float = option(0.0, "how much of it", ge=0.0, le=1.0)
        problem: str = option("one", "which", positional=True)

        def steps(self, denoise, x, sigmas, noise):
            for s, t in intervals(sigmas):
                yield Step(t, denoise(x, s))

    @dataclass(frozen=True)
    class Even(Spacing):
        """Even in the noise level."""

        def grid(self, levels, steps):
            even = torch.linspace(float(levels[-1]), float(levels[0]), steps, dtype=torch.float64)
            return torch.cat([even, levels.new_zeros(1)])

    @dataclass(frozen=True)
    class Half(Sampler):
        """It has no steps."""

    class Plain:
        """No plugin at all."""
'''
METRIC = '''
    from dataclasses import dataclass
    from samplerbench.metrics import Metric

    @dataclass(frozen=True)
    class Size(Metric):
        """It measures nothing."""

        def start(self, context):
            raise NotImplementedError
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMPLERBENCH_DEBUG", "")
    (tmp_path / "mine.py").write_text(textwrap.dedent(SAMPLER), "utf-8")
    (tmp_path / "size.py").write_text(textwrap.dedent(METRIC), "utf-8")
    return tmp_path


def refused(kind: str, spec: str) -> str:
    with pytest.raises(UserError) as caught:
        registry.parse(kind, spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Specs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "written", "eta", "problem"),
    [
        ("./mine.py:Mine", "./mine.py:Mine/one", 0.0, "one"),
        ("./mine.py:Mine:eta=0.5", "./mine.py:Mine/one:eta=0.5", 0.5, "one"),
        (" mine.py : Mine : eta = 0.5", "mine.py:Mine/one:eta=0.5", 0.5, "one"),
        ("mine.py:Mine/two:eta=1", "mine.py:Mine/two:eta=1", 1.0, "two"),
        ("mine.py:Mine:two", "mine.py:Mine/two", 0.0, "two"),
    ],
)
def test_a_spec_of_a_file_and_the_way_back(here: Path, spec: str, written: str, eta: float, problem: str) -> None:
    made = registry.parse("sampler", spec)
    assert isinstance(made, Sampler)
    assert (made.spec, made.eta, made.problem) == (written, eta, problem)
    assert registry.parse("sampler", made.spec) == made
    assert registry.kind_of(spec) == "sampler"


def test_an_absolute_path_and_one_of_the_home_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    (here / "copy.py").write_text(textwrap.dedent(SAMPLER), "utf-8")
    for path in (f"{here}/mine.py", "~/copy.py"):
        made = registry.parse("spacing", f"{path}:Even")
        assert made.spec == f"{path}:Even"
        assert registry.kind_of(made.spec) == "spacing"
    assert registry.parse("metric", "size.py:Size").spec == "size.py:Size"


def test_parameters_are_checked_as_any_plugin_s(here: Path) -> None:
    assert "eta=2" in refused("sampler", "mine.py:Mine:eta=2")
    assert 'no parameter "et". Did you mean "eta"? Parameters of mine.py:Mine' in refused(
        "sampler", "mine.py:Mine:et=1"
    )


def test_a_registered_name_is_not_taken_for_a_file(here: Path) -> None:
    assert plugin_file.split("ddim:eta=0.5") is None
    assert plugin_file.split("list:levels=levels.py") is None
    assert registry.split("exact/mixture:components=3") == ("exact", "mixture", "components=3")


@pytest.mark.parametrize(
    ("spec", "more", "expected"),
    [
        ("ddim", "eta=1", "ddim:eta=1"),
        ("ddim:eta=1", "x=2", "ddim:eta=1,x=2"),
        ("a.py:B", "eta=1", "a.py:B:eta=1"),
        ("a.py:B:eta=1", "x=2", "a.py:B:eta=1,x=2"),
        ("a.py:B", "", "a.py:B"),
    ],
)
def test_a_spec_is_extended(spec: str, more: str, expected: str) -> None:
    assert registry.extend(spec, more) == expected


# --- Errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("none.py:Mine", "none.py: there is no such file; write PATH.py:CLASS with the path of a Python file."),
        ("folder.py:Mine", "folder.py: it is a folder; "),
        ("mine.py", "mine.py: name the class, as in mine.py:Mine. The sampler classes in it: Mine, Half."),
        ("mine.py::eta=1", "mine.py: name the class, as in mine.py:Mine. "),
        ("mine.py:Mien", 'mine.py has no class "Mien". Did you mean "Mine"? The sampler classes in it: Mine, Half.'),
        ("mine.py:DDIM", 'mine.py has no class "DDIM".'),  # it only imports it
        ("mine.py:COUNT", 'mine.py has no class "COUNT".'),
        ("mine.py:Even", "mine.py:Even is not a sampler: it must be a subclass of samplerbench.sampling.Sampler. "),
        ("mine.py:Plain", "mine.py:Plain is not a sampler: it must be a subclass of samplerbench.sampling.Sampler. "),
        ("mine.py:Half", "does not define steps."),
        (
            "size.py:Size",
            "size.py:Size is not a sampler: it must be a subclass of samplerbench.sampling.Sampler. It has no",
        ),
    ],
)
def test_what_a_file_does_not_have_is_one_line(here: Path, spec: str, reason: str) -> None:
    (here / "folder.py").mkdir()
    assert reason in refused("sampler", spec)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = 1\ndef broken(:\n", "bad.py cannot be imported: line 2: SyntaxError: invalid syntax."),
        ("\n\nimport no_such_module_at_all\n", "line 3: ModuleNotFoundError: No module named 'no_such_module_at_all'."),
        ("raise SystemExit('no GPU')\n", "bad.py cannot be imported: line 1: SystemExit: no GPU."),
        ("x = '\0'", "bad.py cannot be imported: SyntaxError: source code string cannot contain null bytes."),
        ("def f():\n    return 1 / 0\n\nf()\n", "bad.py cannot be imported: line 2: ZeroDivisionError: "),
    ],
)
def test_a_file_that_cannot_be_imported_says_where(here: Path, source: str, reason: str) -> None:
    (here / "bad.py").write_text(source, "utf-8")
    before = set(sys.modules)
    assert reason in refused("sampler", "bad.py:Mine")
    assert not [name for name in set(sys.modules) - before if name.startswith("samplerbench_file_")]


def test_ctrl_c_while_a_file_is_imported_is_not_the_file_s(here: Path) -> None:
    (here / "bad.py").write_text("raise KeyboardInterrupt", "utf-8")
    with pytest.raises(KeyboardInterrupt):
        registry.parse("sampler", "bad.py:Mine")


def test_the_kind_is_told_by_the_class(here: Path) -> None:
    with pytest.raises(
        UserError, match=r"mine\.py:Plain is not a sampler or guidance or spacing: it must be a subclass"
    ):
        registry.kind_of("mine.py:Plain")


# --- Modules -------------------------------------------------------------------------------------------------------


def test_two_files_with_a_class_of_one_name_do_not_collide(here: Path) -> None:
    (here / "other").mkdir()
    (here / "other" / "mine.py").write_text(textwrap.dedent(SAMPLER).replace("0.0, ", "1.0, "), "utf-8")
    first, second = (registry.parse("sampler", spec) for spec in ("mine.py:Mine", "other/mine.py:Mine"))
    assert (first.eta, second.eta) == (0.0, 1.0)
    assert type(first).__module__ != type(second).__module__
    for one in (first, second):
        assert pickle.loads(pickle.dumps(one)) == one


def test_a_file_is_imported_once_however_it_is_written(here: Path) -> None:
    classes = {registry.get("sampler", spec) for spec in ("mine.py:Mine", "./mine.py:Mine", f"{here}/mine.py:Mine")}
    classes.add(registry.get("sampler", "mine.py:Mine"))
    assert len(classes) == 1
    cls = classes.pop()
    assert registry.parse("sampler", f"{here}/mine.py:Mine").spec == f"{cls.name}/one"
    module = sys.modules[cls.__module__]
    assert registry.get("spacing", "mine.py:Even").__module__ == module.__name__
    assert module.COUNT == 1


def test_an_edited_file_is_another_plugin(here: Path) -> None:
    before = registry.parse("sampler", "mine.py:Mine")
    told = describe_plugin(before)
    (here / "mine.py").write_text(textwrap.dedent(SAMPLER).replace("0.0, ", "0.3, "), "utf-8")
    after = registry.parse("sampler", "mine.py:Mine")
    assert (before.eta, after.eta) == (0.0, 0.3)
    assert describe_plugin(before) == told
    assert describe_plugin(after)["source"] != told["source"]


def test_what_it_imports_keeps_its_own_name(here: Path) -> None:
    registry.parse("sampler", "mine.py:Mine")
    assert registry.get("sampler", "ddim").name == "ddim"


# --- The protocol --------------------------------------------------------------------------------------------------


def test_the_protocol_records_the_file_and_its_hash_not_where_it_lies(here: Path) -> None:
    import hashlib

    told = describe_plugin(registry.parse("sampler", "./mine.py:Mine:eta=0.5"))
    assert told == {
        "name": "mine.py:Mine",
        "parameters": {"eta": 0.5, "problem": "one"},
        "distribution": "file mine.py",
        "source": hashlib.sha256((here / "mine.py").read_bytes()).hexdigest()[:16],
    }
    (here / "moved").mkdir()
    (here / "moved" / "mine.py").write_bytes((here / "mine.py").read_bytes())
    assert describe_plugin(registry.parse("sampler", "moved/mine.py:Mine:eta=0.5")) == told


def test_the_source_of_a_metric_is_recorded_unless_it_is_built_in(here: Path) -> None:
    metrics = [registry.parse("metric", spec) for spec in ("fid", "kid:degree=2", "./size.py:Size")]
    assert metric_sources(metrics[:2]) == {}
    assert metric_sources(metrics) == {"metric sources": {"./size.py:Size": plugin_file.hash_of(type(metrics[2]))}}


def record(metric: str, sources: dict[str, str], value: float = 1.0) -> dict[str, Any]:
    """A result of a file's sampler, measured by one metric."""
    fields = {"n": 8, "metrics": [metric]} | ({"metric sources": sources} if sources else {})
    entry = {"value": value, "features": "f", "reference": "r", "better": "lower"}
    return {
        "sampler": "./mine.py:Mine/one:eta=0.5",
        "guidance": None,
        "spacing": "mine.py:Even",
        "steps": 5,
        "budget": None,
        "nfe": 5,
        "n": 8,
        "blocks": 1,
        "seed": 0,
        "model": "digits",
        "labels": "none",
        "metrics": {registry.split(metric)[0]: entry},
        "protocol": json.dumps(fields),
        "protocol_fields": fields,
    }


def test_the_command_that_makes_a_result_again_has_the_file(here: Path) -> None:
    words = shlex.split(command(record("./size.py:Size", {})))
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options["--sampler"] == "./mine.py:Mine/one:eta=0.5"
    assert options["--metric"] == "./size.py:Size"
    for kind in ("sampler", "spacing", "metric"):
        assert registry.parse(kind, options[f"--{kind}"]).spec == options[f"--{kind}"]


def test_results_of_two_versions_of_a_file_s_metric_do_not_share_a_table() -> None:
    fid, old, new = record("fid", {}), *(record("a.py:M", {"a.py:M": version}) for version in ("1" * 16, "2" * 16))
    merged = merge_metrics([fid, old])
    assert [set(r["metrics"]) for r in merged] == [{"fid", "a.py:M"}]
    assert merged[0]["protocol_fields"]["metrics"] == ["a.py:M", "fid"]
    assert merged[0]["protocol_fields"]["metric sources"] == {"a.py:M": "1" * 16}
    assert len(merge_metrics([old, new])) == 2
    assert len(group([old, new])) == 2
    assert len(group([fid, old])) == 1


# --- Commands ------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_show_and_check_take_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "./mine.py:Mine") == 0
    out = capsys.readouterr().out
    assert re.search(r"\./mine\.py:Mine  sampler, from file mine\.py [0-9a-f]{16}", out)
    assert "An idea [of today] (this work)." in out
    assert run("check", "./mine.py:Even", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert {one["spec"] for one in told} == {"./mine.py:Even"}
    assert {"documented", "picklable", "grid"} <= {one["check"] for one in told}
    assert run("show", "./mine.py") == 2
    assert capsys.readouterr().err.startswith("samplerbench: ./mine.py: name the class, as in ./mine.py:Mine. ")


def test_a_run_of_a_file_is_recorded_and_found_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "-s", "./mine.py:Mine:eta=0.5", "--spacing", "mine.py:Even", "--steps", "2", "--n", "2"]
    assert run(*arguments, "--json") == 0
    (first,) = json.loads(capsys.readouterr().out)
    assert (first["sampler"], first["spacing"]) == ("./mine.py:Mine/one:eta=0.5", "mine.py:Even")
    assert run(*arguments) == 0
    assert "from an earlier run" in capsys.readouterr().err
    (here / "mine.py").write_text((here / "mine.py").read_text("utf-8") + "\n# edited\n", "utf-8")
    assert run(*arguments) == 0
    assert "from an earlier run" not in capsys.readouterr().err
    assert len(list((here / "results").glob("*.json"))) == 2


def test_a_suite_takes_files(here: Path) -> None:
    suite = here / "suite.toml"
    text = """
        metrics = ["./size.py:Size"]
        [[grid]]
        samplers = ["./mine.py:Mine", "mine.py:Mine/two:eta=1"]
        parameters = { eta = [0.25] }
        steps = [2]
    """
    suite.write_text(text.replace(':eta=1"', '"'), "utf-8")
    expected = ("./mine.py:Mine:eta=0.25", "mine.py:Mine/two:eta=0.25")
    assert load_suite(suite).grids[0].samplers == tuple(registry.parse("sampler", spec) for spec in expected)
    suite.write_text(text.replace("./mine.py:Mine", "./mine.py:Mime"), "utf-8")
    with pytest.raises(UserError, match=r'suite\.toml:4: \./mine\.py has no class "Mime"\. Did you mean "Mine"\?'):
        load_suite(suite)


def test_a_model_in_a_file(here: Path) -> None:
    import torch

    from samplerbench.bench.setup import load_model

    source = """
        from dataclasses import dataclass
        from samplerbench.models import ModelSource
        from samplerbench.models.exact import Exact

        @dataclass(frozen=True)
        class Two(ModelSource):
            '''Two Gaussians.'''

            def load(self, device, dtype):
                return Exact(problem="mixture", components=2).load(device, dtype)
    """
    (here / "two.py").write_text(textwrap.dedent(source), "utf-8")
    assert load_model("./two.py:Two", torch.device("cpu"), "fp32").notes["components"] == "2"
