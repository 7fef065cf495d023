"""Tables in Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from samplerbench.report.matrix import Axis, Entry, Matrix, column, default_axis, matrix
from samplerbench.report.reproduce import command
from samplerbench.results.groups import Group, metric_specs
from samplerbench.results.names import RowNames, metric_title, own_head, steps_label
from samplerbench.results.record import Record
from samplerbench.results.timings import seconds_per_image, timings_of, under
from samplerbench.text import csv_cell, printable

AXIS_NAMES = {"steps": "steps", "nfe": "NFE"}


def matrices(group: Group, by: Axis | None, metrics: Sequence[str] = ()) -> list[Matrix]:
    """One table per metric of a group, over `by`, or over the default axis of the group."""
    return [matrix(group, m, by or default_axis(group)) for m in group.metrics() if not metrics or m in metrics]


def markdown(groups: Sequence[Group], problems: Sequence[str], by: Axis | None, metrics: Sequence[str] = ()) -> str:
    """The tables in Markdown. The best value of a column is bold; ties are marked with ≈."""
    lines: list[str] = []
    for group in groups:
        if group.title:
            lines += [f"## {_md(group.title)}", ""]
        lines += [_md(group.describe()), ""]
        for table in matrices(group, by, metrics):
            lines += [f"**{_md(metric_title(table.metric))} {table.arrow}** {_md(table.measured_in)}".rstrip(), ""]
            lines.append(f"| sampler \\\\ {AXIS_NAMES[table.axis]} | " + " | ".join(table.heads) + " |")
            lines.append("| --- |" + " ---: |" * len(table.columns))
            lines += [
                f"| {_md(name)} | " + " | ".join(_md_entry(e) or table.blank(name) for e in row) + " |"
                for name, row in table.rows
            ]
            lines += ["", *([_md("; ".join(table.notes) + "."), ""] if table.notes else [])]
    if problems:
        lines += ["Left out:", "", *[f"- {_md(problem)}" for problem in problems], ""]
    return "\n".join(lines)


def _md(text: str) -> str:
    escaped = re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", printable(text).strip())
    escaped = re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", escaped)  # would start a list, or underline a heading
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _md_entry(entry: Entry | None) -> str:
    if entry is None:
        return ""
    return f"**{entry.text}**" if entry.best else f"≈ {entry.text}" if entry.tied else entry.text


def latex(groups: Sequence[Group], by: Axis | None, metrics: Sequence[str] = ()) -> str:
    """The tables in LaTeX, to be pasted or \\input; they need the package booktabs."""
    parts = ["% needs \\usepackage{booktabs}"]
    for group in groups:
        for table in matrices(group, by, metrics):
            arrow = "$\\downarrow$" if table.better == "lower" else "$\\uparrow$"
            title = f" {tex(group.title)}." if group.title else ""
            legend = "; ".join(table.notes)
            notes = f" {tex(legend[0].upper() + legend[1:])}." if legend else ""
            parts += [
                "\\begin{table}",
                "  \\centering\\small\\setlength{\\tabcolsep}{4pt}",
                f"  \\caption{{{tex(metric_title(table.metric))} {arrow}{tex(table.measured_in)}; "
                f"{tex(group.describe())}.{title}{notes}}}",
                f"  \\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
                "    \\toprule",
                f"    sampler & \\multicolumn{{{len(table.columns)}}}{{c}}{{{AXIS_NAMES[table.axis]}}} \\\\",
                f"    \\cmidrule(l){{2-{len(table.columns) + 1}}}",
                "    & " + " & ".join(table.heads) + " \\\\",
                "    \\midrule",
                *[
                    f"    {tex(name)} & " + " & ".join(_tex_entry(e) or tex(table.blank(name)) for e in row) + " \\\\"
                    for name, row in table.rows
                ],
                "    \\bottomrule",
                "  \\end{tabular}",
                "\\end{table}",
            ]
    return "\n".join(parts) + "\n"


def latex_document(tables: str) -> str:
    """A complete LaTeX document with the tables."""
    head = "\\documentclass{article}\n\\usepackage[utf8]{inputenc}\n\\usepackage[T1]{fontenc}\n\\usepackage{booktabs}\n"
    head += "\\usepackage[margin=2cm]{geometry}\n"
    return f"{head}\\begin{{document}}\n{tables}\\end{{document}}\n"


TEX = {
    "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "\\textless{}",
    ">": "\\textgreater{}", "|": "\\textbar{}", '"': "\\textquotedbl{}", "`": "\\textasciigrave{}",
    "'": "\\textquotesingle{}", "±": "$\\pm$", "≈": "$\\approx$", "×": "$\\times$", "…": "\\ldots{}",
    "σ": "$\\sigma$", "η": "$\\eta$", "ρ": "$\\rho$", "λ": "$\\lambda$", "α": "$\\alpha$", "ε": "$\\varepsilon$",
    "∞": "$\\infty$", "-": "{-}", "–": "--",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


def tex(text: str) -> str:
    """Escape text for LaTeX. Characters without a font are written as their code point."""
    return "".join(TEX.get(c, c if " " <= c <= "~" else f"\\texttt{{U+{ord(c):04X}}}") for c in printable(text))


def _tex_entry(entry: Entry | None) -> str:
    if entry is None:
        return ""
    number = entry.text.replace(" ± ", " $\\pm$ ")
    return f"\\textbf{{{number}}}" if entry.best else f"$\\approx$ {number}" if entry.tied else number


def rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """One flat row per result, with all fields of the protocol."""
    found = []
    for number, group in enumerate(groups, 1):
        for r in map(_own_times, group.records):
            row = {
                "protocol": r["protocol"],
                "group": number,
                "label": group.label(r),
                "parameters": json.dumps(r["parameters"], sort_keys=True),
            }
            more = (name for name, value in r.items() if not isinstance(value, dict | list) and name not in SEALED)
            for name in dict.fromkeys((*PLAIN, *more)):
                row[name] = r.get(name)
            row["seconds_per_image"] = seconds_per_image(
                r
            )  # under the conditions of the row, which are in other columns
            for name, value in group.protocol.items():
                if isinstance(value, dict):
                    row |= {f"{name}.{k}": _flat(v) for k, v in value.items()}
                elif name not in row:
                    row[name] = value
            specs = metric_specs(r)
            for name, entry in r["metrics"].items():
                row |= {name: entry["value"], f"{name}.sd": entry.get("sd")}
                row |= {f"{name}.blocks": _flat(entry.get("blocks")), f"{name}.spec": specs.get(name, name)}
                row |= {f"{name}.features": entry["features"], f"{name}.reference": entry["reference"]}
                if entry.get("of") == "data":
                    row |= {f"{name}.{key}": entry[key] for key in OF_DATA if key in entry}
            row |= {f"{name}.no_value": reason for name, reason in r.get("inapplicable", {}).items()}
            found.append(row | {"command": command(r)})
    return found


PLAIN = (
    "sampler", "guidance", "spacing", "steps", "budget", "nfe", "classifier_forward", "classifier_backward", "n",
    "blocks", "seed", "model", "labels", "seconds", "metric_seconds", "images_per_second", "batch_size", "processes",
    "device", "threads", "finished",
)  # fmt: skip

SEALED = ("protocol", "seal")

OF_DATA = ("standard_error", "unit", "data", "images", "nfe", "network_backward")
"""Further columns of a metric of the data."""


def _own_times(record: Record) -> Record:
    """The record, without its times if there is no valid timing."""
    return record if timings_of(record) else under(record, {})


def _flat(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value


def to_csv(groups: Sequence[Group]) -> str:
    """One line per result. Text that a spreadsheet would run as a formula is prefixed with an apostrophe."""
    found = rows(groups)
    columns = dict.fromkeys(name for row in found for name in row)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(map(csv_cell, columns))
    writer.writerows([csv_cell(row.get(name)) for name in columns] for row in found)
    return stream.getvalue()


def payload(groups: Sequence[Group], problems: Sequence[str], by: Axis | None = None) -> dict[str, Any]:
    """The content of the report as data. NaN and infinity become null, because JSON does not support them."""
    return {
        "groups": [
            {
                "title": group.title,
                "protocol": finite(group.protocol),
                "description": group.describe(),
                "times": group.describe_times(),
                "axis": by or default_axis(group),
                "columns": list(dict.fromkeys(head for _, head in sorted(columns.values()))),
                "metrics": {
                    m: {"title": metric_title(m)}
                    | {key: r["metrics"][m][key] for key in ("better", "features", "reference")}
                    for m in group.metrics()
                    for r in [next(r for r in group.records if m in r["metrics"])]
                },
                "tables": [_table(t) for t in matrices(group, by)],
                "records": [
                    {
                        **{k: v for k, v in finite(_own_times(r)).items() if k != "seal"},
                        "label": group.label(r),
                        "column": columns[r["protocol"]][1],
                        "steps_label": steps_label(r),
                        "spacing_label": names.spacing(r),
                        "seconds_per_image": group.seconds_per_image(r),
                        "command": command(r),
                    }
                    for r in group.records
                ],
            }
            for group, names, columns in ((g, RowNames(g.records), _columns(g, by)) for g in groups)
        ],
        "problems": list(problems),
    }


def _columns(group: Group, by: Axis | None) -> dict[str, tuple[float, str]]:
    """The column of each result in a table of all metrics: protocol hash → its place and its heading."""
    found = {r["protocol"]: column(r, by or default_axis(group)) for r in group.records}
    own = own_head([r for r in group.records if found[r["protocol"]] is None])
    return {key: (math.inf, own) if place is None else (place, str(place)) for key, place in found.items()}


def _table(table: Matrix) -> dict[str, Any]:
    return {
        "metric": table.metric,
        "axis": table.axis,
        "columns": table.heads,
        "measured_in": table.measured_in.strip().removeprefix("(").removesuffix(")"),
        "no_value": list(table.no_value),
        "notes": table.notes,
        "rows": [
            {
                "label": name,
                "cells": [
                    None
                    if e is None
                    else {"protocol": e.record["protocol"], "text": e.text, "best": e.best} | {"tied": e.tied}
                    for e in row
                ],
            }
            for name, row in table.rows
        ],
    }


def finite(value: Any) -> Any:
    """Replace NaN and infinity by null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
