"""The built-in plugins have no privilege: they import what is documented, and work as another distribution's."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.denoising import denoiser

from samplerbench import registry
from samplerbench.models.exact import ExactModel, exact
from samplerbench.models.run_view import ModelRun
from samplerbench.models.sample import bind
from samplerbench.options import Configurable
from samplerbench.sampling import Guidance, Noise, Sampler, Spacing
from samplerbench.sampling.driver import drive
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.spacing import bind_spacing, make_grid

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "plugins/samplerbench_plugins").glob("*.py"))
CORE = sorted((ROOT / "samplerbench").rglob("*.py"))
DOCUMENTED = set(
    re.findall(r"^\| `(samplerbench\.\w+)` \|", (ROOT / "docs/plugins.md").read_text("utf-8"), re.MULTILINE)
)
POINTS: dict[str, dict[str, str]] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "entry-points"
]
KINDS = [kind for kind in registry.BASES if kind != "data set"]


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def imports(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """(module, name) of everything imported anywhere in a file; of `import module`, (module, None)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


def registered(package: str = "samplerbench_plugins") -> dict[tuple[str, str], str]:
    """(kind, name) → MODULE:CLASS of the entry points into the package of plugins."""
    return {
        (kind, name): value
        for kind in KINDS
        for name, value in POINTS[registry.group_of(kind)].items()
        if value.startswith(f"{package}.")
    }


# --- What they are made of ------------------------------------------------------------------------------------------


def test_the_documented_modules_are_there() -> None:
    assert {
        "samplerbench.sampling",
        "samplerbench.metrics",
        "samplerbench.models",
        "samplerbench.testing",
    } <= DOCUMENTED
    for name in DOCUMENTED:
        module = importlib.import_module(name)
        assert all(hasattr(module, exported) for exported in module.__all__)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_a_built_in_plugin_imports_only_what_is_documented(file: Path) -> None:
    for module, name in imports(parsed(file)):
        top = module.partition(".")[0]
        if top == "samplerbench":
            assert module in DOCUMENTED, f"{module} is not among the modules of docs/plugins.md"
            assert name in importlib.import_module(module).__all__, f"{module} does not export {name}"
        elif top == "samplerbench_plugins":
            # Its own distribution, of which one plugin may use another's public class, as anybody's may.
            assert name is not None
            assert not name.startswith("_")


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_a_built_in_plugin_reaches_into_nothing(file: Path) -> None:
    """No private attribute of what it is given, and no module by a name in a string."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr):
            assert isinstance(node.value, ast.Name), ast.unparse(node)
            assert node.value.id in ("self", "cls"), ast.unparse(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.match(r"samplerbench[._]", node.value), node.value


def test_the_core_does_not_know_them() -> None:
    """Neither an import nor a string of the core names their package."""
    naming = []
    for file in CORE:
        for node in ast.walk(parsed(file)):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
            naming += [f"{file.name}:{node.lineno}" for text in named if "samplerbench_plugins" in text]
    assert len(CORE) > 50
    assert naming == []


def test_they_are_registered_as_anybody_s_are() -> None:
    """Every class of theirs that is a plugin stands in pyproject.toml, and is of the base that all are of."""
    classes = {}
    for file in SOURCES:
        module = importlib.import_module(f"samplerbench_plugins.{file.stem}")
        own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
        classes |= {
            f"{module.__name__}:{cls.__name__}": cls
            for cls in own
            if issubclass(cls, Configurable) and not inspect.isabstract(cls) and not cls.__name__.startswith("_")
        }
    found = registered()
    assert set(found.values()) == set(classes)
    assert {"sampler", "guidance", "spacing", "generator", "task", "metric"} == {kind for kind, _ in found}
    for (kind, name), value in found.items():
        module_name, _, base = registry.BASES[kind].partition(":")
        assert module_name in DOCUMENTED
        assert base in importlib.import_module(module_name).__all__
        assert issubclass(classes[value], getattr(importlib.import_module(module_name), base))
        entry = registry.find(kind, name)
        assert (entry.value, entry.distribution) == (value, registry.OWN)
        assert registry.load(entry) is classes[value]


# --- As another distribution ----------------------------------------------------------------------------------------

COPY = "third_party_plugins"


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in plugins' files as a third party's distribution, every name with `other-` before it."""
    site = tmp_path_factory.mktemp("copied")
    shutil.copytree(ROOT / "plugins/samplerbench_plugins", site / COPY, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (site / COPY).glob("*.py"):
        file.write_text(file.read_text("utf-8").replace("samplerbench_plugins", COPY), "utf-8")
    info = site / f"{COPY}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {COPY}\nVersion: 1.0\n", "utf-8")
    lines = []
    for kind in KINDS:
        lines.append(f"[{registry.group_of(kind)}]")
        own = {name: value for (k, name), value in registered().items() if k == kind}
        lines += [f"other-{name} = {value.replace('samplerbench_plugins', COPY)}" for name, value in own.items()]
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]), "utf-8")
    return site


