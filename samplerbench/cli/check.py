"""`samplerbench check`: test a plugin against known results."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

import typer

from samplerbench.cli import common
from samplerbench.cli.spelling import with_options
from samplerbench.errors import UserError
from samplerbench.text import console, literal, print_json

Kind = Literal["sampler", "guidance", "spacing", "generator", "task", "metric", "model"]


def check(
    spec: Annotated[
        list[str],
        typer.Argument(
            help="One or more plugins, with optional parameters: `ddim:eta=0.5`, `./mine.py:Mine`.",
            autocompletion=common.complete("sampler", "guidance", "spacing", "generator", "task", "metric", "model"),
        ),
    ],
    kind: Annotated[
        Kind | None, typer.Option("--kind", help="Kind of the plugins. Default: every kind with a plugin of this name.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only a JSON list.")] = False,
) -> None:
    """Test a sampler, guidance, spacing, task, metric or model against known results.

    Samplers, guidances and spacings are tested on problems with a closed-form solution, tasks by the properties of
    their operators, metrics on real images and noise, and models on the properties of a denoiser. The command prints
    the measured value of each check. The exit code is 1 if a check fails.

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

    # The problems are small: several threads are slower than one.
    torch.set_num_threads(1)
    plugins = [plugin for one in spec for plugin in _named(one, kind)]
    # Silences the configuration warnings of diffusers' schedulers and the progress bars of its loaders.
    if "diffusers" in sys.modules or any(plugin.kind == "model" for plugin in plugins):
        quiet_libraries()
    out = console()
    results, failed = [], 0
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
            results.append(
                {"kind": plugin.kind, "spec": plugin.spec, "check": result.name, "passed": result.passed}
                | ({"warning": True} if result.warning else {})
                | {"figure": with_options(result.figure), "asserts": result.about}
            )
            mark = {True: ("ok", "green"), False: ("FAILED", "red"), None: ("n/a", "dim")}[result.passed]
            mark = ("warning", "yellow") if result.warning else mark
            table.add_row(result.name, Text(*mark), literal(with_options(result.figure)), literal(result.about))
        if status:
            status.stop()
        if not as_json:
            out.print(table)
    if as_json:
        print_json(results)
    elif failed:
        out.print(f"{failed} failed", style="red")
    if failed:
        raise typer.Exit(1)


def _named(spec: str, kind: Kind | None) -> list[Any]:
    """The plugins of a spec: one for each kind that has a plugin of this name with these parameters.

    Raises:
        UserError: no such plugin, a plugin that cannot be loaded, or a data set, which has no checks.
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
            f"{name} is a data set, which has no checks; the kinds with checks are {', '.join(KINDS)}."
        ) from None
    plugins, refused = [], []
    for found in kinds:
        try:
            plugins.append(registry.parse(found, spec))
        except UserError as error:
            refused.append(error)
    if not plugins:
        raise refused[0]
    return plugins  # the parameters of a spec may fit only one of several plugins of a name
