"""`samplerbench compare`: compare two folders of results, or two selections of one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samplerbench.cli import common
from samplerbench.errors import UserError
from samplerbench.text import console, literal, note, print_json, printable


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder of results.")],
    second: Annotated[
        Path | None, typer.Argument(metavar="[B]", help="Second folder of results. Default: A, with --a and --b.")
    ] = None,
    a: Annotated[
        str, typer.Option("--a", help="Selection of the cells of A: `sampler=ddim,steps=5`.", show_default=False)
    ] = "",
    b: Annotated[
        str, typer.Option("--b", help="Selection of the cells of B: `sampler=ddim,steps=50`.", show_default=False)
    ] = "",
    metric: Annotated[
        list[str],
        typer.Option(
            "--metric", help="Compare only this metric. Can be repeated.", autocompletion=common.complete("metric")
        ),
    ] = [],  # noqa: B006
    fail_if_worse: Annotated[
        bool, typer.Option("--fail-if-worse", help="Exit with code 1 if B is worse than A in any row.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the rows, as JSON.")] = False,
) -> None:
    """Compare the metrics of B with those of A, cell by cell, with the 95% interval of each difference.

    Two cells are paired if they have the same sampler, guidance, spacing, steps and seed, except for the fields named
    in --a and --b. A selected sampler may have its own spacing, and a selected budget its own steps. A selection is a
    comma-separated list of FIELD=VALUE. The fields are sampler, guidance, spacing, steps, nfe, budget, seed, n,
    blocks, model and labels. `guidance=none` selects cells without guidance.

    Examples:

    `samplerbench compare results/before results/after --fail-if-worse`

    `samplerbench compare results --a sampler=ddim,steps=5 --b sampler=ddim,steps=50`

    `samplerbench compare results --a sampler=ddim --b sampler=dpm++`
    """
    from samplerbench.registry import current_name
    from samplerbench.report.load import load
    from samplerbench.results.groups import merge_metrics
    from samplerbench.results.pairs import pair, select

    if second is None and a == b:
        raise UserError("there is nothing to compare: give a second folder, or two selections with --a and --b.")
    one = load(first)
    two = one if second is None else load(second)
    chosen = [
        select(merge_metrics(loaded.records), text, name) for loaded, text, name in ((one, a, "a"), (two, b, "b"))
    ]
    paired = pair(chosen[0], chosen[1], a, b, [current_name("metric", name) for name in metric])
    if as_json:
        print_json([row.as_dict() for row in paired.rows])
    else:
        _show(paired, sorted({*one.problems, *two.problems}))
    if fail_if_worse and any(row.verdict == "worse" for row in paired.rows):
        raise typer.Exit(1)


def _show(paired: object, problems: list[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    from samplerbench.report.table import format_value
    from samplerbench.results.names import metric_title
    from samplerbench.results.pairs import Paired

    assert isinstance(paired, Paired)
    out = console()
    table = Table(header_style="bold")
    for column in ("cell", "metric", "A", "B", "B - A", "95% interval", "verdict"):
        table.add_column(column, justify="right" if column not in ("cell", "metric", "verdict") else "left")
    colours = {"better": "green", "worse": "red", "cannot be told apart": "yellow"}
    for row in paired.rows:
        change = f"{row.change:+.4g}" + (f" ({row.change / abs(row.a):+.1%})" if row.a else "")
        interval = ""
        if row.margin is not None:
            interval = f"{row.change - row.margin:+.4g} … {row.change + row.margin:+.4g}"
        arrow = "↓" if row.better == "lower" else "↑"
        table.add_row(
            literal(row.cell),
            literal(f"{metric_title(row.metric)} {arrow}"),
            format_value(row.a),
            format_value(row.b),
            change,
            interval,
            Text(row.verdict, colours.get(row.verdict, "")).append(f"\n{row.how}" if row.how else "", "dim not bold"),
        )
    out.print(table)
    if len(paired.rows) > 4:
        out.print(
            f"{len(paired.rows)} intervals at 95% each: about one in twenty misses the true value by chance.",
            style="dim",
        )
    for name in paired.only_a:
        out.print(f"only in A: {printable(name)}", style="dim")
    for name in paired.only_b:
        out.print(f"only in B: {printable(name)}", style="dim")
    if paired.versions:
        out.print(f"versions differ: {printable(paired.versions)}", style="dim")
    for problem in problems:
        note(problem)