@pytest.fixture
def third_party(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(copied)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == COPY]:
        del sys.modules[name]
    registry.load.cache_clear()


def states(model: ExactModel, sampler: Sampler, spacing: Spacing, guidance: Guidance | None = None) -> torch.Tensor:
    bound = spacing if spacing.flows_only else bind_spacing(spacing, ModelRun(model), sampler, 5)
    grid = make_grid(bound, model.levels, 5)
    sampler = bind(model, sampler, grid)
    index = torch.arange(2)
    x = model.prior(normal(0, Purpose.PRIOR, index, 0, model.shape), float(grid[0]))
    denoise = denoiser(model, torch.tensor([0, 1]), 2, guidance)
    return drive(sampler, denoise, x, grid, Noise(0, index, model.shape, torch.float64))


GIVEN = {
    "list": ":levels=80;20;5;1;0.1",
    "gits": ":images=8,points=9",
    "gap-optimal": ":images=4,runs=4",
    "autoguidance": "/exact:problem=mixture,shape=1x2x2,width=0.9",
}


@pytest.mark.filterwarnings("ignore::Warning:diffusers")
def test_their_copy_in_another_distribution_does_the_same(third_party: None) -> None:
    """Another distribution's files with the same lines give the same states, bit for bit."""
    model = exact("mixture", shape="1x2x2")
    observed = model.observed(registry.parse("task", "denoise"), model.real(3)[0])
    made: dict[str, Any] = {}
    for kind, name in registered():
        given = GIVEN.get(name, "")
        one, other = (registry.parse(kind, f"{prefix}{name}{given}") for prefix in ("", "other-"))
        assert type(one) is not type(other)
        assert registry.find(kind, f"other-{name}").distribution == COPY
        assert one.parameters == other.parameters
        assert other.spec.startswith(f"other-{name}")
        made[f"{kind} {name}"] = (one, other)
    euler, even = made["sampler ddim"][0], made["spacing trailing"][0]
    compared = 0
    for what, pair in made.items():
        kind = what.partition(" ")[0]
        if kind == "sampler":
            both = [states(observed if sampler.needs_task else model, sampler, even) for sampler in pair]
        elif kind == "guidance":
            given = observed if pair[0].needs_task else model
            both = [states(given, euler, even, guidance) for guidance in pair]
        elif kind == "task" and what != "task colourise":  # it refuses grey images
            x = normal(1, Purpose.PRIOR, torch.arange(3), 0, (1, 8, 8))
            both = [plugin.operator((1, 8, 8)).forward(x) for plugin in pair]
        elif kind == "spacing":
            both = [states(model, euler, spacing) for spacing in pair]
        else:
            continue
        assert torch.equal(*both), what
        compared += 1
    # Two generators, colourise, and the metrics gap, lpips-gap, psnr-gap, psnr, ssim, lpips, data-fidelity, posterior,
    # spread and coverage.
    assert compared == len(made) - 13
