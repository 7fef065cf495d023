"""Write the pages that are made from the code: docs/cli.md, docs/api.md, docs/builtin.md and docs/coming-from.md.

python docs/generate.py            # writes them
python docs/generate.py --check    # exit code 1 if one of them is not what the code says

The pages depend on the code alone: not on the terminal, on the folder, or on how Typer draws its help. What Typer reads
(signatures, annotations, docstrings) is read here.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MADE = "<!-- Generated from the code by docs/generate.py. Edit the code and run it again, not this page. -->"
MODULES = (
    "samplerbench",
    "samplerbench.sampling",
    "samplerbench.testing",
    "samplerbench.metrics",
    "samplerbench.models",
    "samplerbench.data",
    "samplerbench.diffusers",
)


# --- The command line ----------------------------------------------------------------------------------------------


def cli_page() -> str:
    """Every command, its arguments and options, and its examples."""
    from samplerbench.cli.app import app

    commands = list(_commands(app, ()))
    lines = [MADE, "", "# The command line", ""]
    lines += [f"{_sentences(app.info.help)} Every command accepts `--help`.", ""]
    lines += [f"- [`{' '.join(path)}`](#{_anchor(' '.join(path))}): {_first(doc)}" for path, _, doc in commands]
    lines += ["", "Exit codes: 0 for success, 2 for bad input, 1 for a failed run or check, 130 after Ctrl-C."]
    lines += ["", "## Global options", "", *_options(app.registered_callback.callback)]
    for path, function, doc in commands:
        lines += ["", f"## {' '.join(path)}", "", *_command(path, function, doc)]
    return "\n".join(lines) + "\n"


def _commands(app: Any, before: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Callable[..., Any], str]]:
    for command in app.registered_commands:
        name = command.name or command.callback.__name__.replace("_", "-")
        yield (*before, name), command.callback, inspect.getdoc(command.callback) or ""
    for group in app.registered_groups:
        yield from _commands(group.typer_instance, (*before, group.name))


def _command(path: tuple[str, ...], function: Callable[..., Any], doc: str) -> list[str]:
    text, _, examples = re.sub(r"^Examples?:", "\0", doc, count=1, flags=re.M).partition("\0")
    arguments = [p for p in _parameters(function) if not p.flags]
    words = " ".join(p.placeholder for p in arguments)
    lines = ["```text", " ".join(f"samplerbench {' '.join(path)} [OPTIONS] {words}".split()), "```", ""]
    lines += [" ".join(part.split()) + "\n" for part in text.strip().split("\n\n")]
    lines += _options(function)
    found = re.findall(r"`([^`]+)`", examples)
    return [*lines, "", "```bash", *found, "```"] if found else lines


@dataclasses.dataclass
class Parameter:
    """An argument or option as Typer understands it. `flags` is empty for an argument."""

    name: str
    flags: list[str]
    kind: str
    default: str
    help: str
    required: bool
    many: bool

    @property
    def placeholder(self) -> str:
        """`FILE`, `[FILE]`, `FILE...`."""
        name = self.name.upper() + ("..." if self.many else "")
        return name if self.required else f"[{name}]"


def _parameters(function: Callable[..., Any]) -> list[Parameter]:
    import typer

    found = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        annotation, default = parameter.annotation, parameter.default
        if annotation is typer.Context:
            continue
        info, declared = default, []
        if typing.get_origin(annotation) is typing.Annotated:
            annotation, info = typing.get_args(annotation)[:2]
            declared = [info.default] if isinstance(info.default, str) else []
        else:
            default = info.default
        flags: list[str] = []
        if type(info).__name__ == "OptionInfo":
            flags = [*declared, *info.param_decls] or [f"--{parameter.name.replace('_', '-')}"]
        required = default is inspect.Parameter.empty or default is ...
        many = typing.get_origin(annotation) is list
        shown = "required" if required else _default(default) if info.show_default is True else ""
        text = (info.help or "") + (f" Also by `{info.envvar}=1` in the environment." if info.envvar else "")
        name = (info.metavar or parameter.name).strip("[]")
        found.append(Parameter(name, flags, _kind(annotation, info), shown, text, required, many))
    return found


def _default(value: Any) -> str:
    if value is None or value is False or value == []:
        return ""
    return f"`{','.join(map(str, value)) if isinstance(value, list) else value}`"


def _kind(annotation: Any, info: Any) -> str:
    """`whole number ≥ 1`, `a, b or c`; empty for a flag."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        (annotation,) = (a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is list:
        (annotation,) = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(annotation))
    name = {bool: "", str: "text", Path: "path", int: "whole number", float: "number"}[annotation]
    low = "" if info.min is None else f" ≥ {info.min:g}"
    high = "" if info.max is None else f" ≤ {info.max:g}" if info.max < 2**53 else " < 2⁶⁴"
    return name + low + ("," if low and high else "") + high


