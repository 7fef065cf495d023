"""Numbers that the command line takes as text: `--steps 10,20,50`, `--batch-size auto`, `--price 2.5/h`,
`--time 30m`, `--budget 300ms`.

Bounds are a `Request`'s.
"""

from __future__ import annotations

import re
from typing import Literal

from samplerbench.errors import UserError
from samplerbench.untrusted import shorten


def parse_steps(text: str, option: str = "--steps", example: str = "10,20,50", *, repeated: bool = False) -> list[int]:
    """`10,20,50` as numbers. Raises UserError for anything else.

    Args:
        text: the text.
        option: the option, for the message.
        example: a correct value, for the message.
        repeated: whether repeated numbers are kept.
    """
    found: list[int] = []
    if not text.strip(" ,"):
        raise UserError(f"{option} is empty; write {option} {example}.")
    for part in (p.strip() for p in text.split(",")):
        if not part:
            raise UserError(f"{option} {shorten(text)}: a number is missing beside a comma; write {option} {example}.")
        try:
            number = _whole(part)
        except ValueError:
            what = f'{option} {shorten(text)}: "{shorten(part)}"'
            raise UserError(f"{what} is not a whole number; write {option} {example}.") from None
        if repeated or number not in found:
            found.append(number)
    return found


def parse_batch_size(text: str) -> int | Literal["auto"]:
    """A number of images, or "auto". Raises UserError for anything else."""
    if text == "auto":
        return "auto"
    try:
        return _whole(text)
    except ValueError:
        raise UserError(f'--batch-size {shorten(text)}: give a whole number, or "auto".') from None


def parse_price(text: str) -> float:
    """`2.5/h` as a price per hour. Raises UserError for anything else, and for 0."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)/h", text)
    if found is None or not float(found[1]):
        raise UserError(f"--price {shorten(text)}: write a positive price per hour, without a currency: --price 2.5/h.")
    return float(found[1])


def parse_time(text: str) -> float:
    """`90s`, `30m` or `2h` in seconds. Raises UserError for anything else, and for 0."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smh])", text.strip())
    if match is None or not 0 < float(match[1]) <= 1e6:
        raise UserError(f"--time {shorten(text)}: write a time with its unit: 90s, 30m or 2h.")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def parse_budget(text: str) -> float:
    """`300ms` or `1.5s` in milliseconds. Raises UserError for anything else, and for 0."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s)", text.strip())
    if match is None or not 0 < float(match[1]) <= 1e9:
        raise UserError(f"--budget {shorten(text)}: write a time per image with its unit: 300ms or 1.5s.")
    return float(match[1]) * {"ms": 1, "s": 1000}[match[2]]


def _whole(text: str) -> int:
    """A whole number in the digits 0 to 9. Raises ValueError: `int` alone takes digits of any script, and 1_000."""
    if not re.fullmatch("[+-]?[0-9]+", text):
        raise ValueError(text)
    return int(text)
