"""The errors of Typer in the words of the other errors: a wrong option, a missing argument, a value out of range."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from samplerbench.options import did_you_mean
from samplerbench.untrusted import shorten


def describe(error: Any, given: Sequence[str], root: Any) -> str:
    """The line for an error of the arguments; "" where Typer has printed the help instead.

    Args:
        error: a `ClickException` of Typer.
        given: the arguments.
        root: the command of the application.
    """
    message = error.format_message()
    if not message:
        return ""
    path, command = _command(error, given, root)
    help_of = f"`{path} --help` shows the options."
    if name := getattr(error, "option_name", None):
        return _option(name, message, command) + help_of
    if match := re.match(r"No such command '(.*?)'\.", message):
        known = list(getattr(command, "commands", {}))
        return f'no command "{shorten(match[1])}".{did_you_mean(match[1], known)} `{path} --help` shows the commands.'
    if match := re.match(r"Got unexpected extra argument\S* \((.*)\)", message, re.DOTALL):
        return f'unexpected argument "{shorten(match[1])}". {help_of}'
    if (parameter := getattr(error, "param", None)) is None:
        return f"{message.removeprefix('Invalid value: ').rstrip('.')}."
    is_option = parameter.param_type_name == "option"
    called = parameter.opts[0] if is_option else str(parameter.metavar or parameter.name).upper()
    if message.startswith("Missing "):
        return f"the {'option' if is_option else 'argument'} {called} is missing. {help_of}"
    chosen = re.search("'(.*)' is not one of", error.message)
    value = shorten(chosen[1]) if chosen else _value(parameter.opts, given) if is_option else ""
    return f"{called}{f' {value}' if value else ''}: {_reason(error.message)}."


def _option(name: str, message: str, command: Any) -> str:
    """What is wrong with an option, and a space."""
    if "requires" in message:
        return f"{name} requires a value. "
    if "does not take a value" in message:
        return f"{name} takes no value. "
    known = ["help", *(option[2:] for p in command.params for option in p.opts if option.startswith("--"))]
    meant = difflib.get_close_matches(name[2:], known, 1, 0.7) if name.startswith("--") else []
    hint = f' Did you mean "--{meant[0]}"?' if meant else ""
    return f'no option "{shorten(name)}".{hint} '


def _command(error: Any, given: Sequence[str], root: Any) -> tuple[str, Any]:
    """The path and the command of an error. An error of the parser may not have it, so it is read from the words."""
    if (context := getattr(error, "ctx", None)) is not None:
        return context.command_path, context.command
    path, command = "samplerbench", root
    for word in given:
        if word in getattr(command, "commands", {}):
            path, command = f"{path} {word}", command.commands[word]
    return path, command


def _value(names: Sequence[str], given: Sequence[str]) -> str:
    """The last value of an option: of `--n 5`, `--n=5`, `-b 5` and `-b5`; "" if there is none."""
    value = ""
    for i, word in enumerate(given):
        for name in names:
            if word == name and i + 1 < len(given):
                value = given[i + 1]
            elif word.startswith(f"{name}=") and name.startswith("--"):
                value = word.partition("=")[2]
            elif word.startswith(name) and not name.startswith("--") and len(word) > len(name):
                value = word[len(name) :]
    return shorten(value)


def _grouped(number: str) -> str:
    """A number with commas: 10,000."""
    return f"{int(number):,}" if number.isdecimal() else number


def _reason(message: str) -> str:
    """Typer's reason in the words of `samplerbench.options.explain`, without a full stop.

    Typer 0.29 gives the text of pydantic, earlier versions that of click.
    """
    text = message.strip().rstrip(".")
    if match := re.search(r"'.*' is not one of (.*)", text):
        return "choose one of " + match[1].replace("'", "")
    if match := re.search(r"(greater|less) than or equal to (\S+)", text):
        return f"it must be at {'least' if match[1] == 'greater' else 'most'} {_grouped(match[2])}"
    if match := re.search(r"is not in the range (?:(\S+?)<=)?x(?:([<>])=(\S+))?$", text):
        low, high = (match[3], None) if match[2] == ">" else (match[1], match[3])
        limits = [f"at {words} {_grouped(x)}" for words, x in (("least", low), ("most", high)) if x is not None]
        return f"it must be {' and '.join(limits)}"
    if "valid integer" in text:
        return "give a whole number"
    if "valid number" in text or "valid float" in text:
        return "give a number"
    return text[:1].lower() + text[1:]
