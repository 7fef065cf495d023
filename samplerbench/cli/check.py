"""`samplerbench check`: is a plugin what it says it is?"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer


def check(
    spec: Annotated[
        list[str],
        typer.Argument(help="Samplers, guidances or spacings: `ddim:eta=0.5`, `./mine.py:Mine`. Several are allowed."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
) -> None:
    """Hold a sampler, guidance or spacing against the truth, on problems with a closed form.

    Prints the measured figure of each check; exit code 1 if one fails.

    Examples:

    `samplerbench check ddim`

    `samplerbench check dpm++:order=3 cfg:scale=3 karras --json`

    `samplerbench check ./my_sampler.py:MySampler:eta=0.5`
    """
    import torch
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from samplerbench import registry
    from samplerbench.bench.setup import quiet_libraries
    from samplerbench.testing.checks import checks_for, run_check

    # The problems are tiny: threads only get in each other's way.
    torch.set_num_threads(1)
    plugins = [registry.parse(registry.kind_of(one), one) for one in spec]
    if "diffusers" in sys.modules:  # its schedulers warn of what they change in their settings, at every run
        quiet_libraries()
    console = Console() if Console().is_terminal else Console(width=140)
    told, failed = [], 0
    for plugin in plugins:
        table = Table(
            title=escape(f"{plugin.kind} {plugin.spec}"), title_justify="left", title_style="bold", header_style="bold"
        )
        table.add_column("check", no_wrap=True)
        table.add_column("")
        table.add_column("measured", overflow="fold")
        table.add_column("what it asserts", style="dim")
        status = console.status("") if not as_json and console.is_terminal else None
        if status:
            status.start()
        for one in checks_for(plugin):
            if status:
                status.update(escape(f"{plugin.spec}: {one.name} …"))
            result = run_check(one)
            failed += result.passed is False
            told.append(
                {"kind": plugin.kind, "spec": plugin.spec, "check": result.name, "passed": result.passed}
                | {"figure": result.figure, "asserts": result.about}
            )
            mark = {True: "[green]ok[/green]", False: "[red]FAILED[/red]", None: "[dim]n/a[/dim]"}[result.passed]
            table.add_row(result.name, mark, escape(result.figure), escape(result.about))
        if status:
            status.stop()
        if not as_json:
            console.print(table)
    if as_json:
        print(json.dumps(told, indent=2, ensure_ascii=False))
    elif failed:
        console.print(f"[red]{failed} failed[/red]")
    if failed:
        raise typer.Exit(1)
