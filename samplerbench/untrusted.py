"""Reading what others wrote: JSON, TOML, text and paths.

Every file that may come from a stranger is read here. Whatever is in it, these functions raise only what they document.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from samplerbench.errors import UserError
from samplerbench.limits import MAX_KEY_PARTS, MAX_TOML

MAX_TEXT_BYTES = 64 * 2**20
"""The largest JSON, TOML or text file that is read."""
MAX_DEPTH = 200
"""The deepest nesting of a JSON or TOML document."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON document. NaN and infinities are numbers, as for Python's `json`.

    Raises:
        ValueError: it is not JSON, is nested too deeply, has an integer of thousands of digits, or half of a character.
    """
    return _document(text, json.loads, json.JSONDecodeError)


def parse_toml(text: str) -> dict[str, Any]:
    """The table of a TOML document.

    Raises:
        tomllib.TOMLDecodeError: it is not TOML; the message has line and column.
        ValueError: it is nested too deeply, has an integer of thousands of digits or a date that does not exist, or is
            so large, or has so long a key, that the parser would take minutes.
    """
    if len(text) > MAX_TOML:
        raise ValueError(f"it has {len(text):,} characters; at most {MAX_TOML:,} are read")
    if line := _long_key(text):
        raise ValueError(f"a key has more than {MAX_KEY_PARTS} parts (at line {line})")
    found: dict[str, Any] = _document(text, tomllib.loads, tomllib.TOMLDecodeError)
    return found


_TOKEN = re.compile(r'''#[^\n]*|"""|\'\'\'|"(?:[^"\\\n]|\\.)*"?|'[^'\n]*'?''')
"""A comment, the beginning of a string of several lines, or a string of one line."""
_END = {'"""': re.compile(r'\\.|"{3,5}', re.DOTALL), "'''": re.compile(r"'{3,5}")}
_KEY = re.compile(r"[\w-]+(?:[ \t]*\.[ \t]*[\w-]+)*")


def _long_key(text: str) -> int:
    """The line, from 1, of a dotted key of more than MAX_KEY_PARTS parts in a TOML document; 0 where there is none."""
    # Strings become one letter, comments nothing, so that each dot left is of a key, a number or a date.
    parts, at = [], 0
    while found := _TOKEN.search(text, at):
        parts.append(text[at : found.start()])
        at = found.end()
        if found[0] in _END:
            ends = (m for m in _END[found[0]].finditer(text, at) if not m[0].startswith("\\"))
            end = next(ends, None)
            if end is None:  # the parser stops here
                at = len(text)
                break
            at = end.end()
        lines = "\n" * text.count("\n", found.start(), at)
        parts.append(lines if found[0].startswith("#") else f"s{lines}")
    bare = "".join([*parts, text[at:]])
    long = next((m for m in _KEY.finditer(bare) if m[0].count(".") >= MAX_KEY_PARTS), None)
    return 0 if long is None else bare.count("\n", 0, long.start()) + 1


def _document(text: Any, parse: Any, error_type: type[ValueError]) -> Any:
    try:
        found = parse(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    except (error_type, UnicodeDecodeError):
        raise
    except ValueError as error:
        if "digits" in str(error):  # Python's own limit; its message advises to lift it
            raise ValueError("it has an integer with thousands of digits") from None
        raise
    _check(found)
    return found


def _check(value: Any) -> None:
    """Raise ValueError for nesting beyond MAX_DEPTH and for text that cannot be written again."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not item.isascii():
                try:
                    item.encode("utf-8")
                except UnicodeEncodeError:
                    raise ValueError("it has half of a surrogate pair, which is no character") from None
        level, depth = below, depth + 1


def read_text(file: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        OSError: it is not there, is no regular file, or cannot be read. ValueError: it is too large, or not UTF-8.
    """
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):  # reading from a named pipe or a device may never end
        raise IsADirectoryError("it is a folder") if stat.S_ISDIR(status.st_mode) else OSError("it is no regular file")
    if status.st_size > MAX_TEXT_BYTES:
        raise ValueError(f"it has {status.st_size:,} bytes; at most {MAX_TEXT_BYTES:,} are read")
    return file.read_text("utf-8")


def read_json(file: Path, complaint: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        complaint: how the error begins: `FOLDER is incomplete`.

    Raises:
        UserError: there is no such file, or no JSON object in it.
    """
    shown = f"{file.parent.name}/{file.name}"
    try:
        found = parse_json(read_text(file))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        return found
    except FileNotFoundError:
        raise UserError(f"{complaint}: {shown} is not there.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{complaint}: {shown} cannot be read ({reason(error)}).") from None


def reason(error: BaseException) -> str:
    """What an exception says, on one line; of an OSError without the file's name, which the caller gives."""
    try:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    except BaseException as raised:  # a plugin's own exception
        if isinstance(raised, KeyboardInterrupt):
            raise
        text = "(its message cannot be shown)"
    return " ".join(text.split()) or type(error).__name__


def user_path(text: str | os.PathLike[str]) -> Path:
    """A path as a user gave it, with `~` and `~name` resolved.

    Raises:
        UserError: the home folder is unknown, or no file can have this name.
    """
    try:
        path = Path(text).expanduser()
        os.lstat(path)
    except RuntimeError:
        raise UserError(f"{text}: the home folder is unknown; give the path without ~.") from None
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:
        raise UserError(f"{shorten(str(text))} cannot be the name of a file ({reason(error)}).") from None
    return path


def is_dir(text: str | os.PathLike[str]) -> bool:
    """Whether this names a folder; False for text that cannot be a path at all."""
    return _is(text, os.path.isdir)


def is_file(text: str | os.PathLike[str]) -> bool:
    """Whether this names a regular file; False for text that cannot be a path at all."""
    return _is(text, os.path.isfile)


def _is(text: str | os.PathLike[str], what: Any) -> bool:
    try:
        return bool(what(Path(text).expanduser()))
    except (OSError, ValueError, RuntimeError):
        return False


def shorten(text: str, length: int = 100) -> str:
    """The text on one line, or its beginning with an ellipsis where it is longer than so many characters."""
    text = " ".join(text.splitlines())
    return text if len(text) <= length else f"{text[: length - 1]}…"