def _options(function: Callable[..., Any]) -> list[str]:
    parameters = _parameters(function)
    if not parameters:
        return []
    lines = ["| | value | default | |", "| --- | --- | --- | --- |"]
    for p in parameters:
        name = ", ".join(f"`{flag}`" for flag in p.flags) or f"`{p.placeholder}`"
        lines.append(f"| {name} | {_cell(p.kind)} | {_cell(p.default)} | {_cell(p.help)} |")
    return lines


# --- Built-in plugins ----------------------------------------------------------------------------------------------


def builtin_page() -> str:
    """Every built-in plugin, with what `samplerbench show` says of it."""
    from samplerbench import registry
    from samplerbench.options import parameters_of, show_value

    lines = [MADE, "", "# The built-in plugins", ""]
    lines += ["What `samplerbench show NAME` prints, for all that comes with samplerbench.", ""]
    for plural, kind in registry.KINDS.items():
        names = [e.name for e in registry.entries(kind)]
        lines.append(f"- **{plural.capitalize()}**: " + ", ".join(f"[`{n}`](#{_anchor(f'{kind} {n}')})" for n in names))
    for plural, kind in registry.KINDS.items():
        lines += ["", f"## {plural.capitalize()}"]
        for entry in registry.entries(kind):
            cls = registry.load(entry)
            lines += ["", f"### {kind} {entry.name}", "", *_prose(inspect.getdoc(cls) or "")]
            if kind == "sampler":
                spacing = getattr(cls, "spacing", None) or registry.default("spacing")
                lines += ["", f"Default spacing: `{spacing}`."]
            if known := parameters_of(cls):
                lines += ["", "| parameter | type | bounds | default | meaning |", "| --- | --- | --- | --- | --- |"]
            for p in known.values():
                default = show_value(p.default) or '""'
                cells = (f"`{p.name}`", p.type_name, p.range, f"`{default}`", p.help)
                lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n"


# --- Names in other software ---------------------------------------------------------------------------------------


COMING_FROM = """
# Names in other software

What samplers and spacings of k-diffusion, ComfyUI, Stable Diffusion web UI (A1111), diffusers and papers are called
here. These names are not accepted as specs, but the error for an unknown name gives the equivalent:

```text
samplerbench run --sampler dpmpp_2m --steps 20
samplerbench: no sampler "dpmpp_2m": it is called dpm++ here.
```

Case, `-`, `_` and spaces do not matter, nor do the prefixes `sample_` and `k_` and the suffix `_gpu`. In
`DPM++ 2M Karras` the last word is the spacing: `--sampler dpm++ --spacing karras`.

- **Same as** names a scheduler of diffusers that gives the same images with the same network, noise and grid:
  `tests/test_foreign_names.py` runs each of them and compares the images to a relative difference of 10⁻⁴. For methods
  that diffusers does not have, the column names a test, which compares the method with its formula or its paper. If the
  column is empty, the spec is a scheduler of diffusers or the nearest method, and the note names the difference.
- **The default spacing differs.** These programs take the spacing from a separate setting. To compare with them, set
  `--spacing`, for example `trailing` for `timestep_spacing=trailing`.
- **The noise differs.** A stochastic sampler is the same method, but its images differ from those of another program,
  because the random numbers differ.
- Every supported scheduler of diffusers is also available unchanged, as
  [`diffusers/NAME`](builtin.md#sampler-diffusers).

[Accuracy of the solvers](solvers.md#differences-from-diffusers-and-the-papers) gives the size of the differences.
"""


