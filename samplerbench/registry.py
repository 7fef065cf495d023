"""The plugin registry: finds plugins through entry points, and creates instances from spec strings.

Plugins are listed without being imported, and imported when they are used. A plugin that cannot be imported raises an
error only where it is used; `samplerbench list` shows the error. A spec can name a class in a file instead of a
registered plugin: `./my_sampler.py:MySampler:eta=0.5`.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, distributions, entry_points
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from samplerbench import entry_point_guard, plugin_file
from samplerbench.attributes import check_attributes
from samplerbench.errors import ArgumentTypeError, SamplerbenchError, UserError
from samplerbench.options import Configurable, build, did_you_mean, list_parameters, nearest, parameters_of
from samplerbench.portable import end_session, new_session
from samplerbench.text import note
from samplerbench.untrusted import parse_json, reason, shorten, user_path

OWN = "samplerbench"
"""The distribution of the built-in plugins. `list` does not test whether they can be imported.

This is the distribution that contains this package. Entry points of another distribution with the same name are
ignored, and `samplerbench plugins` shows it.
"""

OTHER = f"{OWN} (another installation)"
"""The displayed name of a distribution called samplerbench, if the one that contains this package is not installed."""

IMPORT_SECONDS = 20
"""Time limit in seconds for importing a plugin in `samplerbench list` and `samplerbench plugins`."""

SILENT_SECONDS = 3
"""Seconds before these commands print a message that they are waiting for an import."""

NO_PLUGINS = "SAMPLERBENCH_NO_PLUGINS"
"""The environment variable that disables all plugins except the built-in ones."""

BASES = {
    "sampler": "samplerbench.sampling:Sampler",
    "guidance": "samplerbench.sampling:Guidance",
    "spacing": "samplerbench.sampling:Spacing",
    "generator": "samplerbench.sampling:Generator",
    "task": "samplerbench.sampling:Task",
    "model": "samplerbench.models:ModelSource",
    "metric": "samplerbench.metrics:Metric",
    "data set": "samplerbench.data:DataSource",
}
KINDS = {
    "samplers": "sampler",
    "guidances": "guidance",
    "spacings": "spacing",
    "generators": "generator",
    "tasks": "task",
    "models": "model",
    "metrics": "metric",
    "data": "data set",
}


@dataclass(frozen=True)
class Entry:
    """A registered plugin, not imported.

    Attributes:
        kind: sampler, guidance, spacing, generator, task, model, metric or data set.
        name: registered name.
        value: object reference of the entry point, `module:Class`.
        distribution: name of the distribution.
        version: version of the distribution.
    """

    kind: str
    name: str
    value: str
    distribution: str
    version: str

    @property
    def origin(self) -> str:
        """`samplerbench 0.1.0`."""
        return f"{self.distribution} {self.version}".rstrip()


def group_of(kind: str) -> str:
    """The entry-point group of a kind: `samplerbench.samplers`."""
    return f"samplerbench.{next(plural for plural, singular in KINDS.items() if singular == kind)}"


def entries(kind: str) -> list[Entry]:
    """All registered plugins of a kind, sorted by name. A name that two distributions register is listed twice.

    If SAMPLERBENCH_NO_PLUGINS is set, only the built-in plugins.
    """
    return sorted(
        (e for e in _registered(kind, _installed()) if e.distribution == OWN or not no_plugins()),
        key=lambda e: (e.name, e.distribution, e.value),
    )


@functools.lru_cache(maxsize=64)
def _registered(kind: str, installed: object) -> frozenset[Entry]:
    """The entries of a kind. Kept as long as `installed` does not change, because reading them parses many files."""
    points = _points(group_of(kind))
    # Once per distribution, because each access parses a file.
    by_id = {id(point.dist): point.dist for point in points}
    origins = {key: _name_and_version(dist) for key, dist in by_id.items()}
    return frozenset(Entry(kind, point.name, point.value, *origins[id(point.dist)]) for point in points)


def _installed() -> tuple[object, ...]:
    """What changes when a distribution is installed or removed: the search path and the times of its folders."""
    times = []
    for folder in sys.path:
        try:
            times.append((folder, os.stat(folder or ".").st_mtime_ns))
        except OSError:
            times.append((folder, 0))
    return entry_points, own_distribution, tuple(times)


def no_plugins() -> bool:
    """Whether plugins of other distributions are disabled."""
    return os.environ.get(NO_PLUGINS, "").lower() not in ("", "0", "false", "no", "off")


def _points(group: str) -> list[EntryPoint]:
    try:
        found = list(entry_points(group=group))
    except Exception:  # one unreadable entry_points.txt hides those of all other distributions
        found = [point for dist in distributions() for point in _points_of(dist) if point.group == group]
    if (own := own_distribution()) is None:
        return found
    named = {key: _name_and_version(dist)[0] for key, dist in {id(p.dist): p.dist for p in found}.items()}
    others = [p for p in found if _normalised(named[id(p.dist)]) != OWN]
    return others + [p for p in _points_of(own) if p.group == group]


def _normalised(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


@functools.cache
def own_distribution() -> Any:
    """The distribution that contains this package, identified by its files; None if it is not installed."""
    return next((dist for dist in distributions(name=OWN) if _is_own(dist)), None)


def other_installations() -> list[str]:
    """The folders of other distributions with the name of this one."""
    own = own_distribution()
    mine = None if own is None else getattr(own, "_path", None)
    paths = [getattr(dist, "_path", "unknown") for dist in distributions(name=OWN)]
    return list(dict.fromkeys(str(path) for path in paths if path != mine))


def _is_own(dist: Any) -> bool:
    package = Path(__file__).resolve().parent
    try:
        files = dist.files
        if files is not None and f"{package.name}/__init__.py" not in {str(f) for f in files}:
            return _edited_in(dist, package)
        return Path(str(dist.locate_file(f"{package.name}/__init__.py"))).resolve() == package / "__init__.py"
    except Exception:  # metadata that cannot be read
        return False


def _edited_in(dist: Any, package: Path) -> bool:
    """Whether a distribution is an editable installation of the folder of this package (PEP 610)."""
    written = parse_json(dist.read_text("direct_url.json") or "{}")
    if not written.get("dir_info", {}).get("editable"):
        return False
    return Path(url2pathname(urlparse(written["url"]).path)).resolve() in list(package.parents)[:3]


def _points_of(dist: Any) -> list[EntryPoint]:
    try:
        return list(dist.entry_points)
    except Exception:
        return []


def unreadable() -> list[str]:
    """The folders of distributions whose entry points cannot be read."""
    found = []
    for dist in distributions():
        try:
            entry_point_guard.read(dist)
        except Exception as error:
            found.append(f"{getattr(dist, '_path', 'unknown')}: {type(error).__name__}: {error}")
    return found


def _name_and_version(dist: Any) -> tuple[str, str]:
    try:
        origin = (dist.name, dist.version) if dist else (None, None)
    except Exception:  # if METADATA is missing, newer versions of Python raise, older ones return None
        origin = (None, None)
    name, version = (part if isinstance(part, str) else "" for part in origin)
    if _normalised(name) == OWN and own_distribution() is None:
        name = OTHER
    return name or "unknown", version


def find(kind: str, name: str) -> Entry:
    """The entry of a plugin.

    Args:
        kind: kind of the plugin.
        name: a registered name, a former name (`aliases`), or `PATH.py:CLASS`.

    Raises:
        UserError: no such name, with a suggestion, or with the equivalent of a name of other software; a name that two
            distributions register; or no such file.
    """
    if file := plugin_file.split(name):
        version = plugin_file.source_hash(plugin_file.content(file[0]))
        path = user_path(file[0]).resolve()
        return Entry(kind, name, f"{path}:{file[1]}", f"file {path.name}", version)
    registered = entries(kind)
    if all(e.name != name for e in registered):
        name = current_name(kind, name)
    named = [e for e in registered if e.name == name]
    if not named:
        known = sorted({e.name for e in registered})
        if foreign := name_elsewhere(name, [kind]):
            raise UserError(f'no {kind} "{shorten(name)}": {foreign}')
        meant = current_name(kind, nearest(name, [*known, *aliases(kind)]))
        suggestion = _several(kind, name, known) or (f' Did you mean "{meant}"?' if meant else "")
        raise UserError(f'no {kind} "{shorten(name)}".{suggestion} Known: {", ".join(known) or "none"}.')
    if len(named) > 1:
        raise UserError(f'the {kind} name "{name}" is {collision(named)}.')
    return named[0]


def _several(kind: str, name: str, known: Iterable[str]) -> str:
    """The advice for several names in one spec, such as `ddim,ddpm`, and for a number; "" for other names."""
    parts = name.replace(",", " ").split()
    if len(parts) > 1 and set(parts) <= set(known):
        return f" Write each {kind} as a spec of its own."
    if re.fullmatch(r"[0-9.]+", name) and kind == "guidance":
        return f" Write the name before the scale, as in cfg:{name}."
    return ""


def aliases(kind: str) -> dict[str, str]:
    """The former names of plugins, and the current name of each: `{"isc": "inception-score"}`.

    A distribution declares a former name in the entry-point group `GROUP.aliases`, such as
    `samplerbench.metrics.aliases`. The alias points to the same object as the current name, which the same distribution
    must register. A registered name takes precedence over an alias. Installed aliases are read once per
    import path.
    """
    return dict(_aliases(kind, tuple(sys.path), no_plugins()))


@functools.lru_cache
def _aliases(kind: str, path: tuple[str, ...], alone: bool) -> dict[str, str]:
    registered = entries(kind)
    current = {(e.value, e.distribution): e.name for e in registered}
    names = {e.name for e in registered}
    targets = {
        point.name: current.get((point.value, _name_and_version(point.dist)[0]))
        for point in sorted(_points(f"{group_of(kind)}.aliases"), key=lambda point: point.value)
    }
    return {old: new for old, new in targets.items() if new is not None and old not in names}


def current_name(kind: str, name: str) -> str:
    """The current name of a plugin that may be given by a former name; any other name is returned unchanged."""
    return aliases(kind).get(name, name)


def current_spec(kind: str, spec: str) -> str:
    """A spec with the current name of its plugin: `isc:splits=5` is `inception-score:splits=5`."""
    if plugin_file.split(spec):
        return spec
    former = split(spec)[0]
    return current_name(kind, former) + spec.strip()[len(former) :]


def name_elsewhere(name: str, kinds: Iterable[str]) -> str:
    """What a name of other software is called here, as the end of an error message; "" if it is not known.

    Args:
        name: a name that is not registered as any of `kinds`.
        kinds: the kinds in question. A sampler is also named where a spacing is required, and the reverse.
    """
    kinds = list(kinds)
    if (table := foreign_names()) is None:
        return ""
    known = {kind: {e.name for e in entries(kind)} for kind in ("sampler", "spacing")}
    requested = [kind for kind in known if kind in kinds]
    for kind in requested:
        if row := table.lookup(kind, name, known[kind]):
            return str(row.message)
    for kind in [kind for kind in known if requested and kind not in requested]:
        if name in known[kind]:
            return f"it is a {kind} here."
        if row := table.lookup(kind, name, known[kind]):
            return f"it is the name of a {kind}: {row.message}"
    return ""


def foreign_names() -> Any:
    """The module `foreign_names` beside the built-in samplers; None if they are not installed."""
    modules = {e.value.partition(":")[0] for e in entries("sampler") if e.distribution == OWN}
    for package in sorted({module.rpartition(".")[0] for module in modules} - {""}):
        with suppress(ImportError):
            return import_module(f"{package}.foreign_names")
    return None


def collision(named: Iterable[Entry]) -> str:
    """The error message for a name that several entries use."""
    origins = " and ".join(f"{e.origin} ({e.value})" for e in named)
    return f"registered twice, by {origins}; uninstall one of them"


@functools.cache
def load(entry: Entry) -> type[Configurable]:
    """Import the class of an entry and check it.

    Raises:
        UserError: it cannot be imported, does not exist, or is not a subclass of the base class of its kind.
    """
    target: Any
    if file := plugin_file.split(entry.name):
        _, target = plugin_file.class_in(*file, {entry.kind: _base(entry.kind)})
        # If the path is written in two ways, as ./mine.py and mine.py, the class keeps the first name.
        if plugin_file.split(str(vars(target).get("name"))) is None:
            setattr(target, "name", entry.name)  # noqa: B010
        return _concrete(entry, target)
    module, _, attribute = entry.value.partition(":")
    try:
        target = import_module(module)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (Exception, SystemExit) as error:  # a plugin may raise anything while it is imported
        raise UserError(
            f"the {entry.kind} {entry.name} of {entry.origin} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(target, type) and issubclass(target, _base(entry.kind))):
        raise UserError(
            f"the {entry.kind} {entry.name} of {entry.origin} is not a {BASES[entry.kind].replace(':', '.')}: "
            f"{entry.value} must be a subclass of it."
        )
    if "name" not in vars(target):
        setattr(target, "name", entry.name)  # noqa: B010 - a class attribute that only the base declares
    return _concrete(entry, target)


def _base(kind: str) -> type[Configurable]:
    module, _, name = BASES[kind].partition(":")
    base: type[Configurable] = getattr(import_module(module), name)
    return base


def _concrete(entry: Entry, target: type[Configurable]) -> type[Configurable]:
    if inspect.isabstract(target):
        missing = ", ".join(sorted(getattr(target, "__abstractmethods__", ())))
        raise UserError(f"the {entry.kind} {entry.name} of {entry.origin} does not define {missing}.")
    return target


def get(kind: str, name: str) -> type[Configurable]:
    """The class registered under a name. Raises UserError as `find` and `load` do."""
    return load(find(kind, name))


def parse(kind: str, spec: str | Configurable) -> Any:
    """Create an instance from a spec: `ddim:eta=0.5`, `cfg:scale=2`, `exact:gaussian`.

    A spec is a name, optionally followed by a colon and comma-separated `parameter=value`. A positional parameter can
    be given without its name, after the colon or a slash. So can a number for the first parameter, after the colon, if
    no other parameter is a number: `cfg:2`.

    Args:
        kind: kind of the plugin.
        spec: a spec. The name can be `PATH.py:CLASS`. An instance of the kind is returned unchanged.

    Raises:
        UserError: an unknown name or parameter, an invalid value, or a plugin that cannot be imported.
    """
    if isinstance(spec, Configurable):
        if not isinstance(spec, _base(kind)):
            raise ArgumentTypeError(f"{spec.spec} is a {spec.kind}, but a {kind} is required here.")
        parameters_of(type(spec))  # raises if its parameters are unknown
        check_attributes(spec)
        return spec
    name, first, tail = split(spec)
    if not name:
        raise UserError(f'the {kind} spec "{shorten(spec)}" has no name; write name or name:parameter=value.')
    cls = get(kind, name)
    positional, arguments = [] if first is None else [first], {}
    for part in filter(None, (p.strip() for p in tail.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            positional.append(part)
        elif key.strip() in arguments:
            raise UserError(f"{kind} {name}: {shorten(key.strip())} is given twice. {list_parameters(cls)}")
        else:
            arguments[key.strip()] = value.strip()
    try:
        made = build(cls, arguments, positional, slash=first is not None)
    except (SamplerbenchError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a plugin may raise anything while an instance is created
        raise UserError(f"the {kind} {name} cannot be created: {type(error).__name__}: {reason(error)}") from error
    check_attributes(made)
    return made


def split(spec: str) -> tuple[str, str | None, str]:
    """Split a spec into its name, the text after a slash (or None), and the text after the colon.

    `PATH.py:CLASS` is a name.

    Raises:
        UserError: a path that contains a colon.
    """
    file = plugin_file.split(spec)
    if file is None:
        plugin_file.check_path(spec)
    head, _, tail = (file[1] if file else spec).partition(":")
    name, slash, first = head.partition("/")
    name = f"{file[0]}:{name.strip()}" if file else name.strip()
    return name, first if slash else None, tail


def extend(spec: str, parameters: str) -> str:
    """Add parameters to a spec: `ddim` and `eta=0.5` give `ddim:eta=0.5`."""
    if not parameters:
        return spec
    return f"{spec},{parameters}" if split(spec)[2] else f"{spec.rstrip(': ')}:{parameters}"


def kind_of(spec: str, kinds: Iterable[str] = ("sampler", "guidance", "spacing")) -> str:
    """The first of `kinds` in which the name of a spec is registered.

    Raises:
        UserError: the name is not registered in any of them.
    """
    return kinds_of(spec, kinds)[0]


def kinds_of(spec: str, kinds: Iterable[str]) -> list[str]:
    """All of `kinds` in which the name of a spec is registered. For a class in a file, its kind.

    Raises:
        UserError: the name is not registered in any of them.
    """
    kinds = list(kinds)
    name = split(spec)[0]
    if file := plugin_file.split(name):
        return [plugin_file.class_in(*file, {kind: _base(kind) for kind in kinds})[0]]
    known = {kind: {e.name for e in entries(kind)} | aliases(kind).keys() for kind in kinds}
    if matching := [kind for kind in kinds if name in known[kind]]:
        return matching
    words = sorted(set().union(*known.values()))
    called = " or ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))
    if foreign := name_elsewhere(name, kinds):
        raise UserError(f'no {called} is called "{shorten(name)}": {foreign}')
    raise UserError(f'no {called} is called "{shorten(name)}".{did_you_mean(name, words)}')


def default(kind: str) -> str:
    """The name of the default plugin of a kind, set in the entry-point group `samplerbench.defaults`."""
    known = {e.value: e.name for e in entries(kind)}
    for point in _points("samplerbench.defaults"):
        if point.name == kind and point.value in known:
            return known[point.value]
    raise UserError(f"no default {kind} is installed; name one.")


# --- Information about a plugin without importing it ---------------------------------------------------------------


def source_file(entry: Entry) -> Path | None:
    """The file of an entry's module, found without importing the module or its parents; None if not found."""
    parts = entry.value.partition(":")[0].split(".")
    # The import system finds the top-level package; below it, look for files.
    try:
        spec = importlib.util.find_spec(parts[0])
    except Exception:  # errors of other packages on the import path
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
    """The first line of the docstring of a class, read from its source; "" if it cannot be read."""
    file = source_file(entry)
    if file is None:
        return ""
    try:
        tree = ast.parse(file.read_text("utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):  # the last two for deep nesting
        return ""
    name = entry.value.partition(":")[2]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return (ast.get_docstring(node) or "").strip().split("\n")[0]
    return ""


@dataclass(frozen=True)
class Finding:
    """The problems of an entry.

    Attributes:
        error: why the plugin cannot be used, or "".
        remark: what the plugin lacks although it can be used, or "".
    """

    error: str = ""
    remark: str = ""


def failures(found: Iterable[Entry]) -> dict[Entry, str]:
    """The entries that cannot be used, with their errors."""
    return {entry: finding.error for entry, finding in findings(found).items() if finding.error}


def findings(found: Iterable[Entry]) -> dict[Entry, Finding]:
    """The entries that have problems, with their problems.

    Entries of other distributions are imported in a child process, so that this process does not import torch and is
    not affected by a crash.
    """
    found = list(found)
    by_name: dict[tuple[str, str], list[Entry]] = {}
    for entry in found:
        by_name.setdefault((entry.kind, entry.name), []).append(entry)
    broken = {e: Finding(collision(same)) for same in by_name.values() if len(same) > 1 for e in same}
    foreign = [e for e in found if e not in broken and e.distribution != OWN]
    broken |= {
        e: Finding(f"{e.value} is not in the installation")
        for e in found
        if e.distribution == OWN and not source_file(e)
    }
    return broken | _probe(foreign)


def examine(entry: Entry) -> Finding:
    """The problems of an entry, found by importing it in this process and creating an instance."""
    try:
        cls = load(entry)
        parameters_of(cls)
        cls()
    except SystemExit as error:
        return Finding(f"SystemExit: {error}")
    except UserError as error:
        return Finding(str(error))
    except Exception as error:  # a plugin may raise anything
        return Finding(f"it cannot be created with its defaults: {type(error).__name__}: {error}")
    text = (vars(cls).get("__doc__") or "").strip()
    # The docstring of a dataclass defaults to its signature.
    return Finding(remark="" if text and not text.startswith(f"{cls.__name__}(") else "it has no docstring")


def _probe(foreign: list[Entry]) -> dict[Entry, Finding]:
    if not foreign:
        return {}
    question = json.dumps([[e.kind, e.name, e.value, e.distribution, e.version] for e in foreign])
    code = (
        "import json, sys; from samplerbench import registry as r\n"
        "for i, e in enumerate(json.loads(sys.argv[1])):\n"
        "    try: found = r.examine(r.Entry(*e)); answer = [found.error, found.remark]\n"
        "    except BaseException as error: answer = [str(error) or type(error).__name__, '']\n"
        "    print('\\0' + json.dumps([i, answer]), flush=True)\n"
    )
    # Use the search path of this process in the child process.
    path = [p or str(Path.cwd()) for p in sys.path]
    code = f"import sys; sys.path[:] = {path!r}\n" + code

    def waiting(printed: str) -> None:
        answered = _answers(printed, len(foreign))
        if slow := [e for i, e in enumerate(foreign) if i not in answered]:
            what = f"the {slow[0].kind} {slow[0].name} of {slow[0].origin}"
            note(f"waiting for the import of {what}; it is stopped after {IMPORT_SECONDS} seconds.")

    out, err, end = _run_child(code, question, waiting)
    answers = _answers(out, len(foreign))
    problems = {e: Finding(*(" ".join(t.split()) for t in answers[i])) for i, e in enumerate(foreign) if i in answers}
    problems = {e: finding for e, finding in problems.items() if finding != Finding()}
    remaining = [e for i, e in enumerate(foreign) if i not in answers]
    if end is None and answers and remaining:
        return problems | _probe(remaining)  # the limit applied to all of them; restart with the next one
    if remaining:
        last = (err.strip().splitlines() or [f"exit code {end}"])[-1]
        slow = f"its import takes longer than {IMPORT_SECONDS} seconds"
        problems[remaining[0]] = Finding(slow if end is None else f"its import ended the process: {last}")
        problems |= _probe(remaining[1:])  # the first one ended the process; test the others
    return problems


def _answers(out: str, n: int) -> dict[int, list[str]]:
    """Parse the output of the child process: index of the entry → [error, remark], for n entries."""
    found = {}
    for line in out.splitlines():
        _, mark, answer = line.rpartition("\0")  # a plugin may print text without a newline before the mark
        if mark and (told_of := _answer(answer, n)):
            found[told_of[0]] = told_of[1]
    return found


def _answer(text: str, n: int) -> tuple[int, list[str]] | None:
    """Parse one answer: the index of the entry, and [error, remark]; None for other output of a plugin."""
    try:
        i, why = parse_json(text)
    except (ValueError, TypeError):
        return None
    sound = type(i) is int and 0 <= i < n and isinstance(why, list) and len(why) == 2
    return (i, why) if sound and all(isinstance(part, str) for part in why) else None


def _run_child(code: str, argument: str, waiting: Callable[[str], None]) -> tuple[str, str, int | None]:
    """Run a child process of Python, without stdin. Its own child processes end with it.

    Args:
        code: the program.
        argument: its command-line argument.
        waiting: called with the output so far, after SILENT_SECONDS.

    Returns:
        stdout, stderr and the exit code, which is None if the process was stopped after IMPORT_SECONDS.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            [sys.executable, "-c", code, argument],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            **new_session(),
        )
        end: int | None = None
        try:
            end = child.wait(min(SILENT_SECONDS, IMPORT_SECONDS))
        except subprocess.TimeoutExpired:
            waiting(_peek(out.fileno()))
            with suppress(subprocess.TimeoutExpired):
                end = child.wait(max(IMPORT_SECONDS - SILENT_SECONDS, 0))
        finally:
            if end is None:
                end_session(child)
        printed = []
        for stream in (out, err):
            stream.seek(0)
            printed.append(stream.read().decode("utf-8", "replace"))
    return printed[0], printed[1], end


def _peek(file: int) -> str:
    """Read a file that a child process writes, without moving the shared position; "" if this is not supported."""
    if not hasattr(os, "pread"):
        return ""
    return os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", "replace")
