"""Text of strangers (specs, file names, messages of plugins), made safe to show."""

from __future__ import annotations


def printable(text: str) -> str:
    """Text without the control characters that would act on a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
