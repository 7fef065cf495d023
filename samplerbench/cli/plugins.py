"""`samplerbench plugins`: the distributions that register plugins, and their errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from samplerbench.text import console, literal, print_json, printable

if TYPE_CHECKING:
    from samplerbench.registry import Entry, Finding


def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, one object per plugin.")] = False,
) -> None:
    """Show the distributions that register plugins, the plugins of each, and their errors.

    This process imports neither torch nor the plugins. `samplerbench --no-plugins COMMAND` runs a command with only
    the built-in plugins.

    Examples:

    `samplerbench plugins`

    `samplerbench --no-plugins plugins`
    """
    from samplerbench import registry

    out = console(160)
    entries = [e for kind in registry.BASES for e in registry.entries(kind)]
    wrong = registry.findings(entries)
    if as_json:
        print_json([_record(e, wrong.get(e, registry.Finding())) for e in entries])
        return
    origins = sorted({e.origin for e in entries}, key=lambda o: (not o.startswith(f"{registry.OWN} "), o))
    for origin in origins:
        own = [e for e in entries if e.origin == origin]
        out.print(literal(origin + (" (built in)" if own[0].distribution == registry.OWN else ""), "bold"))
        out.print(_table(own, wrong))
        out.print()
    broken = sum(bool(f.error) for f in wrong.values())
    foreign = len(origins) - any(e.distribution == registry.OWN for e in entries)
    if registry.no_plugins():
        out.print(f"Plugins of other distributions are disabled by --no-plugins or {registry.NO_PLUGINS}.", style="dim")
    elif not foreign:
        out.print("No other distribution registers plugins. `samplerbench new` creates one.", style="dim")
    if broken:
        out.print(f"{broken} cannot be used; all other plugins work.", style="red")
    for folder in [] if registry.no_plugins() else registry.unreadable():
        out.print(f"unreadable distribution: {printable(folder)}", style="red")
    for folder in registry.other_installations():
        out.print(f"ignored, another distribution called {registry.OWN}: {printable(folder)}", style="yellow")


def _table(entries: list[Entry], wrong: dict[Entry, Finding]) -> Any:
    """The plugins of one distribution: a row of working names for each kind, and a row for each broken plugin."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True, min_width=10)
    table.add_column(style="cyan", overflow="fold")
    table.add_column(overflow="fold")
    for kind in dict.fromkeys(e.kind for e in entries):
        working = [e.name for e in entries if e.kind == kind and e not in wrong]
        if working:
            table.add_row(kind, literal(", ".join(working)), "")
        for e in entries:
            if e.kind == kind and e in wrong:
                error = wrong[e].error
                text = literal(f"broken: {error}", "red") if error else literal(wrong[e].remark, "yellow")
                table.add_row(kind, literal(e.name), text)
    return table


def _record(entry: Entry, finding: Finding) -> dict[str, str]:
    return {
        "kind": entry.kind,
        "name": entry.name,
        "distribution": entry.distribution,
        "version": entry.version,
        "value": entry.value,
        "error": finding.error,
        "remark": finding.remark,
    }