def coming_from_page() -> str:
    """The names of samplers and spacings in other software."""
    from samplerbench_plugins import foreign_names

    lines = [MADE, COMING_FROM.rstrip()]
    for software in dict.fromkeys(row.software for row in foreign_names.TABLE):
        lines += ["", f"## {software}"]
        for kind in ("sampler", "spacing"):
            rows = [row for row in foreign_names.TABLE if (row.software, row.kind) == (software, kind)]
            if rows:
                lines += ["", f"| {kind} there | here | same as | note |", "| --- | --- | --- | --- |"]
            for row in rows:
                names = ", ".join(f"`{name}`" for name in row.names)
                spec = f"`{row.spec}`" if row.spec else "not available"
                spec += f" with the spacing `{row.spacing}`" if row.spacing else ""
                shown_by = f"`{row.shown_by}`" if row.shown_by else ""
                lines.append("| " + " | ".join(_cell(cell) for cell in (names, spec, shown_by, row.note)) + " |")
    return "\n".join(lines) + "\n"


# --- The Python API ------------------------------------------------------------------------------------------------


def api_page() -> str:
    """Every name that a public module exports, with its signature and docstring."""
    lines = [MADE, "", "# The Python API", "", "What a program or a plugin may rely on: the names below."]
    places = _home()
    for path in MODULES:
        module = importlib.import_module(path)
        lines += ["", f"## {path}", "", *_prose(inspect.getdoc(module) or "")]
        if not hasattr(module, "__all__"):
            raise SystemExit(f"{path} has no __all__: what of it is public?")
        for name in module.__all__:
            if name.startswith("__"):
                continue
            if places[id(getattr(module, name))] != path:
                there = places[id(getattr(module, name))]
                lines += ["", f"`{name}` is [that of {there}](#{_anchor(f'{there}.{name}')})."]
                continue
            lines += ["", f"### {path}.{name}", "", *_member(name, getattr(module, name))]
    return "\n".join(lines) + "\n"


def _home() -> dict[int, str]:
    """The module a name is described in, by the object's id: the first that exports it."""
    found: dict[int, str] = {}
    for path in MODULES:
        module = importlib.import_module(path)
        for name in getattr(module, "__all__", ()):
            found.setdefault(id(getattr(module, name)), path)
    return found


def _member(name: str, value: Any) -> list[str]:
    if inspect.isclass(value):
        return _class(name, value)
    if callable(value) and not typing.get_origin(value) and inspect.isfunction(value):
        return [*_fenced(f"def {name}{_signature(value, wrapped=True)}"), "", *_prose(inspect.getdoc(value) or "")]
    return _fenced(f"{name} = {value}")


def _class(name: str, cls: type) -> list[str]:
    bases = [b.__name__ for b in cls.__bases__ if b not in (object, typing.Generic)]
    head = f"class {name}({', '.join(bases)})" if bases else f"class {name}"
    fields = [f"    {f.name}: {_annotation(f.type)}{_value(f)}" for f in _fields(cls)]
    own = vars(cls).get("__init__")
    if not fields and inspect.isfunction(own) and len(inspect.signature(own).parameters) > 1:
        written = f"def __init__{_signature(own, wrapped=True)}"
        fields = [f"    {line}" for line in written.split("\n")]
    lines = [*_fenced("\n".join([head + (":" if fields else ""), *fields])), "", *_prose(_doc(cls))]
    for attribute, member in vars(cls).items():
        if attribute.startswith("_"):
            continue
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if isinstance(member, property):
            title = f"`.{attribute}`"
            doc = _doc(member.fget)
        elif inspect.isfunction(function):
            title = f"`.{attribute}{_signature(function)}`"
            doc = _doc(function)
        else:
            continue
        first, *rest = _prose(doc) or [""]
        if lines[-1] and not lines[-1].startswith("- "):
            lines.append("")
        lines.append(f"- {title}" + (f": {first}" if first else ""))
        lines += [f"  {line}".rstrip() for line in rest]
    return lines


def _doc(value: Any) -> str:
    """Its own docstring: not an inherited one, nor the signature that a dataclass is given as one."""
    text = getattr(value, "__doc__", None) or ""
    if inspect.isclass(value) and text.startswith(f"{value.__name__}("):
        return ""
    return inspect.cleandoc(text)


