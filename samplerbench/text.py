"""Safe output of untrusted text: specs, names, file names and messages of plugins.

All output of samplerbench goes through this module: `note` and `say` for lines, `console` and `literal` for tables,
`json_text` for JSON, `csv_cell` for CSV. The writers of Markdown, LaTeX and HTML escape what `printable` returns.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import os
import re
import shutil
import sys
import textwrap
import unicodedata
from typing import TYPE_CHECKING, Any

from samplerbench.errors import plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Printable according to Unicode, but invisible (Default_Ignorable_Code_Point, and the blank braille pattern).
INVISIBLE = frozenset(
    chr(code)
    for first, last in (
        (0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2800, 0x2800), (0x3164, 0x3164),
        (0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xE0100, 0xE01EF),
    )
    for code in range(first, last + 1)
)  # fmt: skip
MARKS = 4  # maximum number of combining marks on one letter; more of them cover adjacent lines
ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
DOCSTRING = 100  # columns: the 120 of a source file without the indentation, and some that an author left free
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def printable(text: object, lines: bool = False) -> str:
    r"""Replace invisible characters by escapes such as `\x1b` and `\u202e`.

    This applies to control characters (C0, C1), format characters (bidirectional overrides, zero-width characters),
    line and paragraph separators, unassigned and private code points, lone surrogates, and more than four combining
    marks on one letter. Spaces of any width become a plain space.

    Args:
        text: any object; converted with str().
        lines: whether to keep line feeds, and replace tabs by four spaces.
    """
    shown, marks = [], 0
    text = plain(str(text))
    if lines:
        text = text.replace("\r\n", "\n").replace("\t", "    ")
    for c in text:
        if " " <= c <= "~" or (lines and c == "\n"):
            shown.append(c)
            marks = 0
            continue
        category = unicodedata.category(c)
        marks = marks + 1 if category.startswith("M") else 0
        if category == "Zs":
            shown.append(" ")
        elif c.isprintable() and c not in INVISIBLE and marks <= MARKS:
            shown.append(c)
        else:
            shown.append(_escape(c))
    return "".join(shown)


def _escape(c: str) -> str:
    code = ord(c)
    if c in ESCAPES:
        return ESCAPES[c]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def is_printable(text: str) -> bool:
    """Whether a text contains no character that `printable` escapes, so that it can be copied safely."""
    spaced = "".join(" " if unicodedata.category(c) == "Zs" else c for c in text)
    return printable(spaced) == spaced


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8, without lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def printable_data(value: Any) -> Any:
    """Apply `printable` to every string in plain data, including keys."""
    if isinstance(value, dict):
        return {printable(k): printable_data(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [printable_data(v) for v in value]
    return printable(value) if isinstance(value, str) else value


def one_line(text: object) -> str:
    """Convert a message to one printable line."""
    return printable(" ".join(str(text).split()))


def note(message: object, gap: bool = False) -> None:
    """Print `samplerbench: MESSAGE` as one line to stderr. gap: print an empty line first, after a ^C.

    On a terminal the line is wrapped between words.
    """
    line = "samplerbench: " + one_line(message)
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
    print(("\n" if gap else "") + line, file=sys.stderr)


def say(text: object, error: bool = False) -> None:
    """Print a text of one or more lines to stdout, or to stderr if `error`, and flush."""
    print(printable(text, lines=True), file=sys.stderr if error else sys.stdout, flush=True)


def unwrapped(text: str, width: int) -> str:
    """Undo the line breaks of a docstring that is wider than `width`, so that a console wraps whole paragraphs.

    A line break is undone if the next word did not fit into DOCSTRING columns; the others, as after a formula, remain.
    """
    lines = text.split("\n")
    if max(map(len, lines)) <= width:
        return text
    joined = [lines[0]]
    for before, line in itertools.pairwise(lines):
        word = line.partition(" ")[0]
        if word and len(before) + 1 + len(word) > DOCSTRING:
            joined[-1] += f" {line}"
        else:
            joined.append(line)
    return "\n".join(joined)


def literal(text: object, style: str = "") -> Text:
    """A printable text for a table. Markup and emoji codes in it are not rendered."""
    from rich.text import Text

    return Text(printable(text), style=style)


def console(width: int = 140, stderr: bool = False) -> Console:
    """A console that does not render markup and emoji codes.

    Without a terminal, it has at least `width` columns, or the number in the environment variable COLUMNS.
    """
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    columns = os.environ.get("COLUMNS", "")
    if not made.is_terminal and not (columns.isdecimal() and int(columns) > 0):
        made.width = max(made.width, width)
    return made


def json_text(value: Any, indent: int | None = 2, allow_nan: bool = True) -> str:
    """Serialise a value as JSON, with escapes for invisible characters. The JSON parses to exactly the same value.

    Raises:
        ValueError: NaN or infinity, unless `allow_nan`.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=allow_nan)
    return re.sub(r"[^\n -~]", lambda m: m[0] if is_printable(m[0]) else json.dumps(m[0])[1:-1], text)


def print_json(value: Any) -> None:
    """Print `json_text` to stdout. If its encoding is not UTF-8, other characters than ASCII are escaped."""
    text = json_text(value)
    print(text if _is_utf8(sys.stdout) else re.sub(r"[^\n -~]", lambda m: json.dumps(m[0])[1:-1], text))


def tolerate_encoding() -> None:
    """Let stdout and stderr escape the characters that their encoding lacks, instead of raising an error.

    On Windows, output that goes to a file or a pipe has the code page of the system, which has no σ and no ≈.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not _is_utf8(stream):
            stream.reconfigure(errors="backslashreplace")


def _is_utf8(stream: Any) -> bool:
    name = getattr(stream, "encoding", None) or "utf-8"  # text in memory has no encoding
    return codecs.lookup(name).name == "utf-8"


def csv_cell(value: Any) -> Any:
    """A CSV cell. Numbers are unchanged; text is printable, with a leading apostrophe if it would be a formula.

    Spreadsheets run a cell that begins with = + - or @ as a formula (OWASP, "CSV injection").
    """
    if value is None or isinstance(value, int | float):
        return value
    text = printable(value)
    return f"'{text}" if str(value).lstrip().startswith(FORMULA) else text


def show_sigma(sigma: float, digits: int = 3) -> str:
    """A noise level as text: `σ = 0.25`, or `σ = ∞` for `SIGMA_INFINITY`, the time t = 1 of a rectified flow."""
    return "σ = ∞" if sigma >= 2.0**54 else f"σ = {sigma:.{digits}g}"
