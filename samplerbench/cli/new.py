"""`samplerbench new`: create a Python package with an example plugin."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from samplerbench.errors import UserError
from samplerbench.text import say
from samplerbench.untrusted import user_path

Kind = Literal["sampler", "guidance", "spacing", "generator", "task", "metric", "model"]

FILES = {
    "pyproject.toml": "common/pyproject.toml",
    "README.md": "common/README.md",
    "LICENSE": "common/LICENSE",
    ".gitignore": "common/gitignore",
    ".github/workflows/test.yml": "common/test.yml",
    "$module.py": "$kind/plugin.py",
    "tests/test_$identifier.py": "$kind/test.py",
}
"""The template of each file of the new package. Both names contain placeholders."""

USAGE = {
    "sampler": "samplerbench check $name\nsamplerbench run --sampler $name --sampler ddim --nfe 10,20",
    "guidance": "samplerbench check $name\nsamplerbench run -s ddim --guidance $name --guidance cfg --steps 10,20",
    "spacing": "samplerbench check $name\nsamplerbench run --sampler ddim --spacing $name --steps 10,20",
    "generator": "samplerbench check $name\nsamplerbench run --sampler $name --sampler ddim --steps 20",
    "task": "samplerbench check $name\nsamplerbench run --task $name -g diffpir -s ddim --steps 10,20 --metric psnr",
    "metric": "samplerbench check $name\nsamplerbench run --sampler ddim --steps 10,20 --metric $name --metric fid",
    "model": "samplerbench check $name\nsamplerbench run --model $name --sampler ddim --steps 10,20 --n 500",
}

RESERVED = {"guidance": "none", "spacing": "default"}
"""Names with a meaning of their own in commands and suites."""


def new(
    kind: Annotated[Kind, typer.Argument(help="Kind of the plugin.")],
    name: Annotated[str, typer.Argument(help="Name of the plugin: lowercase letters, digits and hyphens.")],
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Folder to create. Default: samplerbench-NAME.", show_default=False)
    ] = None,
) -> None:
    """Create a Python package with a working example plugin and its tests, as a starting point.

    Examples:

    `samplerbench new sampler my-solver`

    `samplerbench new guidance my-guidance --dir ~/src/my-guidance`
    """
    from samplerbench import registry

    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise UserError(
            f'invalid name "{name}": use lowercase letters, digits and single hyphens, starting with a letter, as in '
            f"my-{kind}."
        )
    if name == RESERVED.get(kind):
        raise UserError(f'the name "{name}" is reserved; choose another name.')
    if same := [e for e in registry.entries(kind) if e.name == name]:
        raise UserError(f"the {kind} {name} already exists, in {same[0].origin}; choose another name.")
    if importlib.util.find_spec(_module(name)):
        raise UserError(f"the module {_module(name)} already exists; choose a name other than {name}.")
    target = user_path(f"samplerbench-{name}" if folder is None else folder)
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} already exists; remove it, or choose another folder with --dir.")
    files = render(kind, name)
    try:
        for path, text in files.items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_text(text, "utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}.") from None
    say(f"{target}/ has the {kind} {name}: edit {list(files)[-2]}. Next:")
    say(f"  python -m pip install -e '{target}[test]'")
    say(f"  python -m pytest -q {target}")


def render(kind: str, name: str) -> dict[str, str]:
    """The files of a package with the plugin `name`: path → text. The source file is the last but one."""
    from importlib.resources import files
    from string import Template

    from samplerbench import __version__, registry

    words = {
        "kind": kind,
        "name": name,
        "identifier": name.replace("-", "_"),
        "distribution": f"samplerbench-{name}",
        "module": _module(name),
        "group": registry.group_of(kind),
        "plural": registry.group_of(kind).rpartition(".")[2],
        "version": __version__,
    }
    words["usage"] = Template(USAGE[kind]).substitute(words)
    folder = files("samplerbench") / "templates"
    templates = {
        Template(path).substitute(words): folder.joinpath(Template(source).substitute(words) + ".tmpl").read_text(
            "utf-8"
        )
        for path, source in FILES.items()
    }
    words["cls"] = "".join(part.capitalize() for part in name.split("-"))
    if any(re.search(rf"\b{words['cls']}\b", text) for text in templates.values()):
        words["cls"] += kind.capitalize()  # the class name, for example Noise, is already used in the file
    return {path: Template(text).substitute(words) for path, text in templates.items()}


def _module(name: str) -> str:
    return f"samplerbench_{name.replace('-', '_')}"
