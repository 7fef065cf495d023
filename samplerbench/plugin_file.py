"""Plugins in a single file, without packaging: `./my_sampler.py:MySampler`.

The file is imported by its path under a unique module name, once for each version of its content. Its folder is not on
the import path, because the protocol records only the hash of this file.
"""

from __future__ import annotations

import hashlib
import re
import sys
import traceback
from collections.abc import Mapping
from types import ModuleType

from samplerbench.errors import UserError
from samplerbench.options import did_you_mean
from samplerbench.untrusted import is_dir, is_file, reason, shorten, user_path

_SPEC = re.compile(r"(?P<path>(?:[A-Za-z]:[\\/])?[^:]*\.py)\s*(?::(?P<rest>.*))?", re.DOTALL)
_PREFIX = "samplerbench_file_"


def split(spec: str) -> tuple[str, str] | None:
    """Split a spec that starts with the path of a Python file into the path and the rest; None for other specs."""
    match = _SPEC.fullmatch(spec.strip())
    return match and (match["path"].strip(), (match["rest"] or "").strip())


_COLON = re.compile(r"(?P<path>[^:=,]*[/\\][^:=,]*:[^=,]*\.py)\s*(?::.*)?", re.DOTALL)


def check_path(spec: str) -> None:
    """Raise UserError for a spec that starts with the path of a Python file that contains a colon."""
    if match := _COLON.fullmatch(spec.strip()):
        raise UserError(
            f"{shorten(match['path'])}: the path of a plugin file must not contain a colon, because a colon "
            f"ends the path "
            "in PATH.py:CLASS:parameter=value; rename the file or folder."
        )


def content(path: str) -> bytes:
    """Read a plugin file. Raises UserError if it cannot be read."""
    file = user_path(path)
    if not is_file(file):
        what = (
            "it is a folder"
            if is_dir(file)
            else "it is not a regular file"
            if file.exists()
            else "there is no such file"
        )
        raise UserError(f"{path}: {what}; write PATH.py:CLASS with the path of a Python file.")
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


def source_hash(source: bytes) -> str:
    """The hash of a source file in the protocol: the first 16 hexadecimal digits of its SHA-256, with line feeds."""
    return hashlib.sha256(with_line_feeds(source)).hexdigest()[:16]


def with_line_feeds(source: bytes) -> bytes:
    """A source file with the line ends of Unix, so that git on Windows does not change its hash."""
    return source.replace(b"\r\n", b"\n")


def hash_of(cls: type) -> str | None:
    """The hash of the plugin file at the time its class was imported; None for a class from another source."""
    source: str | None = getattr(sys.modules.get(cls.__module__), "__samplerbench_source__", None)
    return source


def module(path: str) -> ModuleType:
    """Import a plugin file. The same file with the same content is imported only once.

    Raises:
        UserError: the file cannot be read or imported. The message has the line number.
    """
    source = content(path)
    file = user_path(path).resolve()
    key = hashlib.sha256(str(file).encode("utf-8", "surrogateescape") + b"\0" + source).hexdigest()[:16]
    name = _PREFIX + key
    if name in sys.modules:
        return sys.modules[name]
    made = ModuleType(name)
    made.__file__ = str(file)
    vars(made)["__samplerbench_source__"] = source_hash(source)
    sys.modules[name] = made  # before execution, because dataclasses look up their module
    try:
        exec(compile(source, str(file), "exec", dont_inherit=True), vars(made))
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception | SystemExit):  # Ctrl-C is not an error of the file
            raise
        raise UserError(f"{path} cannot be imported: {_explain(error, str(file))}") from error
    return made


def _explain(error: BaseException, file: str) -> str:
    """An exception of a plugin file as text: `line 3: SyntaxError: invalid syntax`."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    text = "" if type(error).__str__ is BaseException.__str__ and not error.args else reason(error)
    if isinstance(error, SyntaxError):
        lines, text = [error.lineno] if error.filename == file else lines, error.msg
    place = f"line {lines[-1]}: " if lines and lines[-1] else ""
    return f"{place}{type(error).__name__}: {text}".rstrip(": ") + "."


def class_in(path: str, name: str, bases: Mapping[str, type]) -> tuple[str, type]:
    """Find a plugin class in a file.

    Args:
        path: path of the file.
        name: name of the class.
        bases: for each allowed kind, its base class.

    Returns:
        The kind and the class.

    Raises:
        UserError: an empty name, no such class, or a class of another kind. The message lists the classes of the file.
    """
    loaded = module(path)
    own = {
        key: value
        for key, value in vars(loaded).items()
        if isinstance(value, type) and value.__module__ == loaded.__name__
    }
    usable = [key for key, value in own.items() if issubclass(value, tuple(bases.values()))]
    wanted = " or ".join(bases)
    there = f"The {wanted} classes in it: {', '.join(usable)}." if usable else f"It has no {wanted} class."
    if not name:
        raise UserError(f"{path}: name the class, as in {path}:{usable[0] if usable else 'CLASS'}. {there}")
    cls = own.get(name)  # classes that the file imports do not count
    if cls is None:
        raise UserError(f'{path} has no class "{name}".{did_you_mean(name, own)} {there}')
    for kind, base in bases.items():
        if issubclass(cls, base):
            return kind, cls
    needed = " or ".join(f"samplerbench.{_public(base)}" for base in bases.values())
    raise UserError(f"{path}:{name} is not a {wanted}: it must be a subclass of {needed}. {there}")


def _public(base: type) -> str:
    """`sampling.Sampler` of samplerbench.sampling.sampler.Sampler."""
    return f"{base.__module__.split('.')[1]}.{base.__name__}"