def _fields(cls: type) -> list[dataclasses.Field[Any]]:
    if not dataclasses.is_dataclass(cls):
        return []
    inherited = {f.name for base in cls.__bases__ if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)}
    return [f for f in dataclasses.fields(cls) if f.name not in inherited and not f.name.startswith("_")]


def _value(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return " = ..."
    return "" if field.default is dataclasses.MISSING else f" = {field.default!r}"


def _annotation(value: Any) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", str(value))


def _signature(function: Callable[..., Any], wrapped: bool = False) -> str:
    """As it is written: annotations are strings already, so no version of Python prints them its own way.

    wrapped: a parameter a line, where one line would be long.
    """
    parts, star = [], False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not star:
            parts.append("*")
        star = star or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        mark = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        text = mark + p.name + ("" if p.annotation is p.empty else f": {_annotation(p.annotation)}")
        if p.default is not p.empty:
            text += (" = " if p.annotation is not p.empty else "=") + _plain(p.default)
        parts.append(text)
    result = inspect.signature(function).return_annotation
    end = "" if result is inspect.Signature.empty else f" -> {_annotation(result)}"
    line = f"({', '.join(parts)}){end}"
    if wrapped and len(line) > 100:
        return "(\n" + "".join(f"    {part},\n" for part in parts) + f"){end}"
    return line


def _plain(value: Any) -> str:
    return value.__name__ if inspect.isfunction(value) or inspect.isclass(value) else repr(value)


# --- Docstrings as Markdown ----------------------------------------------------------------------------------------


def _prose(doc: str) -> list[str]:
    """Paragraphs as they are, code fenced, and `Args:`, `Returns:`, `Raises:` and their like as lists."""
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", doc):
        head, *rest = block.split("\n")
        if rest and re.fullmatch(r"(Args|Attributes|Parameters|Raises|Returns|Yields):", head):
            items: list[str] = []
            for line in rest:
                if items and line.startswith("     "):
                    items[-1] += " " + line.strip()
                else:
                    items.append(line.strip())
            lines += [f"**{head}**", "", *(f"- {_escape(item)}" for item in items), ""]
        elif _is_code(block):
            if lines[-2:] == ["```", ""]:  # the code goes on after an empty line
                lines[-2:] = ["", *inspect.cleandoc(block).split("\n"), "```", ""]
            else:
                lines += [*_fenced(inspect.cleandoc(block)), ""]
        elif block.strip():
            lines += [*(_escape(line.strip()) for line in (head, *rest)), ""]
    return lines[:-1]


def _is_code(block: str) -> bool:
    """Whether a paragraph is Python. Prose does not parse, but for single words, which call and import nothing."""
    try:
        tree = ast.parse(inspect.cleandoc(block))
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Call | ast.Import | ast.ImportFrom | ast.Assign) for node in ast.walk(tree))


def _escape(text: str) -> str:
    """Marks that Markdown would act on, outside of `code`."""
    parts = text.split("`")
    return "`".join(re.sub(r"([*_<|\\])", r"\\\1", part) if i % 2 == 0 else part for i, part in enumerate(parts))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _fenced(text: str) -> list[str]:
    # Not as Python: ruff would format it, and then the page is not what this file writes.
    return ["```text", *text.split("\n"), "```"]


def _first(doc: str) -> str:
    return " ".join(doc.split("\n\n")[0].split())


def _sentences(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def pages() -> dict[Path, str]:
    """The generated pages and their text."""
    return {
        HERE / "cli.md": cli_page(),
        HERE / "api.md": api_page(),
        HERE / "builtin.md": builtin_page(),
        HERE / "coming-from.md": coming_from_page(),
    }


def main() -> None:
    """Write the pages, or with --check say which are stale."""
    os.environ["SAMPLERBENCH_NO_PLUGINS"] = "1"  # what else is installed here is no part of the reference
    stale = {file: text for file, text in pages().items() if not file.exists() or file.read_text("utf-8") != text}
    for file, text in stale.items():
        if "--check" in sys.argv[1:]:
            print(f"{file.relative_to(HERE.parent)} is not what the code says; run: python docs/generate.py")
        else:
            file.write_text(text, "utf-8", newline="\n")
            print(file.relative_to(HERE.parent))
    if stale and "--check" in sys.argv[1:]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
