"""`samplerbench check`: is a plugin what it says it is?"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

import typer

from samplerbench.cli.spelling import with_options
from samplerbench.errors import UserError
from samplerbench.text import console, literal, print_json

Kind = Literal["sampler", "guidance", "spacing", "generator", "metric", "model"]


def check(
    spec: Annotated[
        list[str],
        typer.Argument(help="Plugins, with parameters: `ddim:eta=0.5`, `./mine.py:Mine`. Several are allowed."),
    ],
    kind: Annotated[
        Kind | None, typer.Option("--kind", help="Of which kind they are. Default: all that have such a name.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
) -> None:
    """Hold a plugin against the truth: a sampler, guidance, spacing, metric or model.

    Samplers, guidances and spacings are measured on problems with a closed form, metrics on real images and noise,
    models by what every denoiser is. Prints the measured figure of each check; exit code 1 if one fails.

    Examples:

    `samplerbench check ddim`

    `samplerbench check dpm++:order=3 cfg:scale=3 karras --json`

    `samplerbench check ./my_sampler.py:MySampler:eta=0.5`

    `samplerbench check my-metric my-model`
    """
    import torch
    from rich.table import Table
    from rich.text import Text

    from samplerbench.bench.setup import quiet_libraries
    from samplerbench.testing.checks import checks_for, run_check

    # The problems are tiny: threads only get in each other's way.
    torch.set_num_threads(1)
    plugins = [plugin for one in spec for plugin in _named(one, kind)]
    # diffusers' schedulers warn of what they change in their settings, at every run; its loaders have a progress bar.
    if "diffusers" in sys.modules or any(plugin.kind == "model" for plugin in plugins):
        quiet_libraries()
    out = console()
    told, failed = [], 0
    for plugin in plugins:
        title = literal(f"{plugin.kind} {plugin.spec}", "bold")
        table = Table(title=title, title_justify="left", header_style="bold")
        table.add_column("check", no_wrap=True)
        table.add_column("")
        table.add_column("measured", overflow="fold")
        table.add_column("what it asserts", style="dim")
        status = out.status("") if not as_json and out.is_terminal else None
        if status:
            status.start()
        for one in checks_for(plugin):
            if status:
                status.update(literal(f"{plugin.spec}: {one.name} …"))
            result = run_check(one)
            failed += result.passed is False
            told.append(
                {"kind": plugin.kind, "spec": plugin.spec, "check": result.name, "passed": result.passed}
                | {"figure": with_options(result.figure), "asserts": result.about}
            )
            mark = {True: ("ok", "green"), False: ("FAILED", "red"), None: ("n/a", "dim")}[result.passed]
            table.add_row(result.name, Text(*mark), literal(with_options(result.figure)), literal(result.about))
        if status:
            status.stop()
        if not as_json:
            out.print(table)
    if as_json:
        print_json(told)
    elif failed:
        out.print(f"{failed} failed", style="red")
    if failed:
        raise typer.Exit(1)


def _named(spec: str, kind: Kind | None) -> list[Any]:
    """The plugins of a spec: one of each kind that has a plugin of that name.

    Raises:
        UserError: there is none, it is broken, or it is a data set, which nothing is asked of.
    """
    from samplerbench import registry
    from samplerbench.testing.checks import KINDS

    try:
        kinds = registry.kinds_of(spec, [kind] if kind else KINDS)
    except UserError:
        name = registry.split(spec)[0]
        if kind or all(e.name != name for e in registry.entries("data set")):
            raise
        raise UserError(
            f"{name} is a data set, and there are no checks for one; there are for {', '.join(KINDS)}."
        ) from None
    return [registry.parse(found, spec) for found in kinds]
