"""Prompts: read them from a text, JSON Lines or CSV file, or from a data set on the Hugging Face Hub."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from samplerbench.errors import UserError, argument
from samplerbench.limits import MAX_CLASSES
from samplerbench.options import did_you_mean
from samplerbench.untrusted import parse_json, read_text, reason, shorten, user_path

PROMPT_COLUMNS = ("prompt", "caption", "text")
"""Names of the column of the prompts, in order of preference. Upper and lower case are equal."""
ID_COLUMNS = ("id", "prompt_id", "image_id")
"""Names of the column of the ids."""
HUB_OPTIONS = ("split", "prompt", "id", "config", "revision")
"""Options of a data set on the Hub: `hf:owner/name,split=test,prompt=caption`."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run.

    Attributes:
        lines: the prompts. Prompt k has index k.
        ids: the id of each prompt. Empty if the source has no ids.
    """

    lines: list[str]
    ids: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """The hash of the prompts, for the protocol. The ids are not part of it."""
        text = "\n".join(self.lines)
        if any("\n" in line for line in self.lines):  # the text alone would be ambiguous
            text = json.dumps(self.lines)
        return hashlib.sha256(text.encode()).hexdigest()


def read_prompts(file: str | Sequence[str]) -> Prompts:
    """Read prompts.

    - A text file (UTF-8) has one prompt per line. Blank lines and surrounding whitespace are removed.
    - A JSON Lines file (`.jsonl`) has one object per line with the key `prompt`, `caption` or `text`, and optionally
      `id`. A line can also be a string.
    - A CSV file (`.csv`, or `.tsv` with tabs) has a header with the same names. A quotation mark in a `.tsv` file is a
      character like any other unless the fields are quoted as in CSV.
    - `hf:owner/name,split=test,prompt=COLUMN,id=COLUMN` is a data set of the Hugging Face Hub.

    Args:
        file: path of the file, `hf:owner/name`, or the prompts themselves.

    Raises:
        UserError: if the source cannot be read, contains no prompts or an empty prompt, or has an id twice, or if a
            given prompt is empty or has several lines.
    """
    if not isinstance(file, str):
        return Prompts([_one_line(prompt) for prompt in file])
    given = argument("prompts", shorten(str(file)))
    if file.startswith("hf:"):
        return _from_rows(_hub_rows(file, given), given)
    try:
        text = read_text(user_path(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{argument('prompts', str(file))}: the file cannot be read ({error}).") from None
    text = text.removeprefix("\ufeff")  # a byte order mark
    kind = Path(file).suffix.lower()
    if kind == ".jsonl":
        return _from_rows(_json_rows(text, given), given)
    if kind in (".csv", ".tsv"):
        return _from_rows(_csv_rows(text, given, "\t" if kind == ".tsv" else ","), given)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{argument('prompts', str(file))}: the file contains no prompts; write one prompt per line.")
    return Prompts(lines)


@dataclass(frozen=True)
class _Row:
    """One prompt of a file.

    Attributes:
        place: where it is, for error messages: `line 3`.
        prompt: the prompt.
        id: its id. None if there is none.
    """

    place: str
    prompt: Any
    id: Any


def _from_rows(rows: Iterable[_Row], given: object) -> Prompts:
    """Check the rows of a file or a data set."""
    lines: list[str] = []
    ids: list[str] = []
    places: dict[str, str] = {}
    for row in rows:
        if not isinstance(row.prompt, str) or not row.prompt.strip():
            what = "the prompt is empty" if isinstance(row.prompt, str) or row.prompt is None else "it is not text"
            raise UserError(f"{given}: {row.place}: {what}; write some text.")
        lines.append(row.prompt.strip())
        if row.id is None or row.id == "":
            if ids:
                raise UserError(f"{given}: {row.place} has no id; give an id to every prompt, or to none.")
            continue
        if isinstance(row.id, bool) or not isinstance(row.id, str | int):
            raise UserError(f"{given}: {row.place}: an id must be text or a whole number.")
        name = str(row.id)
        if len(ids) < len(lines) - 1:
            raise UserError(f"{given}: {row.place} has an id, and the prompts before it have none; give one to all.")
        if name in places:
            raise UserError(f'{given}: {row.place} has the id "{shorten(name)}" of {places[name]}; ids must differ.')
        places[name] = row.place
        ids.append(name)
    if not lines:
        raise UserError(f"{given}: there are no prompts; write at least one.")
    if len(lines) > MAX_CLASSES:
        raise UserError(f"{given}: there are {len(lines):,} prompts; at most {MAX_CLASSES:,} are possible.")
    return Prompts(lines, tuple(ids))


def _json_rows(text: str, given: object) -> Iterable[_Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UserError(f"{given}: {place} is not JSON ({reason(error)}).") from None
        if isinstance(value, str):
            yield _Row(place, value, None)
            continue
        if not isinstance(value, dict):
            raise UserError(
                f'{given}: {place} must be an object such as {{"id": "1", "prompt": "a cat"}}, or a string.'
            )
        column, named = _columns(value, given, place)
        yield _Row(place, value[column], None if named is None else value[named])


def _csv_rows(text: str, given: object, delimiter: str) -> Iterable[_Row]:
    text = text.removeprefix("\ufeff")
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" and not _is_quoted(text) else csv.QUOTE_MINIMAL
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, quoting=quoting)
    try:
        header = [name for name in reader.fieldnames or () if name]
        column, named = _columns(dict.fromkeys(header), given, "the header")
        for row in reader:
            yield _Row(f"line {reader.line_num}", row[column], None if named is None else row[named])
    except csv.Error as error:
        raise UserError(f"{given}: line {reader.line_num} cannot be read ({reason(error)}).") from None


def _is_quoted(text: str) -> bool:
    """Whether the fields of a tab-separated file are quoted as in CSV. Those of PartiPrompts are not quoted."""
    try:
        for _ in csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True):
            pass
    except csv.Error:
        return False
    return True


def _columns(row: Mapping[str, Any], given: object, place: str) -> tuple[str, str | None]:
    """The names of the columns of the prompts and of the ids. None if there are no ids."""
    known = {name.strip().lower(): name for name in row}
    prompt = next((known[name] for name in PROMPT_COLUMNS if name in known), None)
    if prompt is None:
        has = ", ".join(shorten(name, 30) for name in list(row)[:8]) or "nothing"
        raise UserError(f"{given}: {place} has no prompt; name it {' or '.join(PROMPT_COLUMNS)}. It has: {has}.")
    return prompt, next((known[name] for name in ID_COLUMNS if name in known), None)


def _hub_rows(spec: str, given: object) -> Iterable[_Row]:
    """The rows of a data set on the Hub, or of a local folder that `datasets` loads."""
    name, *parts = spec.removeprefix("hf:").split(",")
    options: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in parts)):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or key not in HUB_OPTIONS:
            raise UserError(
                f'{given}: "{shorten(part)}" is not one of {", ".join(f"{o}=…" for o in HUB_OPTIONS)}.'
                f"{did_you_mean(key, HUB_OPTIONS)}"
            )
        options[key] = value
    if not name.strip():
        raise UserError(f"{given}: name the data set, as in hf:owner/name,split=test.")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{given} needs the library datasets: pip install datasets.") from None
    try:
        rows = datasets.load_dataset(
            name.strip(),
            options.get("config"),
            split=options.get("split", "train"),
            revision=options.get("revision"),
            trust_remote_code=False,  # has no effect since datasets 4
        )
    except Exception as error:  # datasets lets through whatever its loaders and the network raise
        why = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(f"{given}: the data set cannot be loaded ({type(error).__name__}: {why}).") from None
    columns = dict.fromkeys(rows.column_names)
    for key in ("prompt", "id"):
        if key in options and options[key] not in columns:
            raise UserError(
                f'{given}: the data set has no column "{shorten(options[key])}".{did_you_mean(options[key], columns)} '
                f"Columns: {', '.join(columns)}."
            )
    if "prompt" in options:
        prompt, named = options["prompt"], _columns(columns | {"prompt": None}, given, "the data set")[1]
    else:
        prompt, named = _columns(columns, given, "the data set")
    named = options.get("id", named)
    texts, ids = rows[prompt], [None] * len(rows) if named is None else rows[named]
    for number, (text, one) in enumerate(zip(texts, ids, strict=True)):
        yield _Row(f"row {number}", text, one)


def _one_line(prompt: str) -> str:
    """A prompt without surrounding whitespace."""
    lines = prompt.strip().splitlines()
    if len(lines) != 1:
        what = "has several lines; write it on one line" if lines else "is empty; write some text"
        raise UserError(f"{argument('prompt', shorten(prompt))} {what}.")
    return lines[0]
