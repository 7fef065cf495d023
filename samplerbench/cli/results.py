"""`samplerbench results ls | show | rm | merge | validate | schema`: manage a folder of results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from samplerbench.errors import UserError
from samplerbench.portable import remove_file
from samplerbench.text import console, literal, note, one_line, print_json, printable, say
from samplerbench.untrusted import no_folder

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Manage a folder of results.")

Folder = Annotated[Path, typer.Argument(help="Folder of results.")]
Key = Annotated[str, typer.Argument(help="The first digits of a result's protocol hash.")]


def _store(folder: Path) -> Any:
    from samplerbench.results.store import Store

    if not folder.is_dir():
        raise UserError(f"{no_folder(folder)}.")
    return Store(folder)


MIN_DIGITS = 4
"""The minimum number of digits of a key."""
SEPARATE = "{count} protocols; their results are not comparable with each other:"


def _key_length(stems: list[str]) -> int:
    """The number of digits that tells the results of a folder apart, at least 8."""
    return next((n for n in range(8, 20) if len({stem[:n] for stem in stems}) == len(stems)), 20)


def _one(folder: Path, key: str) -> Any:
    """The one entry whose name begins with a key. Raises UserError."""
    if len(key) < MIN_DIGITS or set(key) - set("0123456789abcdef"):
        raise UserError(
            f'"{key}" is not a key: give the first {MIN_DIGITS} or more digits (0-9, a-f) of a result\'s '
            f"protocol hash; "
            f"`samplerbench results ls {folder}` lists them."
        )
    matches = [entry for entry in _store(folder).entries() if entry.file.stem.startswith(key[:20])]
    if len(key) > 20:  # the file name has 20 digits, the record has all 64
        matches = [entry for entry in matches if entry.record is None or entry.record["protocol"].startswith(key)]
    if len(matches) != 1:
        reason = "no result" if not matches else f"{len(matches)} results"
        raise UserError(
            f"{folder} has {reason} whose hash begins with {key}; `samplerbench results ls {folder}` lists them."
        )
    return matches[0]


@app.command("ls")
def ls(folder: Folder = Path("results")) -> None:
    """List the results of a folder with their keys, including damaged and unfinished ones.

    Results of different protocols are in separate lists, as in the tables of `samplerbench report`. The key of a result
    is the argument of `results show` and `results rm`.
    """
    from rich.text import Text

    from samplerbench.report.table import long_table
    from samplerbench.results.groups import group
    from samplerbench.results.names import versions_of, with_current_names
    from samplerbench.results.timings import describe_conditions, under

    entries = list(_store(folder).entries())
    digits = _key_length([e.file.stem for e in entries])
    whole = [with_current_names(e.record) | {"key": e.file.stem[:digits]} for e in entries if e.record is not None]
    damaged = [e for e in entries if e.record is None]
    out = console(160)
    groups = group(whole, merge=False)
    if len(groups) > 1:
        out.print(Text(SEPARATE.format(count=len(groups)), style="yellow"))
    for one in groups:
        if one.title:
            out.print(literal(one.title, "bold"))
        out.print(literal(one.describe(), "dim"))
        out.print(long_table([under(r, one.conditions) for r in one.records], keys=True))
        if timed := describe_conditions(one.conditions):
            out.print(literal(f"times: {timed}", "dim"))
        out.print()
    for made_by, count in versions_of(whole).items():
        out.print(literal(f"made by {made_by}: {count} result{'s' * (count != 1)}", "dim"))
    for entry in damaged:
        out.print(Text(printable(f"{entry.problem}: {entry.file.name}"), style="red"))
    for file in sorted(folder.glob("*.damaged")):
        out.print(Text(printable(f"set aside: {file.name}"), style="yellow"))
    for file in sorted(folder.glob("*.partial.safetensors")):
        out.print(Text(printable(f"unfinished: {file.name.partition('.')[0]}"), style="yellow"))
    if not whole and not damaged:
        out.print("no results")


@app.command("show")
def show(key: Key, folder: Folder = Path("results")) -> None:
    """Print one result with its protocol, as JSON."""
    entry = _one(folder, key)
    if entry.record is None:
        raise UserError(f"{entry.file} is not a valid result: {entry.problem}.")
    print_json(entry.record)


@app.command("rm")
def rm(key: Key, folder: Folder = Path("results")) -> None:
    """Remove one result and its PNG of samples."""
    file = _one(folder, key).file
    for path in (file, file.with_suffix(".png")):
        try:
            remove_file(path)
        except OSError as error:
            raise UserError(f"{path} cannot be removed: {error.strerror or error}.") from None
    say(f"removed {file.stem}")


@app.command("merge")
def merge(
    sources: Annotated[list[Path], typer.Argument(help="Folders to copy results from.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to copy the results to.")],
) -> None:
    """Copy the results of several folders into one. Existing results are kept, damaged files are not copied."""
    from samplerbench.results.files import read_regular, write_atomically

    copied = 0
    for source in sources:
        for entry in _store(source).entries():
            file = entry.file
            if entry.record is None:
                note(f"not copied, {entry.problem}: {file}")
            elif not os.path.lexists(out / file.name):
                # Write the record that was checked: the file may have changed since.
                text = json.dumps(entry.record, indent=2, ensure_ascii=False) + "\n"
                write_atomically(out / file.name, text.encode())
                picture = file.with_suffix(".png")
                if os.path.lexists(picture):
                    try:
                        write_atomically(out / picture.name, read_regular(picture))
                    except OSError as error:
                        reason = f"{picture} ({error.strerror or error})"
                        note(f"not copied: {reason}")
                copied += 1
    say(f"{copied} {'result' if copied == 1 else 'results'} copied to {out}")


@app.command("validate")
def validate(folder: Folder = Path("results")) -> None:
    """Check the schema, the seal and the file name of every result. The exit code is 1 if a check fails."""
    bad = good = 0
    for entry in _store(folder).entries():
        if entry.record is None:
            say(one_line(f"{entry.file.name}: {entry.problem}"))
            bad += 1
        else:
            good += 1
    say(f"{good} valid, {bad} invalid")
    if bad:
        raise typer.Exit(1)


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of a result file (docs/result.schema.json)."""
    from samplerbench.results.record import json_schema

    print_json(json_schema())
