"""A plugin's hash covers the modules of its own package that it imports: an edit there makes another plugin."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from samplerbench import registry
from samplerbench.bench import cell


@pytest.mark.parametrize("absolute", [True, False])
def test_an_edited_helper_changes_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absolute: bool) -> None:
    package = tmp_path / f"helped_{absolute}"
    package.mkdir()
    (package / "__init__.py").touch()
    start = f"from {package.name}" if absolute else "from "
    (package / "mine.py").write_text(f"import os\n{start}.near import VALUE\n\n\nclass Mine:\n    pass\n", "utf-8")
    (package / "near.py").write_text(f"{start}.far import VALUE\n", "utf-8")
    (package / "far.py").write_text("VALUE = 1\n", "utf-8")
    (package / "other.py").write_text("VALUE = 3\n", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    made = importlib.import_module(f"{package.name}.mine").Mine

    def now() -> str:
        cell._file_hash.cache_clear()
        return cell._source_hash(made)

    before = now()
    (package / "other.py").write_text("VALUE = 4\n", "utf-8")
    assert now() == before
    (package / "far.py").write_text("VALUE = 2\n", "utf-8")
    assert now() != before
    for name in [n for n in sys.modules if n.startswith(package.name)]:
        del sys.modules[name]


def test_what_a_built_in_solver_is_made_of_is_in_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """`deis` starts with DPM-Solver's steps, which take φ from a third file; `ddim` is one file."""
    found = {}
    for name in ("deis", "ddim"):
        cls = registry.load(registry.find("sampler", name))
        found[name] = set(cell._siblings(Path(sys.modules[cls.__module__].__file__ or ""), cls.__module__, {}))
    assert found == {"deis": {"dpm_solver.py", "exponential.py"}, "ddim": set()}
