"""The checks in a plugin's own tests, and the command `samplerbench check`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from support.sound_plugins import HigherIsBetter, SoundMetric, SoundModel, Unloadable

from samplerbench import cli, registry, testing
from samplerbench.sampling import UserError
from samplerbench.testing.checks import KINDS, CheckFailedError, checks_for, run_check

# --- In a plugin's own tests ----------------------------------------------------------------------------------------


@testing.parametrize_with_checks(["fid", SoundMetric()], kind="metric")
def test_the_checks_of_a_metric_as_a_parametrisation(check: Callable[[], str]) -> None:
    assert check()


def test_check_functions_raise_all_failures() -> None:
    assert [r.name for r in testing.check_metric("fid")] == [c.name for c in checks_for(SoundMetric())]
    assert all(r.passed is not False for r in testing.check_model(SoundModel()))
    with pytest.raises(CheckFailedError, match=r"HigherIsBetter fails 1 of 16 checks: better: "):
        testing.check_metric(HigherIsBetter())
    with pytest.raises(CheckFailedError, match=r"Unloadable fails 1 of 23 checks: loads: "):
        testing.check_model(Unloadable())


# --- The command ----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


BROKEN = '''
    from dataclasses import dataclass

    from samplerbench.metrics import Accumulator, Metric
    from samplerbench.models import ModelSource
    from samplerbench.sampling import Generator, Guidance, Sampler, Spacing, Step, Task, option


    @dataclass(frozen=True)
    class Fine{base}({base}):
        """One line that says what it is (this work)."""

        def start(self, context): ...
        def load(self, device, dtype): ...
        def predict(self, denoise, x, sigma): ...
        def images(self, index, inputs, seed): ...
        def operator(self, shape): ...
        def grid(self, levels, steps): ...
        def steps(self, denoise, x, sigmas, noise): yield Step(0.0, x)


    @dataclass(frozen=True)
    class Silent(Fine{base}):
        size: int = option(3, "how large", ge=1)


    @dataclass(frozen=True)
    class Default(Fine{base}):
        """Its default is out of its own bounds (this work)."""

        eta: float = option(2.0, "how much", ge=0.0, le=1.0)


    @dataclass(frozen=True)
    class Raising(Fine{base}):
        """It cannot be made (this work)."""

        def __post_init__(self):
            raise RuntimeError("no licence")


    class Nothing:
        """No plugin."""
'''
BASES = {
    "sampler": "Sampler",
    "guidance": "Guidance",
    "spacing": "Spacing",
    "generator": "Generator",
    "task": "Task",
    "metric": "Metric",
    "model": "ModelSource",
}
TAKEN = {
    "sampler": "ddim",
    "guidance": "cfg",
    "spacing": "karras",
    "generator": "autoencoder-prior",
    "task": "denoise",
    "metric": "fid",
    "model": "digits-flow",
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installed distributions whose plugins are broken in every way, one distribution of each kind."""
    site = tmp_path_factory.mktemp("broken")
    for kind, base in BASES.items():
        module = f"broken_{kind}"
        (site / f"{module}.py").write_text(textwrap.dedent(BROKEN.replace("{base}", base)), "utf-8")
        info = site / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: broken-{kind}\nVersion: 1.0\n", "utf-8")
        points = {f"{kind}-{name.lower()}": f"{module}:{name}" for name in ("Silent", "Default", "Raising", "Nothing")}
        points |= {TAKEN[kind]: f"{module}:Fine{base}", f"{kind}-sick": f"sick_{kind}:Sick"}
        lines = [f"[{registry.group_of(kind)}]", *(f"{name} = {value}" for name, value in points.items()), ""]
        (info / "entry_points.txt").write_text("\n".join(lines), "utf-8")
        (site / f"sick_{kind}.py").write_text("import no_such_module\n", "utf-8")
    return site


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "{kind}-sick",
            "the {kind} {kind}-sick of broken-{kind} 1.0 cannot be imported: ModuleNotFoundError: No module",
        ),
        ("{taken}", 'the {kind} name "{taken}" is registered twice, by broken-{kind} 1.0 '),
        ("{kind}-nothing", "the {kind} {kind}-nothing of broken-{kind} 1.0 is not a samplerbench."),
        ("{kind}-default", "{kind} {kind}-default: eta=2: it must be at most 1."),
        ("{kind}-raising", "the {kind} {kind}-raising cannot be created: RuntimeError: no licence"),
    ],
    ids=["import-error", "collision", "wrong-base", "bad-default", "raises"],
)
@pytest.mark.parametrize("kind", ["sampler", "metric", "model"])  # each command takes a tenth of a second
def test_a_broken_plugin_is_one_clear_line(
    broken: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    name: str,
    says: str,
) -> None:
    monkeypatch.syspath_prepend(broken)
    monkeypatch.setenv("SAMPLERBENCH_DEBUG", "")
    words = {"kind": kind, "taken": TAKEN[kind]}
    assert command("check", name.format(**words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("samplerbench: " + says.format(**words))
    assert err.count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_docstring_is_a_failed_check_of_any_kind(
    broken: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.syspath_prepend(broken)
    (documented,) = [c for c in checks_for(registry.parse(kind, f"{kind}-silent")) if c.name == "documented"]
    result = run_check(documented)
    assert (result.passed, result.figure) == (False, "the class has no docstring")


def test_every_other_command_works_beside_broken_plugins(
    broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(broken)
    assert command("check", "recall", "trailing", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert {(r["kind"], r["spec"]) for r in told} == {("metric", "recall"), ("spacing", "trailing")}
    assert command("show", "label-accuracy") == 0
    assert "Ravuri" in capsys.readouterr().out


def test_check_prints_what_it_measured_of_a_metric_and_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("check", "label-accuracy", "exact:mixture,shape=1x2x2") == 0
    out = capsys.readouterr().out
    assert [line.strip() for line in out.splitlines() if line.startswith(KINDS)] == [
        "metric label-accuracy", "model exact/mixture:shape=1x2x2",
    ]  # fmt: skip
    assert "real images 1, noise 0.1" in out
    assert "1 for each D, 2 for both" in out
    assert "FAILED" not in out


def test_a_file_s_class_is_checked_as_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = """
        from dataclasses import dataclass

        from samplerbench.metrics import FeatureStore, Metric


        @dataclass(frozen=True)
        class Grey(Metric):
            '''The mean of all pixels (this work), with the wrong direction: noise is lighter than digits.'''

            better = "higher"

            def start(self, context):
                return Pixels()


        class Pixels(FeatureStore):
            def update(self, batch):
                self.parts.append(batch.images.double().mean(dim=(1, 2, 3)))

            def result(self):
                return {"value": float(self.features().mean())}
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grey.py").write_text(textwrap.dedent(source), "utf-8")
    assert command("check", "./grey.py:Grey", "--json") == 1
    told = {r["check"]: r for r in json.loads(capsys.readouterr().out)}
    assert {r["kind"] for r in told.values()} == {"metric"}
    assert [name for name, r in told.items() if r["passed"] is False] == ["better"]
    assert told["memory"]["figure"] == "keeps what it sees: 8 bytes an image"


def test_a_name_of_several_kinds_is_checked_as_each_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "twins-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: twins\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text(
        f"[samplerbench.metrics]\ntwin = {__name__}:TwinMetric\n[samplerbench.models]\ntwin = {__name__}:TwinModel\n",
        "utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert command("check", "twin", "--json") == 0
    assert {r["kind"] for r in json.loads(capsys.readouterr().out)} == {"metric", "model"}
    assert command("check", "twin", "--kind", "metric", "--json") == 0
    assert {r["kind"] for r in json.loads(capsys.readouterr().out)} == {"metric"}
    assert command("check", "twin", "--kind", "sampler") == 2
    assert 'no sampler is called "twin".' in capsys.readouterr().err


class TwinMetric(SoundMetric):
    """Squared distance of the mean features (Heusel et al. 2017); a model has its name too."""


class TwinModel(SoundModel):
    """A mixture whose denoiser is known; a metric has its name too."""


def test_a_data_set_has_no_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("check", "cifar10") == 2
    assert "cifar10 is a data set, which has no checks; the kinds with checks are sampler," in capsys.readouterr().err
    with pytest.raises(UserError, match="a data set has no checks"):
        checks_for(registry.parse("data set", "digits"))
