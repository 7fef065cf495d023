"""`samplerbench new`: what it writes works as it is, and passes its own tests."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from samplerbench import registry
from samplerbench.cli.app import main
from samplerbench.cli.new import render

KINDS = ("sampler", "guidance", "spacing", "generator", "task", "metric", "model")
PUBLIC = {"samplerbench.sampling", "samplerbench.metrics", "samplerbench.models", "samplerbench.testing"}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def installed(folder: Path, target: Path) -> None:
    """What `pip install -e folder` leaves behind in target, apart from the path to the folder itself."""
    project: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    info = target / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", "utf-8"
    )
    lines = [
        line
        for group, points in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]), "utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One distribution of each kind, my-KIND, beside what says that they are installed."""
    site = tmp_path_factory.mktemp("site")
    for kind in KINDS:
        folder = site / f"samplerbench-my-{kind}"
        assert run("new", kind, f"my-{kind}", "--dir", str(folder)) == 0
        installed(folder, site)
    return site


@pytest.fixture
def at_hand(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The distributions can be imported, and the working folder is an empty one."""
    for folder in (*made.glob("samplerbench-my-*"), made):
        monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMPLERBENCH_DEBUG", "")
    yield made
    for kind in KINDS:
        sys.modules.pop(f"samplerbench_my_{kind}", None)
    registry.load.cache_clear()


class Told:
    """A pytest plugin that keeps what became of each test, by its name within its file."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid.rpartition("/")[2]] = report.outcome


@pytest.mark.slow
def test_its_tests_pass_and_run_the_conformance_checks(at_hand: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In this process, where torch and the rest are imported already."""
    tests = [str(file) for kind in KINDS for file in (at_hand / f"samplerbench-my-{kind}" / "tests").glob("*.py")]
    assert len(tests) == len(KINDS)
    told = Told()
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={at_hand}", f"--confcutdir={at_hand}"]
    try:
        code = pytest.main([*options, "-c", str(at_hand / "samplerbench-my-sampler/pyproject.toml"), *tests], [told])
    finally:
        for kind in KINDS:
            sys.modules.pop(f"test_my_{kind}", None)
    assert code == 0, capfd.readouterr().out[-3000:]
    assert set(told.outcomes.values()) <= {"passed", "skipped"}
    for kind, check in zip(
        KINDS, ("order", "steers", "grid", "batch-split", "adjoint", "merge", "posterior-mean"), strict=True
    ):
        name = f"test_my_{kind}.py::test_it_is_what_it_says[my-{kind}-{check}]"
        assert told.outcomes[name] == "passed"
        own = [n for n in told.outcomes if n.startswith(f"test_my_{kind}.py::") and "what_it_says" not in n]
        assert own
        assert {told.outcomes[n] for n in own} == {"passed"}


@pytest.mark.parametrize("kind", KINDS[1:])  # the sampler's checks take longest, and have run in its own tests
def test_check_passes(at_hand: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    assert run("check", f"my-{kind}", "--json") == 0
    assert {r["kind"] for r in json.loads(capsys.readouterr().out)} == {kind}


def test_it_is_installed_without_fault(at_hand: Path) -> None:
    for kind in KINDS:
        entry = registry.find(kind, f"my-{kind}")
        assert entry.origin == f"samplerbench-my-{kind} 0.1.0"
        assert registry.examine(entry) == registry.Finding()
        assert registry.summary(entry)


def test_it_stands_beside_the_rest(at_hand: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All but the guidance in one run: my-model is without labels."""
    words = "run --sampler my-sampler --sampler ddim --model my-model --spacing my-spacing --metric my-metric"
    assert run(*words.split(), "--metric", "fid", "--nfe", "4", "--n", "8", "--json") == 0
    mine, ddim = json.loads(capsys.readouterr().out)
    assert (mine["sampler"], ddim["sampler"], mine["spacing"]) == ("my-sampler", "ddim", "my-spacing")
    assert mine["nfe"] == ddim["nfe"] == 4
    assert set(mine["metrics"]) == {"my-metric", "fid"}
    for metric, found in mine["metrics"].items():  # both are Euler's method, from the same x_T
        assert found["value"] == pytest.approx(ddim["metrics"][metric]["value"], rel=1e-3)


def test_its_guidance_steers(at_hand: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "run --sampler my-sampler --guidance my-guidance:sigma_low=1,sigma_high=1000 --steps 3 --n 2 --json"
    assert run(*words.split()) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["guidance"] == "my-guidance:sigma_low=1,sigma_high=1000"
    # Of the levels of 3 steps, σ_999, σ_666 and σ_333, two or three are above 1.
    levels = json.loads(next(Path("results").glob("*.json")).read_text("utf-8"))["protocol_fields"]["sigmas"][:-1]
    assert found["nfe"] == len(levels) + sum(level > 1 for level in levels)


def test_the_folder_is_complete(made: Path) -> None:
    for kind in KINDS:
        folder = made / f"samplerbench-my-{kind}"
        files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts}
        assert files == {
            *("pyproject.toml", "README.md", "LICENSE", ".gitignore", ".github/workflows/test.yml"),
            *(f"samplerbench_my_{kind}.py", f"tests/test_my_{kind}.py"),
        }
        for file in files:
            assert not re.search(r"\$\w", (folder / file).read_text("utf-8")), file
        readme = (folder / "README.md").read_text("utf-8")
        assert f"my-{kind}" in readme
        assert "python -m pytest -q" in readme
        workflow = (folder / ".github/workflows/test.yml").read_text("utf-8")
        assert "${{ matrix.python }}" in workflow
        assert "http" not in workflow


def test_it_needs_only_what_is_public(made: Path) -> None:
    for file in made.glob("samplerbench-my-*/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                assert module in PUBLIC or module.split(".")[0] != "samplerbench", f"{file.name}: {module}"


def test_it_is_formatted_and_lint_free(made: Path) -> None:
    for words in (("check",), ("format", "--check")):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *words, "--no-cache", str(made)], capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stdout


def test_a_class_is_not_called_as_something_the_file_uses() -> None:
    for kind, name, cls in (
        ("sampler", "noise", "NoiseSampler"),
        ("metric", "metric", "MetricMetric"),
        ("sampler", "two-step", "TwoStep"),
    ):
        files = render(kind, name)
        (source,) = (text for path, text in files.items() if path == f"samplerbench_{name.replace('-', '_')}.py")
        assert f"class {cls}(" in source
        project = tomllib.loads(files["pyproject.toml"])["project"]
        (points,) = project["entry-points"].values()
        assert points == {name: f"samplerbench_{name.replace('-', '_')}:{cls}"}
        for path, text in files.items():
            if path.endswith(".py"):
                ast.parse(text)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("sampler", "My"), 'invalid name "My": use lowercase letters, digits and single hyphens'),
        (("sampler", "my_own"), 'invalid name "my_own"'),
        (("sampler", "2fast"), 'invalid name "2fast"'),
        (("sampler", "a--b"), 'invalid name "a--b"'),
        (("sampler", "a\n"), "invalid name"),
        (("metric", "fid"), "the metric fid already exists, in samplerbench "),
        (("guidance", "none"), 'the name "none" is reserved'),
        (("spacing", "default"), 'the name "default" is reserved'),
        (("sampler", "plugins"), "the module samplerbench_plugins already exists"),
        (
            ("sampler", "mine", "--dir", "there"),
            "there already exists; remove it, or choose another folder with --dir.",
        ),
        (("sampler", "mine", "--dir", "file/inside"), "file/inside cannot be written: Not a directory."),
        (("solver", "mine"), "KIND solver: choose one of sampler, "),
    ],
)
def test_what_it_refuses_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMPLERBENCH_DEBUG", "")
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    assert run("new", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert reason in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "there"]


def test_the_default_folder_is_named_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("new", "spacing", "mine") == 0
    assert "edit samplerbench_mine.py" in capsys.readouterr().out
    assert (tmp_path / "samplerbench-mine" / "samplerbench_mine.py").is_file()
