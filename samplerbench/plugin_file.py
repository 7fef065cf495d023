"""A plugin in a file of its own, without packaging: `./my_sampler.py:MySampler`, for the first hour of an idea.

The file is imported by its path, under a module name of its own, once for each content it has had. What lies beside it
is not on the import path: the hash of the one file is what the protocol records.
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
    """(path, what follows it) of a spec that begins with the path of a Python file; None for any other."""
    match = _SPEC.fullmatch(spec.strip())
    return match and (match["path"].strip(), (match["rest"] or "").strip())


_COLON = re.compile(r"(?P<path>[^:=,]*[/\\][^:=,]*:[^=,]*\.py)\s*(?::.*)?", re.DOTALL)


def check_path(spec: str) -> None:
    """Raise UserError for a spec that begins with the path of a Python file and has a colon in that path."""
    if match := _COLON.fullmatch(spec.strip()):
        raise UserError(
            f"{shorten(match['path'])}: the path of a plugin's file may not contain a colon, which ends it in "
            "PATH.py:CLASS:parameter=value; rename the file or folder."
        )


def content(path: str) -> bytes:
    """The bytes of a plugin's file. Raises UserError where it cannot be read."""
    file = user_path(path)
    if not is_file(file):
        what = (
            "it is a folder" if is_dir(file) else "it is no regular file" if file.exists() else "there is no such file"
        )
        raise UserError(f"{path}: {what}; write PATH.py:CLASS with the path of a Python file.")
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


def source_hash(source: bytes) -> str:
    """The first 16 hexadecimal digits of the sha256: what a protocol records of a source file."""
    return hashlib.sha256(source).hexdigest()[:16]


def hash_of(cls: type) -> str | None:
    """The hash of the file as it was when the class was imported; None for a class that is not from such a file."""
    found: str | None = getattr(sys.modules.get(cls.__module__), "__samplerbench_source__", None)
    return found


def module(path: str) -> ModuleType:
    """The module of a plugin's file, imported unless the same content of the same file was before.

    Raises:
        UserError: the file cannot be read or imported, with the line at fault.
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
    sys.modules[name] = made  # before it runs: dataclasses look their module up
    try:
        exec(compile(source, str(file), "exec", dont_inherit=True), vars(made))
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception | SystemExit):  # Ctrl-C is not the file's
            raise
        raise UserError(f"{path} cannot be imported: {_explain(error, str(file))}") from error
    return made


def _explain(error: BaseException, file: str) -> str:
    """`line 3: SyntaxError: invalid syntax`."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    text = "" if type(error).__str__ is BaseException.__str__ and not error.args else reason(error)
    if isinstance(error, SyntaxError):
        lines, text = [error.lineno] if error.filename == file else lines, error.msg
    place = f"line {lines[-1]}: " if lines and lines[-1] else ""
    return f"{place}{type(error).__name__}: {text}".rstrip(": ") + "."


def class_in(path: str, name: str, bases: Mapping[str, type]) -> tuple[str, type]:
    """(kind, class) of the class `name` in a file.

    bases: for each kind that would do, the class it must be a subclass of.

    Raises:
        UserError: no name (with those that are there), no such class (with the closest), or one of another base.
    """
    found = module(path)
    own = {
        key: value
        for key, value in vars(found).items()
        if isinstance(value, type) and value.__module__ == found.__name__
    }
    usable = [key for key, value in own.items() if issubclass(value, tuple(bases.values()))]
    wanted = " or ".join(bases)
    there = f"The {wanted} classes in it: {', '.join(usable)}." if usable else f"It has no {wanted} class."
    if not name:
        raise UserError(f"{path}: name the class, as in {path}:{usable[0] if usable else 'CLASS'}. {there}")
    cls = own.get(name)  # not one that it imports: that has a name of its own
    if cls is None:
        raise UserError(f'{path} has no class "{name}".{did_you_mean(name, own)} {there}')
    for kind, base in bases.items():
        if issubclass(cls, base):
            return kind, cls
    needed = " or ".join(f"samplerbench.{_public(base)}" for base in bases.values())
    raise UserError(f"{path}:{name} is no {wanted}: it must be a subclass of {needed}. {there}")


def _public(base: type) -> str:
    """`sampling.Sampler` of samplerbench.sampling.sampler.Sampler."""
    return f"{base.__module__.split('.')[1]}.{base.__name__}"
