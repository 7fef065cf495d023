"""The errors a user can cause. Each is one line that says what is wrong and what to do about it.

A message names what the user gave as an argument, not as an option of the command line:

    raise UserError(f"{argument('n', n)}: the metric {name} needs at least {least} images.")

`str(error)` spells arguments as Python does: `n=1: the metric …`. `spell(error, spelling)` spells them in another way:
the command line as its options, and the errors of a suite as TOML, `n = 1`.
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
"""Part of every token, and known to nobody outside this process: a text from a user cannot contain a token."""
_BEGIN, _END = f"\ufdd0{_KEY}\ufdd1", f"\ufdd2{_KEY}\ufdd3"
_TOKEN = re.compile(f"{_BEGIN}(.*?){_END}", re.DOTALL)

MAX_BITS = 4096
"""The longest integer whose digits are shown. Python writes none of thousands of digits."""


@dataclass(frozen=True)
class Argument:
    """Something that a user gives, in a message.

    Attributes:
        name: of the argument in Python, in the singular: "n", "batch_size", "sampler".
        value: text, a number or a tuple of numbers; None where only the name is meant.
    """

    name: str
    value: Any = None

    def __str__(self) -> str:
        return in_python(self)

    def __format__(self, _: str) -> str:
        return _BEGIN + json.dumps([self.name, self.value], default=str) + _END


Spelling = Callable[[Argument], str]


def argument(name: str, value: Any = None) -> Argument:
    """An argument in the f-string of an error's message: `argument("n", 5)` is shown as `n=5`.

    Args:
        name: of the argument in Python, in the singular.
        value: text, a number or a tuple of numbers; None names the argument alone, as in "give fewer `steps`".
    """
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        value = f"an integer of {value.bit_length()} bits"
    return Argument(name, value)


def in_python(given: Argument) -> str:
    """An argument as Python writes it: `labels="balanced"`, `n=5`; one without a value as `` `n` ``."""
    return f"`{given.name}`" if given.value is None else f"{given.name}={_literal(given.value)}"


def _literal(value: Any) -> str:
    if isinstance(value, str):
        quote = "'" if '"' in value and "'" not in value else '"'
        return quote + value.replace("\\", "\\\\").replace(quote, f"\\{quote}") + quote
    return repr(tuple(value)) if isinstance(value, list) else str(value)


class Message(str):
    """A text with arguments in it. As a string it has them as Python writes them.

    Attributes:
        parts: pieces of plain text, and arguments.
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
        """A text with what `argument` put into it. A message is given back as it is."""
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
        """The text with its arguments in another spelling."""
        return "".join(spelling(part) if isinstance(part, Argument) else part for part in self.parts)

    def after(self, text: str) -> Message:
        """The message with a text before it."""
        return Message((text, *self.parts))

    def quoting(self, other: Message) -> Message:
        """The message with the arguments of another one, where it has that one's text in it."""
        if not any(isinstance(part, Argument) for part in other.parts):
            return self
        parts: list[str | Argument] = []
        for part in self.parts:
            before, found, rest = part.partition(str(other)) if isinstance(part, str) else (part, "", "")
            parts += [before, *other.parts, rest] if found else [part]
        return Message(part for part in parts if part != "")


def message_of(error: BaseException) -> Message:
    """What an error says, with its arguments where it has such."""
    return Message.read(error.args[0] if len(error.args) == 1 and isinstance(error.args[0], Message) else error)


def spell(text: object, spelling: Spelling) -> str:
    """A text, or the message of an error, with its arguments in a spelling."""
    return (message_of(text) if isinstance(text, BaseException) else Message.read(text)).spell(spelling)


def plain(text: str) -> str:
    """A text in which no argument is left as `argument` put it there."""
    return str(Message.read(text)) if _BEGIN in text else text


def _handled() -> Iterator[SamplerbenchError]:
    """The errors that are being handled now, the latest first."""
    error, seen = sys.exc_info()[1], set()
    while error is not None and id(error) not in seen:
        if isinstance(error, SamplerbenchError):
            yield error
        seen.add(id(error))
        error = error.__context__


class SamplerbenchError(Exception):
    """Base of all errors shown as one line; `exit_code` is what the command line returns.

    Args:
        message: the line. A text may have arguments in it (`argument`). Where it quotes an error that is being handled,
            `f"{file}: {error}"`, it takes over that error's arguments. A `Message` is taken as it is.
    """

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        found = Message.read(message)
        if not isinstance(message, Message):
            for error in _handled():
                found = found.quoting(message_of(error))
        super().__init__(found)


class UserError(SamplerbenchError, ValueError):
    """Bad input: an unknown name, a value out of range, a missing file. Exit code 2."""

    exit_code = 2


class RunError(SamplerbenchError, RuntimeError):
    """A run that started and failed: a NaN, a plugin that raised, no memory left. Exit code 1."""

    exit_code = 1


class OutOfMemoryError(RunError):
    """The device has no memory for this batch size. Bad input, since a smaller batch would do: exit code 2."""

    exit_code = 2


class LostProcess(RunError):  # noqa: N818 - the process is lost, not the error
    """Another process of a run on several has ended. No cell can go on, and what is finished is kept."""


class Stopped(Exception):  # noqa: N818 - it is no error
    """An orderly stop that the user asked for: no error, and no cell has failed. The last checkpoint remains."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the machine has no memory left (torch raises several types)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if not isinstance(error, RuntimeError):
        return False
    try:
        return "allocate memory" in str(error)
    except BaseException as raised:  # a message of a plugin's own exception
        if isinstance(raised, KeyboardInterrupt):
            raise
        return False
