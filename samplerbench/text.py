"""Text that others wrote (specs, names, file names, messages of plugins), made safe to show.

Everything samplerbench prints goes through this module: `note` and `say` for lines, `console` and `literal` for tables,
`json_text` for JSON, `csv_cell` for CSV. The writers of Markdown, LaTeX and HTML escape what `printable` returns.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from typing import TYPE_CHECKING, Any

from samplerbench.errors import plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Unicode calls these printable, but nothing is seen of them (Default_Ignorable_Code_Point, and the blank of braille).
INVISIBLE = frozenset(
    chr(code)
    for first, last in (
        (0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2800, 0x2800), (0x3164, 0x3164),
        (0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xE0100, 0xE01EF),
    )
    for code in range(first, last + 1)
)  # fmt: skip
MARKS = 4  # combining marks on one letter; more of them cover the lines above and below
ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def printable(text: object, lines: bool = False) -> str:
    r"""Text in which every character can be seen: `\x1b`, `\u202e` and the like stand for those that cannot.

    Escaped are control characters (C0, C1), format characters (bidirectional overrides, zero-width characters), line
    and paragraph separators, unassigned and private code points, lone surrogates, and combining marks beyond four on
    one letter. Spaces of any width become a plain space.

    Args:
        text: what to show; str() of it.
        lines: whether it may have several lines; then line feeds remain, and a tab is four spaces.
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
    """Whether `printable` would escape nothing in a text, so that what is seen is what is copied."""
    spaced = "".join(" " if unicodedata.category(c) == "Zs" else c for c in text)
    return printable(spaced) == spaced


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def printable_data(value: Any) -> Any:
    """Plain data with every string in it, keys included, as `printable` shows it."""
    if isinstance(value, dict):
        return {printable(k): printable_data(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [printable_data(v) for v in value]
    return printable(value) if isinstance(value, str) else value


def one_line(text: object) -> str:
    """A message as one printable line."""
    return printable(" ".join(str(text).split()))


def note(message: object, gap: bool = False) -> None:
    """Print `samplerbench: MESSAGE` as one line to stderr. gap: after an empty line, to leave the line of a ^C."""
    print(("\n" if gap else "") + "samplerbench: " + one_line(message), file=sys.stderr)


def say(text: object, error: bool = False) -> None:
    """Print a printable text, of one line or more, to stdout (error: to stderr), at once."""
    print(printable(text, lines=True), file=sys.stderr if error else sys.stdout, flush=True)


def literal(text: object, style: str = "") -> Text:
    """A printable text for a table: neither markup nor emoji codes in it are rendered."""
    from rich.text import Text

    return Text(printable(text), style=style)


def console(width: int = 140, stderr: bool = False) -> Console:
    """A console that renders neither markup nor emoji codes; where it is no terminal, at least `width` columns wide."""
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not made.is_terminal:
        made.width = max(made.width, width)
    return made


def json_text(value: Any, indent: int | None = 2, allow_nan: bool = True) -> str:
    """JSON that parses to exactly the value, with escapes for every character that cannot be seen.

    Raises:
        ValueError: a NaN or an infinity, unless allow_nan.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=allow_nan)
    return re.sub(r"[^\n -~]", lambda m: m[0] if is_printable(m[0]) else json.dumps(m[0])[1:-1], text)


def print_json(value: Any) -> None:
    """Print `json_text` to stdout."""
    print(json_text(value))


def csv_cell(value: Any) -> Any:
    """A cell of CSV: numbers as they are; text printable, and with an apostrophe first where it would be a formula.

    Spreadsheets run a cell that begins with = + - or @ as a formula (OWASP, "CSV injection").
    """
    if value is None or isinstance(value, int | float):
        return value
    text = printable(value)
    return f"'{text}" if str(value).lstrip().startswith(FORMULA) else text
