"""Read untrusted JSON, TOML and text files, and paths.

For any content of a file, these functions raise only the documented exceptions.
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
"""Maximum size of a JSON, TOML or text file, in bytes."""
MAX_DEPTH = 200
"""Maximum depth of a JSON or TOML document."""


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON document. NaN and infinities are allowed, as in Python's `json`.

    Raises:
        ValueError: invalid JSON, too deep nesting, an integer of thousands of digits, or a lone surrogate.
    """
    return _document(text, json.loads, json.JSONDecodeError)


def parse_toml(text: str) -> dict[str, Any]:
    """Parse a TOML document.

    Raises:
        tomllib.TOMLDecodeError: invalid TOML; the message has line and column.
        ValueError: too deep nesting, an integer of thousands of digits, an invalid date, or a document or key so long
            that parsing would take minutes.
    """
    if len(text) > MAX_TOML:
        raise ValueError(f"it has {len(text):,} characters; at most {MAX_TOML:,} are read")
    if line := _long_key(text):
        raise ValueError(f"a key has more than {MAX_KEY_PARTS} parts (at line {line})")
    table: dict[str, Any] = _document(text, tomllib.loads, tomllib.TOMLDecodeError)
    return table


_TOKEN = re.compile(r'''#[^\n]*|"""|\'\'\'|"(?:[^"\\\n]|\\.)*"?|'[^'\n]*'?''')
"""A comment, the start of a multi-line string, or a single-line string."""
_END = {'"""': re.compile(r'\\.|"{3,5}', re.DOTALL), "'''": re.compile(r"'{3,5}")}
_KEY = re.compile(r"[\w-]+(?:[ \t]*\.[ \t]*[\w-]+)*")


def _long_key(text: str) -> int:
    """The line number, from 1, of a dotted key with more than MAX_KEY_PARTS parts; 0 if there is none."""
    # Replace strings by one letter and remove comments; the remaining dots belong to keys, numbers or dates.
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
        value = parse(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    except (error_type, UnicodeDecodeError):
        raise
    except ValueError as error:
        if "digits" in str(error):  # Python's message advises to raise its limit
            raise ValueError("it has an integer with thousands of digits") from None
        raise
    _check(value)
    return value


def _check(value: Any) -> None:
    """Raise ValueError for nesting deeper than MAX_DEPTH and for text that is not valid Unicode."""
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
                    raise ValueError("it has a lone surrogate, which is not a character") from None
        level, depth = below, depth + 1


def read_text(file: Path) -> str:
    """Read a UTF-8 file.

    Raises:
        OSError: the file does not exist, is not a regular file, or cannot be read.
        ValueError: the file is too large, or not UTF-8.
    """
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):  # reading a named pipe or a device may block
        raise (
            IsADirectoryError("it is a folder") if stat.S_ISDIR(status.st_mode) else OSError("it is not a regular file")
        )
    if status.st_size > MAX_TEXT_BYTES:
        raise ValueError(f"it has {status.st_size:,} bytes; at most {MAX_TEXT_BYTES:,} are read")
    return file.read_text("utf-8")


def read_json(file: Path, complaint: str) -> dict[str, Any]:
    """Read a file that contains a JSON object.

    Args:
        file: the file.
        complaint: start of the error message: `FOLDER is incomplete`.

    Raises:
        UserError: the file does not exist, or does not contain a JSON object.
    """
    shown = f"{file.parent.name}/{file.name}"
    try:
        content = parse_json(read_text(file))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        return content
    except FileNotFoundError:
        raise UserError(f"{complaint}: {shown} does not exist.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{complaint}: {shown} cannot be read ({reason(error)}).") from None


def reason(error: BaseException) -> str:
    """The message of an exception, on one line. For an OSError, without the file name."""
    try:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    except BaseException as raised:  # an exception class of a plugin
        if isinstance(raised, KeyboardInterrupt):
            raise
        text = "(its message cannot be shown)"
    return " ".join(text.split()) or type(error).__name__


def no_folder(folder: Path) -> str:
    """The start of an error for a path that is not a folder: it is a file, or it does not exist."""
    return f"{folder} is a file, not a folder" if folder.exists() else f"the folder {folder} does not exist"


def user_path(text: str | os.PathLike[str]) -> Path:
    """Convert a path from the user, with `~` and `~name` expanded.

    Raises:
        UserError: the home folder is unknown, or the path is invalid.
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
    """Whether a path is a folder; False for invalid paths."""
    return _is(text, os.path.isdir)


def is_file(text: str | os.PathLike[str]) -> bool:
    """Whether a path is a regular file; False for invalid paths."""
    return _is(text, os.path.isfile)


def _is(text: str | os.PathLike[str], what: Any) -> bool:
    try:
        return bool(what(Path(text).expanduser()))
    except (OSError, ValueError, RuntimeError):
        return False


def shorten(text: str, length: int = 100) -> str:
    """The text on one line, cut with an ellipsis after `length` characters."""
    text = " ".join(text.splitlines())
    return text if len(text) <= length else f"{text[: length - 1]}…"
