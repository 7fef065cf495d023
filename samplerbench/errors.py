"""Errors that a user can cause. Each message is one line that states the problem and how to fix it.

Messages refer to user input as Python arguments, not as command-line options:

    raise UserError(f"{argument('n', n)}: the metric {name} needs at least {least} images.")

`str(error)` formats arguments as Python keyword arguments: `n=1: the metric …`. `spell(error, spelling)` uses another
format: the command line shows them as options, and suite errors show them as TOML, `n = 1`.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_KEY = secrets.token_hex(8)
"""Random part of every token. It is secret to this process, so user input cannot contain a token."""
_BEGIN, _END = f"\ufdd0{_KEY}\ufdd1", f"\ufdd2{_KEY}\ufdd3"
_TOKEN = re.compile(f"{_BEGIN}(.*?){_END}", re.DOTALL)

MAX_BITS = 4096
"""Integers with more bits are not printed: Python refuses to format integers of thousands of digits."""


@dataclass(frozen=True)
class Argument:
    """An argument in an error message.

    Attributes:
        name: Name of the Python argument, in the singular: "n", "batch_size", "sampler".
        value: A string, a number or a tuple of numbers. If None, only the name is shown.
    """

    name: str
    value: Any = None

    def __str__(self) -> str:
        return in_python(self)

    def __format__(self, _: str) -> str:
        return _BEGIN + json.dumps([self.name, self.value], default=str) + _END


Spelling = Callable[[Argument], str]


def argument(name: str, value: Any = None) -> Argument:
    """Create an argument for the f-string of an error message: `argument("n", 5)` is shown as `n=5`.

    Args:
        name: Name of the Python argument, in the singular.
        value: A string, a number or a tuple of numbers. If None, only the name is shown, as in "give fewer `steps`".

    Returns:
        The argument.
    """
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        value = f"an integer of {value.bit_length()} bits"
    return Argument(name, value)


def in_python(given: Argument) -> str:
    """Format an argument as in Python: `labels="balanced"`, `n=5`, or `` `n` `` without a value."""
    return f"`{given.name}`" if given.value is None else f"{given.name}={_literal(given.value)}"


def _literal(value: Any) -> str:
    if isinstance(value, str):
        quote = "'" if '"' in value and "'" not in value else '"'
        return quote + value.replace("\\", "\\\\").replace(quote, f"\\{quote}") + quote
    return repr(tuple(value)) if isinstance(value, list) else str(value)


class Message(str):
    """A text that contains arguments. Its string value formats them as in Python.

    Attributes:
        parts: The pieces of plain text and the arguments, in order.
    """

    __slots__ = ("parts",)

    parts: tuple[str | Argument, ...]

    def __new__(cls, parts: Iterable[str | Argument]) -> Message:
        parts = tuple(parts)
        made = super().__new__(cls, "".join(map(str, parts)))
        made.parts = parts
        return made

    def __getnewargs__(self) -> tuple[tuple[str | Argument, ...]]:  # type: ignore[override]
        return (self.parts,)

    @classmethod
    def read(cls, text: object) -> Message:
        """Parse a text whose arguments were inserted by `argument`. A `Message` is returned unchanged."""
        if isinstance(text, Message):
            return text
        parts: list[str | Argument] = []
        for i, part in enumerate(_TOKEN.split(str(text))):
            if i % 2 == 0:
                parts += [part] if part else []
            else:
                name, value = json.loads(part)
                parts.append(Argument(name, tuple(value) if isinstance(value, list) else value))
        return cls(parts)

    def spell(self, spelling: Spelling) -> str:
        """Return the text with its arguments formatted by `spelling`."""
        return "".join(spelling(part) if isinstance(part, Argument) else part for part in self.parts)

    def after(self, text: str) -> Message:
        """Return the message with `text` prepended."""
        return Message((text, *self.parts))

    def quoting(self, other: Message) -> Message:
        """Return the message with the arguments of `other` restored wherever it quotes the text of `other`."""
        if not any(isinstance(part, Argument) for part in other.parts):
            return self
        parts: list[str | Argument] = []
        for part in self.parts:
            before, found, rest = part.partition(str(other)) if isinstance(part, str) else (part, "", "")
            parts += [before, *other.parts, rest] if found else [part]
        return Message(part for part in parts if part != "")


def message_of(error: BaseException) -> Message:
    """Return the message of an error, including its arguments if it has any."""
    return Message.read(error.args[0] if len(error.args) == 1 and isinstance(error.args[0], Message) else error)


def spell(text: object, spelling: Spelling) -> str:
    """Format the arguments of a text or of an error message.

    Args:
        text: A text, or an error.
        spelling: Function that formats one argument.

    Returns:
        The formatted text.
    """
    return (message_of(text) if isinstance(text, BaseException) else Message.read(text)).spell(spelling)


def plain(text: str) -> str:
    """Return a text in which all arguments are formatted as in Python."""
    return str(Message.read(text)) if _BEGIN in text else text


def _handled() -> Iterator[SamplerbenchError]:
    """Yield the errors that are currently being handled, the most recent first."""
    error, seen = sys.exc_info()[1], set()
    while error is not None and id(error) not in seen:
        if isinstance(error, SamplerbenchError):
            yield error
        seen.add(id(error))
        error = error.__context__


class SamplerbenchError(Exception):
    """Base class of all errors that are shown as one line.

    Args:
        message: The line. A text may contain arguments (`argument`). If it quotes an error that is currently being
            handled, as in `f"{file}: {error}"`, the arguments of that error are kept. A `Message` is used unchanged.

    Attributes:
        exit_code: Exit code of the command line.
    """

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        found = Message.read(message)
        if not isinstance(message, Message):
            for error in _handled():
                found = found.quoting(message_of(error))
        super().__init__(found)


class UserError(SamplerbenchError, ValueError):
    """Invalid input, such as an unknown name, a value out of range or a missing file. Exit code 2."""

    exit_code = 2


class ArgumentTypeError(UserError, TypeError):
    """An argument of the wrong type, such as a number where a spec is required. Exit code 2."""


class LaunchError(UserError):
    """The launcher is configured for something that is not supported. All processes raise the same error."""


class RunError(SamplerbenchError, RuntimeError):
    """A run failed after it started, for example because of a NaN or an exception in a plugin. Exit code 1."""

    exit_code = 1


class OutOfMemoryError(RunError):
    """The device has not enough memory for the batch size. A smaller batch may fit, so the exit code is 2."""

    exit_code = 2


class LostProcess(RunError):  # noqa: N818 - the process is lost, not the error
    """Another process of a distributed run has ended. No cell can continue. Finished results are kept."""


class Stopped(Exception):  # noqa: N818 - not an error
    """The user requested a stop. This is not an error, and no cell has failed. The last checkpoint remains."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device or the machine is out of memory. torch raises several types."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if not isinstance(error, RuntimeError):
        return False
    try:
        return "allocate memory" in str(error)
    except BaseException as raised:  # the exception of a plugin may fail in __str__
        if isinstance(raised, KeyboardInterrupt):
            raise
        return False
