"""The layers of docs/architecture.md are those of the source: no import leads upwards, and none in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "samplerbench"
PAGE = (ROOT / "docs/architecture.md").read_text("utf-8")
FACES = {"samplerbench", "samplerbench.__main__"}
"""The package's own names for what is on the top layers, and `python -m samplerbench`."""


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def resolve(module: str, name: str) -> str:
    """The module that `from module import name` reads: a submodule, or the module itself."""
    inner = f"{module}.{name}"
    return inner if inner in FILES else module


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module of the package that is imported when the code runs, inside functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            if (node.module or "").split(".")[0] == "samplerbench":
                yield from (resolve(node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "samplerbench")
        else:
            yield from imported(node)


IMPORTS = {name: set(imported(ast.parse(file.read_text("utf-8")))) - {name} for name, file in FILES.items()}


def layers() -> dict[str, int]:
    """Layer by top-level module, from the page's table."""
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", PAGE, re.MULTILINE)
    return {module: int(number) for number, modules in rows for module in re.findall(r"`(\w+)`", modules)}


def top(module: str) -> str:
    return module.split(".")[1]


def test_the_page_names_every_module() -> None:
    there = {top(name) for name in FILES if name not in FACES}
    # Folders of files that are no modules.
    assert set(layers()) == there


def test_no_import_leads_upwards() -> None:
    known = layers()
    upwards = [
        f"{name} -> {target}"
        for name, targets in IMPORTS.items()
        for target in targets
        if name not in FACES and target not in FACES and known[top(target)] > known[top(name)]
    ]
    assert upwards == []


def test_modules_of_one_layer_do_not_import_each_other_in_a_circle() -> None:
    """Circles of top-level modules, and of single files: both would mean that neither can be read alone."""
    packages: dict[str, set[str]] = {}
    for name, targets in IMPORTS.items():
        if name not in FACES:
            packages.setdefault(top(name), set()).update(top(t) for t in targets if t not in FACES)
    for graph in (packages, {k: v - FACES for k, v in IMPORTS.items() if k not in FACES}):
        assert circles({k: v - {k} for k, v in graph.items()}) == []


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The nodes on circles, and those on a path from one circle to another."""
    left = {name: set(targets) for name, targets in graph.items()}
    while True:
        wanted = set().union(*left.values()) if left else set()
        free = [name for name, targets in left.items() if not targets & left.keys() or name not in wanted]
        if not free:
            return sorted(left)
        for name in free:
            del left[name]


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c"]


def test_every_file_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`([a-z_]+/[a-z_./]+)`", PAGE))
    assert len(named) > 15
    missing = [
        path
        for path in named
        if not any((base / f"{path}{end}").exists() for base in (PACKAGE, ROOT) for end in ("", ".py"))
    ]
    # `data/pixels.quantise` is a function of a file.
    assert [p for p in missing if not (PACKAGE / p.rpartition(".")[0]).with_suffix(".py").exists()] == []
