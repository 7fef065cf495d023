"""The registry: entry points → names → objects, and spec strings → instances.

Names are listed without importing anything. A plugin is imported when it is asked for; one that cannot be imported is
an error where it is used, a row in `samplerbench list`, and nothing to anybody else.
"""

from __future__ import annotations

import ast
import functools
import importlib.machinery
import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from samplerbench.errors import UserError
from samplerbench.options import Configurable, build, did_you_mean, list_parameters

OWN = "samplerbench"
"""The distribution whose plugins are built in. They have no other privilege than that `list` trusts them to import."""

BASES = {
    "sampler": "samplerbench.sampling:Sampler",
    "guidance": "samplerbench.sampling:Guidance",
    "spacing": "samplerbench.sampling:Spacing",
    "model": "samplerbench.models:ModelSource",
    "metric": "samplerbench.metrics:Metric",
    "data set": "samplerbench.data:DataSource",
}
KINDS = {
    "samplers": "sampler",
    "guidances": "guidance",
    "spacings": "spacing",
    "models": "model",
    "metrics": "metric",
    "data": "data set",
}


@dataclass(frozen=True)
class Entry:
    """One registered name: which object, from which distribution. Nothing has been imported."""

    kind: str
    name: str
    value: str
    distribution: str
    version: str

    @property
    def origin(self) -> str:
        """`samplerbench 0.1.0`."""
        return f"{self.distribution} {self.version}"


def group_of(kind: str) -> str:
    """The entry-point group of a kind: `samplerbench.samplers`."""
    return f"samplerbench.{next(plural for plural, singular in KINDS.items() if singular == kind)}"


def entries(kind: str) -> list[Entry]:
    """Everything registered under a kind, by name; a name that two distributions use stands there twice."""
    found = {_entry(kind, point) for point in entry_points(group=group_of(kind))}
    return sorted(found, key=lambda e: (e.name, e.distribution, e.value))


def _entry(kind: str, point: EntryPoint) -> Entry:
    dist = point.dist
    return Entry(kind, point.name, point.value, dist.name if dist else "unknown", dist.version if dist else "")


def find(kind: str, name: str) -> Entry:
    """The one entry of that name.

    Raises:
        UserError: no such name (with the closest), or two distributions that both register it.
    """
    named = [e for e in entries(kind) if e.name == name]
    if not named:
        known = sorted({e.name for e in entries(kind)})
        raise UserError(f'no {kind} "{name}".{did_you_mean(name, known)} Known: {", ".join(known) or "none"}.')
    if len(named) > 1:
        raise UserError(f'the {kind} name "{name}" is {collision(named)}.')
    return named[0]


def collision(named: Iterable[Entry]) -> str:
    """What is wrong with a name that several entries use."""
    origins = " and ".join(f"{e.origin} ({e.value})" for e in named)
    return f"registered twice, by {origins}; uninstall one of them"


