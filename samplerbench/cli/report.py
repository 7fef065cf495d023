"""`samplerbench report`: write tables, figures and an HTML page from a folder of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from samplerbench.cli import common
from samplerbench.errors import UserError
from samplerbench.text import console, json_text, literal, note, say

FORMATS = ("md", "csv", "latex", "json", "html", "plots")


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("results"),
    formats: Annotated[
        str, typer.Option("--format", help="Comma-separated formats to write: md, csv, latex, json, html, plots.")
    ] = ",".join(FORMATS),
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write to. Default: FOLDER/report.", show_default=False)
    ] = None,
    metric: Annotated[
        list[str],
        typer.Option(
            "--metric", help="Report only this metric. Can be repeated.", autocompletion=common.complete("metric")
        ),
    ] = [],  # noqa: B006
    by: Annotated[
        Literal["steps", "nfe"] | None,
        typer.Option(
            "--by",
            help="Columns of the tables. Default: nfe if the samplers differ in evaluations per step, else steps.",
        ),
    ] = None,
    plot: Annotated[
        bool | None,
        typer.Option("--plot/--no-plot", help="Print plots as text. Default: only on a terminal.", show_default=False),
    ] = None,
) -> None:
    """Write tables (Markdown, LaTeX, CSV, JSON), figures and a self-contained HTML page, and print the tables.

    Results of different protocols are in separate tables. Damaged, unfinished and failed cells are listed and left
    out of the tables.

    Examples:

    `samplerbench report results`

    `samplerbench report results --format md,latex --by steps --out paper/tables`
    """
    from samplerbench.registry import current_name
    from samplerbench.report.load import load
    from samplerbench.results.files import refuse_links
    from samplerbench.results.groups import group

    wanted = [part.strip() for part in formats.split(",") if part.strip()]
    if unknown := [name for name in wanted if name not in FORMATS]:
        raise UserError(f"--format {unknown[0]}: choose one of {', '.join(FORMATS)}.")
    target = folder / "report" if out is None else out
    if target.resolve() == folder.resolve():
        raise UserError(f"--out {target} is the folder of the results; choose another, to keep the two apart.")
    if out is None:
        refuse_links(target, folder)
    refuse_links(target / "plots", target)
    if target.exists() and not target.is_dir():
        raise UserError(f"--out {target}: it is a file, not a folder; choose another folder.")
    loaded = load(folder)
    groups = group(loaded.records)
    known = list(dict.fromkeys(m for g in groups for m in g.metrics()))
    metric = [current_name("metric", name) for name in metric]
    if unknown := [name for name in metric if name not in known]:
        raise UserError(f"--metric {unknown[0]}: the results have {', '.join(known)}.")
    if metric:
        groups = [kept for g in groups if (kept := _only(g, metric)) is not None]
    _print(groups, loaded.problems, by, plot)
    for file in _write(groups, loaded, wanted, target, by):
        say(file)


def _only(group: Any, metrics: list[str]) -> Any:
    """The group with only these metrics; None if it has none of them."""
    from dataclasses import replace

    cut = [r | {"metrics": {m: e for m, e in r["metrics"].items() if m in metrics}} for r in group.records]
    records = [r for r in cut if r["metrics"]]
    return replace(group, records=records) if records else None


def _write(groups: list[Any], loaded: Any, wanted: list[str], out: Path, by: Any) -> list[Path]:
    from samplerbench.report import formats
    from samplerbench.results.files import write_atomically

    texts: dict[str, str] = {}
    if "md" in wanted:
        texts["report.md"] = formats.markdown(groups, loaded.problems, by)
    if "csv" in wanted:
        texts["cells.csv"] = formats.to_csv(groups)
    if "latex" in wanted:
        texts["tables.tex"] = formats.latex(groups, by)
        texts["report.tex"] = formats.latex_document(texts["tables.tex"])
    if "json" in wanted:
        content = formats.payload(groups, loaded.problems, by)
        texts["report.json"] = json_text(content, indent=1, allow_nan=False) + "\n"
    if "html" in wanted:
        from samplerbench.report.html import page

        texts["report.html"] = page(groups, loaded.problems, loaded.pictures, by, loaded.latencies)
    files = []
    for name, text in texts.items():
        write_atomically(out / name, text.encode("utf-8", errors="replace"))
        files.append(out / name)
    if "plots" in wanted:
        from samplerbench.report.latency import tradeoff_figures, tradeoffs
        from samplerbench.report.plots import figures, save

        for number, group in enumerate(groups, 1):
            end = f"-{number}" if len(groups) > 1 else ""
            latency = tradeoff_figures(tradeoffs(group, loaded.latencies))
            for stem, draw in (figures(group, loaded.pictures, by=by) | latency).items():
                files += save(draw(), out / "plots" / f"{stem}{end}")
    return files


def _print(groups: list[Any], problems: list[str], by: Any, plot: bool | None) -> None:
    from samplerbench.cli.results import SEPARATE
    from samplerbench.report import terminal
    from samplerbench.report.formats import AXIS_NAMES, matrices
    from samplerbench.report.series import series
    from samplerbench.results.names import metric_title

    out = console()
    plot = out.is_terminal if plot is None else plot
    width = max(20, min(64, out.width - 12))
    if len(groups) > 1:
        out.print(SEPARATE.format(count=len(groups)), style="yellow")
    for group in groups:
        if group.title:
            out.print(literal(group.title, "bold"))
        out.print(literal(group.describe(), "dim"))
        for table in matrices(group, by):
            out.print(terminal.matrix_table(table))
            if plot:
                lines = series(group, table.metric, table.axis)
                log_y = table.better == "lower" and all(y > 0 for line in lines for y in line.y)
                name = f"{metric_title(table.metric)} {table.arrow}"
                out.print(terminal.text_plot(lines, AXIS_NAMES[table.axis], name, log_y, width))
            out.print()
    for problem in problems:
        note(problem)
