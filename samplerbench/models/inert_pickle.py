"""Read a pickle as data: an interpreter of a subset of the pickle format that calls nothing of the file's choosing.

Python's unpickler imports what the file names and calls it. This one makes numbers, strings, lists, dictionaries and
`Instance` objects. A name in the file selects one of the functions given by the caller; all other names are errors.
Source: `pickletools`, the opcodes of protocols 2 to 5.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from samplerbench.limits import MAX_PICKLE_OPCODES
from samplerbench.untrusted import shorten

MAX_LINE = 1024
"""Maximum length of a line in a pickle, such as the name of a class, in bytes."""

Function = Callable[..., Any]


class PickleError(ValueError):
    """A pickle that is damaged, or that contains more than data. The message completes "FILE cannot be converted: "."""


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle refers to. It is never imported.

    Attributes:
        text: module and name, "collections.OrderedDict".
    """

    text: str


@dataclass(eq=False)
class Instance:
    """An object of a class of the file, as data.

    Attributes:
        name: name of the class.
        arguments: arguments of its constructor.
        state: its attributes, or any other state of the class.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = field(default_factory=dict)


class Budget:
    """The number of opcodes that may still be read, over a file and the pickles inside it."""

    def __init__(self, opcodes: int = MAX_PICKLE_OPCODES) -> None:
        self.opcodes = opcodes

    def spend(self) -> None:
        """Count one opcode.

        Raises:
            PickleError: if there have been too many.
        """
        self.opcodes -= 1
        if self.opcodes < 0:
            raise PickleError(f"it has more than {MAX_PICKLE_OPCODES:,} opcodes")


class Bounded:
    """A binary file that never reads beyond its end, however many bytes are requested.

    A pickle states the length of each string; reading it from a file allocates memory of that length first.

    Args:
        file: the file.
        size: its size in bytes.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.rest = file, size

    def read(self, count: int) -> bytes:
        """Read at most `count` bytes."""
        found = self.file.read(min(count, self.rest))
        self.rest -= len(found)
        return found

    def readline(self) -> bytes:
        """Read a line of at most MAX_LINE bytes."""
        found = self.file.readline(min(MAX_LINE, self.rest))
        self.rest -= len(found)
        return found


def read_pickle(
    file: Any, functions: Mapping[str, Function], budget: Budget, persistent: Function | None = None
) -> Any:
    """Read one pickle.

    Args:
        file: binary file or `Bounded`, at the start of the pickle. Afterwards it is at the end of the pickle.
        functions: the functions by which the names in the pickle are replaced. They are given the arguments in the
            pickle, which can be anything.
        budget: number of opcodes that may be read.
        persistent: function of a persistent id. None if there must not be any.

    Returns:
        Numbers, strings, bytes, lists, tuples, dictionaries, sets, `Name`, `Instance`, and results of the functions.

    Raises:
        PickleError: if the pickle is damaged or truncated, or refers to other names.
    """
    machine = _Machine(functions, persistent)
    try:
        for opcode, value, _ in pickletools.genops(file):
            budget.spend()
            if opcode.name == "STOP":
                return machine.pop()
            step = _STEPS.get(opcode.name)
            if step is None:
                raise PickleError(f"it uses the pickle opcode {opcode.name}, which is not supported")
            step(machine, value)
    except PickleError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, struct.error):
        raise PickleError("it is not a pickle, or it is truncated or damaged") from None
    raise PickleError("it is truncated")


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self, functions: Mapping[str, Function], persistent: Function | None) -> None:
        self.functions, self.persistent = functions, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def above_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def name(self, text: str) -> None:
        if text not in self.functions:
            raise PickleError(f"it refers to {shorten(ascii(text)[1:-1], 80)}; only tensors and settings are read")
        self.push(Name(text))

    def call(self) -> None:
        """Replace a name and its arguments by the result of the function with that name."""
        arguments, name = self.pop(), self.pop()
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise PickleError("it calls something that is not a function")
        self.push(self.functions[name.text](*arguments))

    def build(self) -> None:
        state, made = self.pop(), self.stack[-1]
        if not isinstance(made, Instance):
            raise PickleError(f"it sets the state of a {type(made).__name__}")
        made.state = state

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise PickleError(f"it appends to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def add(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not set:
            raise PickleError(f"it adds to a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(map(_key, items))

    def set_items(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict:
            raise PickleError(f"it sets items of a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def make_tuple(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        if len(items) != count:
            raise PickleError("it is damaged")
        self.stack[-count:] = [items]

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise PickleError("it refers to data outside the file")
        self.push(self.persistent(self.pop()))


def _key(value: Any) -> Any:
    """A key of a dictionary or set. Others than numbers and strings could take very long to hash."""
    if not isinstance(value, str | int | float | bytes):
        raise PickleError(f"it has a {type(value).__name__} as the key of a dictionary")
    return value


def _push(machine: _Machine, value: Any) -> None:
    machine.push(value)


def _put(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


def _get(machine: _Machine, index: int) -> None:
    machine.push(machine.memo[index])


def _stack_name(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise PickleError("it is damaged")
    machine.name(f"{module}.{name}")


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, value: None,
    "FRAME": lambda machine, value: None,
    "NONE": _push,
    "NEWTRUE": lambda machine, value: machine.push(True),
    "NEWFALSE": lambda machine, value: machine.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), _push),
    "EMPTY_LIST": lambda machine, value: machine.push([]),
    "EMPTY_TUPLE": lambda machine, value: machine.push(()),
    "EMPTY_DICT": lambda machine, value: machine.push({}),
    "EMPTY_SET": lambda machine, value: machine.push(set()),
    "MARK": lambda machine, value: machine.marks.append(len(machine.stack)),
    "APPEND": lambda machine, value: machine.append([machine.pop()]),
    "APPENDS": lambda machine, value: machine.append(machine.above_mark()),
    "ADDITEMS": lambda machine, value: machine.add(machine.above_mark()),
    "SETITEM": lambda machine, value: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, value: machine.set_items(machine.above_mark()),
    "TUPLE": lambda machine, value: machine.push(tuple(machine.above_mark())),
    "TUPLE1": lambda machine, value: machine.make_tuple(1),
    "TUPLE2": lambda machine, value: machine.make_tuple(2),
    "TUPLE3": lambda machine, value: machine.make_tuple(3),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _get),
    "MEMOIZE": lambda machine, value: _put(machine, len(machine.memo)),
    "GLOBAL": lambda machine, value: machine.name(value.replace(" ", ".", 1)),
    "STACK_GLOBAL": _stack_name,
    "REDUCE": lambda machine, value: machine.call(),
    "NEWOBJ": lambda machine, value: machine.call(),
    "BUILD": lambda machine, value: machine.build(),
    "BINPERSID": lambda machine, value: machine.persistent_id(),
}
"""What each opcode does. Opcodes of older protocols, and those that make objects in other ways, are not supported."""