@functools.cache
def load(entry: Entry) -> type[Configurable]:
    """The class of an entry, imported and checked.

    Raises:
        UserError: it cannot be imported, is not there, or is not a subclass of its kind's base.
    """
    module, _, attribute = entry.value.partition(":")
    try:
        target: Any = import_module(module)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (Exception, SystemExit) as error:  # whatever a plugin raises while it is imported is the plugin's error
        raise UserError(
            f"the {entry.kind} {entry.name} of {entry.origin} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    base_module, _, base_name = BASES[entry.kind].partition(":")
    base = getattr(import_module(base_module), base_name)
    if not (isinstance(target, type) and issubclass(target, base)):
        raise UserError(
            f"the {entry.kind} {entry.name} of {entry.origin} is no {base_module}.{base_name}: "
            f"{entry.value} must be a subclass of it."
        )
    if inspect.isabstract(target):
        missing = ", ".join(sorted(getattr(target, "__abstractmethods__", ())))
        raise UserError(f"the {entry.kind} {entry.name} of {entry.origin} does not define {missing}.")
    if "name" not in vars(target):
        setattr(target, "name", entry.name)  # noqa: B010 - a class attribute that only the base declares
    return target


def get(kind: str, name: str) -> type[Configurable]:
    """The class registered under a name. Raises UserError as `find` and `load` do."""
    return load(find(kind, name))


def parse(kind: str, spec: str) -> Any:
    """The instance a spec describes: `ddim:eta=0.5`, `cfg:scale=2`, `exact:gaussian`.

    A spec is a name, then after a colon `parameter=value` with commas between them. A parameter declared positional
    may come without its name, after the colon or after a slash.

    Raises:
        UserError: an unknown name or parameter, a value that does not fit, or a plugin that cannot be imported.
    """
    head, _, tail = spec.partition(":")
    name, slash, first = head.partition("/")
    if not name.strip():
        raise UserError(f'the {kind} spec "{spec}" has no name; write name or name:parameter=value.')
    cls = get(kind, name.strip())
    positional, arguments = [first] if slash else [], {}
    for part in filter(None, (p.strip() for p in tail.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            positional.append(part)
        elif key.strip() in arguments:
            raise UserError(f"{kind} {name}: {key.strip()} is given twice. {list_parameters(cls)}")
        else:
            arguments[key.strip()] = value.strip()
    return build(cls, arguments, positional)


def kind_of(spec: str, kinds: Iterable[str] = ("sampler", "guidance", "spacing")) -> str:
    """The kind under which a spec's name is registered, the first of `kinds` that has it.

    Raises:
        UserError: none has it.
    """
    kinds = list(kinds)
    name = spec.partition(":")[0].partition("/")[0].strip()
    known = {kind: {e.name for e in entries(kind)} for kind in kinds}
    for kind in kinds:
        if name in known[kind]:
            return kind
    words = sorted(set().union(*known.values()))
    raise UserError(f'no {", ".join(kinds[:-1])} or {kinds[-1]} is called "{name}".{did_you_mean(name, words)}')


def default(kind: str) -> str:
    """The name used where the user gives none: what the group `samplerbench.defaults` points to."""
    for point in entry_points(group="samplerbench.defaults"):
        if point.name == kind:
            return next(e.name for e in entries(kind) if e.value == point.value)
    raise UserError(f"no default {kind} is installed; name one.")


# --- What can be said of a plugin without importing it -------------------------------------------------------------


def source_file(entry: Entry) -> Path | None:
    """The file an entry's module is in, found without importing the module or its parents; None if not found."""
    parts = entry.value.partition(":")[0].split(".")
    # Only the top level is looked up by the import system; below it, plain files are.
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if len(parts) == 1:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or []:
        base = Path(folder).joinpath(*parts[1:])
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def summary(entry: Entry) -> str:
    """The first line of the class's docstring, read from its source; empty where it cannot be read."""
    file = source_file(entry)
    if file is None:
        return ""
    try:
        tree = ast.parse(file.read_text("utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ""
    name = entry.value.partition(":")[2]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return (ast.get_docstring(node) or "").strip().split("\n")[0]
    return ""


def failures(found: Iterable[Entry]) -> dict[Entry, str]:
    """Which entries cannot be used, and why.

    Collisions are seen at once. Entries of other distributions are imported in a child process, so that what they
    import (torch, say) costs this one nothing and what they break is not this one.
    """
    found = list(found)
    by_name: dict[tuple[str, str], list[Entry]] = {}
    for entry in found:
        by_name.setdefault((entry.kind, entry.name), []).append(entry)
    broken = {e: collision(same) for same in by_name.values() if len(same) > 1 for e in same}
    foreign = [e for e in found if e not in broken and e.distribution != OWN]
    broken |= {
        e: f"{e.value} is not in the installation" for e in found if e.distribution == OWN and not source_file(e)
    }
    return broken | _probe(foreign)


def _probe(foreign: list[Entry]) -> dict[Entry, str]:
    if not foreign:
        return {}
    question = json.dumps([[e.kind, e.name, e.value, e.distribution, e.version] for e in foreign])
    code = (
        "import json, sys; from samplerbench import registry as r\n"
        "for i, e in enumerate(json.loads(sys.argv[1])):\n"
        "    try: r.load(r.Entry(*e)); answer = ''\n"
        "    except BaseException as error: answer = str(error) or type(error).__name__\n"
        "    print('\\0' + json.dumps([i, answer]), flush=True)\n"
    )
    # The child sees the modules that this process would: the same search path, in the same order.
    path = [p or str(Path.cwd()) for p in sys.path]
    code = f"import sys; sys.path[:] = {path!r}\n" + code
    child = subprocess.run(
        [sys.executable, "-c", code, question], capture_output=True, text=True, encoding="utf-8", check=False
    )
    answers = {}
    for line in child.stdout.splitlines():
        _, mark, answer = line.rpartition("\0")  # before the mark: what a plugin printed without ending its line
        if mark:
            i, why = json.loads(answer)
            answers[i] = why
    told = {e: " ".join(answers[i].split()) for i, e in enumerate(foreign) if answers.get(i)}
    if unasked := [e for i, e in enumerate(foreign) if i not in answers]:
        last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        told[unasked[0]] = f"its import ended the process: {last}"
        told |= _probe(unasked[1:])  # what the first of them broke is not the fault of the rest
    return told
