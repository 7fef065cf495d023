"""How the command line spells the arguments that errors name: as its options."""

from __future__ import annotations

from typing import Any

from samplerbench.errors import Argument, spell

OPTIONS = {"autoencoder": "--latents", "ema_decay": "--ema"}
"""The options that are not called as the argument of Python."""

FALSE = {"class_conditional": "--unconditional"}
"""The options that turn something off."""


def as_option(given: Argument) -> str:
    """`--labels balanced`, `--batch-size 5`; the option alone where there is no value."""
    if given.value is False and given.name in FALSE:
        return FALSE[given.name]
    option = OPTIONS.get(given.name, f"--{given.name.replace('_', '-')}")
    if given.value is None or given.value is True:
        return option
    return f"{option} {_text(given.value)}"


def with_options(text: object) -> str:
    """A text, or the message of an error, with the arguments in it as options: what the command line prints."""
    return spell(text, as_option)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
