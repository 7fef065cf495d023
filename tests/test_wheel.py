"""The wheel works without the clone: it is built, installed in a new environment, and runs the first commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"samplerbench": ROOT / "samplerbench", "samplerbench_plugins": ROOT / "plugins" / "samplerbench_plugins"}

pytestmark = pytest.mark.slow


def call(*command: str | Path, cwd: Path, env: dict[str, str] | None = None, timeout: float = 300) -> str:
    """The output of a command that must succeed."""
    ended = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-2000:]}\n{ended.stderr[-3000:]}"
    return ended.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sdist, and of the wheel that is built from the sdist."""
    pytest.importorskip("build", reason="build is not installed")
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (file,) = built.glob("*.whl")
    return file


def sources() -> set[str]:
    """The files of both packages, by their names in the wheel."""
    return {
        f"{package}/{file.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith(".")
    }


def test_the_wheel_has_every_file_of_the_packages_and_no_other(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert {name for name in names if not name.startswith(info)} == sources()
    assert f"{info}/licenses/LICENSE" in names
    assert f"{info}/entry_points.txt" in names
    expected = {
        "samplerbench/py.typed",
        "samplerbench/assets/digits/unet/diffusion_pytorch_model.safetensors",
        "samplerbench/assets/references/digits-train.safetensors",
        "samplerbench/templates/common/pyproject.toml.tmpl",
        "samplerbench/report/page/page.html",
        "samplerbench_plugins/ddim.py",
    }
    assert expected <= names


def test_the_sdist_has_what_the_wheel_is_built_from(built: Path) -> None:
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    plugins = {name.replace("samplerbench_plugins/", "plugins/samplerbench_plugins/", 1) for name in sources()}
    assert plugins <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO"} <= names
    assert not {name for name in names if name.startswith(("benchmarks", "docs", "tests", ".ci", ".github"))}


def test_the_metadata_can_be_shown_by_an_index(built: Path) -> None:
    pytest.importorskip("twine", reason="twine is not installed")
    told = call(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *built.iterdir(), cwd=built)
    assert told.count("PASSED") == 2


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel.

    It takes the packages that samplerbench requires from the environment of this test, without a download. That
    folder comes after its own on the path, and its `.pth` files, with which the clone is installed, are not read.
    """
    folder = tmp_path_factory.mktemp("environment") / "env"
    venv.create(folder, with_pip=False, symlinks=os.name == "posix")
    python = program(folder, "python")
    install = ["-m", "pip", "--python", str(python), "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    call(sys.executable, *install, wheel, cwd=folder)
    own = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "shared.pth").write_text("\n".join([*sorted(shared), ""]), "utf-8")
    return folder


def program(environment: Path, name: str) -> Path:
    """A program of an environment."""
    return environment / ("Scripts" if os.name == "nt" else "bin") / (f"{name}.exe" if os.name == "nt" else name)


@pytest.fixture
def clean(tmp_path: Path) -> dict[str, str]:
    """The variables of a user who has no clone, and an empty cache."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SAMPLERBENCH", "PYTEST", "VIRTUAL"))}
    home = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return kept | home | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


PROBE = """
import json, sys
from importlib.metadata import distribution, entry_points
import samplerbench, samplerbench_plugins
from samplerbench import registry
ddim = registry.load(registry.find("sampler", "ddim"))
modules = [samplerbench, samplerbench_plugins, sys.modules[ddim.__module__]]
print(json.dumps({
    "files": [module.__file__ for module in modules],
    "metadata": str(distribution("samplerbench").locate_file("")),
    "points": len(entry_points(group="samplerbench.samplers")),
    "path": sys.path,
}))
"""


def test_the_code_is_that_of_the_wheel(environment: Path, clean: dict[str, str], tmp_path: Path) -> None:
    told = json.loads(call(program(environment, "python"), "-c", PROBE, cwd=tmp_path, env=clean))
    for place in (*told["files"], told["metadata"]):
        assert Path(place).resolve().is_relative_to(environment.resolve()), place
    assert not {str(ROOT), str(ROOT / "plugins")} & set(told["path"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert told["points"] == len(project["entry-points"]["samplerbench.samplers"])


def test_the_first_commands_run_without_the_clone(environment: Path, clean: dict[str, str], tmp_path: Path) -> None:
    """The README's first command with fewer images, and those that need files of the package."""
    command = program(environment, "samplerbench")

    def run(*arguments: str) -> str:
        return call(command, *arguments, cwd=tmp_path, env=clean)

    (record,) = json.loads(run("run", "--sampler", "ddim", "--steps", "5", "--n", "20", "--json"))
    assert record["nfe"] == 5
    assert record["n"] == 20
    assert 0 < record["metrics"]["fid"]["value"] < 1000
    assert "ddim" in run("list", "samplers")
    run("new", "sampler", "x")
    made = tmp_path / "samplerbench-x"
    assert {"pyproject.toml", "LICENSE", "samplerbench_x.py"} <= {file.name for file in made.iterdir()}
    run("report", "results", "--out", "report", "--format", "md,html")
    assert "ddim" in (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "</html>" in (tmp_path / "report" / "report.html").read_text("utf-8")
