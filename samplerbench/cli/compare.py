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


VERDICTS = {"better": ("better", "green"), "worse": ("worse", "red"), "cannot be told apart": ("≈ tied", "yellow")}
"""The text and colour of each verdict in the terminal."""


def _is_ratio(metric: str, a: float, b: float) -> bool:
    """Whether a change from a to b can be given in percent. KID is unbiased, so it can be 0 or negative."""
    return metric.partition(":")[0] != "kid" and a > 0 and b >= 0


def _signed(value: float) -> str:
    """Three significant digits with the sign: `-3.70`, `+129`."""
    return f"{value:+#.3g}".rstrip(".")


def _show(paired: object, problems: list[str]) -> None:
    """Print a heading for each pair of cells, and a row for each metric. The rows fit into 80 columns."""
    from rich.cells import cell_len
    from rich.text import Text

    from samplerbench.report.table import format_value
    from samplerbench.results.names import metric_title
    from samplerbench.results.pairs import Paired

    assert isinstance(paired, Paired)
    out = console()
    heads = [literal(head, "dim") for head in ("", "A", "B", "B - A", "95% interval", "")]
    lines: list[list[Text]] = []
    for row in paired.rows:
        change = _signed(row.change) + (f" ({row.change / row.a:+.0%})" if _is_ratio(row.metric, row.a, row.b) else "")
        interval = ""
        if row.margin is not None:
            interval = f"{_signed(row.change - row.margin)} … {_signed(row.change + row.margin)}"
        title = f"{metric_title(row.metric)} {'↓' if row.better == 'lower' else '↑'}"
        numbers = (format_value(row.a), format_value(row.b), change, interval)
        verdict = literal(*VERDICTS.get(row.verdict, (row.verdict, "")))
        lines.append([literal(title), *map(literal, numbers), verdict])
    widths = [max(cell_len(line[i].plain) for line in [heads, *lines]) for i in range(len(heads))]

    def aligned(line: list[Text]) -> Text:
        first, *numbers, verdict = line
        found = first.copy()
        found.pad_right(widths[0] - cell_len(first.plain))
        for text, width in zip(numbers, widths[1:], strict=False):
            found.append(" " * (2 + width - cell_len(text.plain))).append_text(text)
        return found.append("  ").append_text(verdict)

    for i, (row, line) in enumerate(zip(paired.rows, lines, strict=True)):
        if i == 0 or row.cell != paired.rows[i - 1].cell:
            heading = literal(row.cell, "bold")
            out.print(heading.append(f" ({row.how})", "dim not bold") if row.how else heading)
            out.print(aligned(heads), soft_wrap=True)
        out.print(aligned(line), soft_wrap=True)
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
