"""`samplerbench results ls | show | rm | merge | validate | schema`: a folder of results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from samplerbench.errors import UserError

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Look after a folder of results.")

Folder = Annotated[Path, typer.Argument(help="Folder of results.")]
Key = Annotated[str, typer.Argument(help="The first digits of a result's protocol hash.")]


def _store(folder: Path) -> Any:
    from samplerbench.results.store import Store

    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}.")
    return Store(folder)


def _one(folder: Path, key: str) -> tuple[Path, dict[str, Any] | None]:
    found = [(file, record) for file, record in _store(folder).records() if file.stem.startswith(key)]
    if len(found) != 1:
        reason = "no result" if not found else f"{len(found)} results"
        raise UserError(
            f"{folder} has {reason} whose hash begins with {key}; `samplerbench results ls {folder}` lists them."
        )
    return found[0]


@app.command("ls")
def ls(folder: Folder = Path("results")) -> None:
    """List the results of a folder; damaged and unfinished ones too."""
    from rich.console import Console

    from samplerbench.report.table import long_table, steps_table

    store = _store(folder)
    whole = [record | {"key": file.stem[:8]} for file, record in store.records() if record is not None]
    damaged = [file for file, record in store.records() if record is None]
    console = Console() if Console().is_terminal else Console(width=160)
    if whole:
        console.print(long_table(whole))
    for metric in dict.fromkeys(m for r in whole for m in r["metrics"]):
        if len({r["protocol_fields"]["reference"]["sha256"] for r in whole}) == 1 and len({r["n"] for r in whole}) == 1:
            console.print(steps_table(whole, metric))
    for file in damaged:
        console.print(f"damaged or edited: {file.name}", style="red")
    for file in sorted(folder.glob("*.damaged")):
        console.print(f"set aside: {file.name}", style="yellow")
    for file in sorted(folder.glob("*.partial.safetensors")):
        console.print(f"unfinished: {file.name.partition('.')[0]}", style="yellow")
    if not whole and not damaged:
        console.print("no results")


@app.command("show")
def show(key: Key, folder: Folder = Path("results")) -> None:
    """Print one result, protocol and all, as JSON."""
    file, record = _one(folder, key)
    if record is None:
        raise UserError(f"{file} is damaged or was edited.")
    print(json.dumps(record, indent=2, ensure_ascii=False))


@app.command("rm")
def rm(key: Key, folder: Folder = Path("results")) -> None:
    """Remove one result and its grid."""
    file, _ = _one(folder, key)
    for path in (file, file.with_suffix(".png")):
        path.unlink(missing_ok=True)
    print(f"removed {file.stem}")


@app.command("merge")
def merge(
    sources: Annotated[list[Path], typer.Argument(help="Folders to take results from.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder they go to.")],
) -> None:
    """Copy the results of several folders into one. What is there already stays; damaged files are left behind."""
    from samplerbench.results.files import write_atomically

    copied = 0
    for source in sources:
        for file, record in _store(source).records():
            if record is None:
                print(f"samplerbench: left behind, damaged or edited: {file}", file=sys.stderr)
            elif not (out / file.name).exists():
                write_atomically(out / file.name, file.read_bytes())
                picture = file.with_suffix(".png")
                if picture.exists():
                    write_atomically(out / picture.name, picture.read_bytes())
                copied += 1
    print(f"{copied} results copied to {out}")


@app.command("validate")
def validate(folder: Folder = Path("results")) -> None:
    """Check every result against the schema, its seal and its name; exit code 1 if one fails."""
    from samplerbench.results.record import schema_errors

    bad = good = 0
    for file, record in _store(folder).records():
        problems = ["damaged, edited or misnamed"] if record is None else schema_errors(record)
        for problem in problems:
            print(f"{file.name}: {problem}")
        bad += bool(problems)
        good += not problems
    print(f"{good} valid, {bad} not")
    if bad:
        raise typer.Exit(1)


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of a result file (it is docs/result.schema.json)."""
    from samplerbench.results.record import json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
