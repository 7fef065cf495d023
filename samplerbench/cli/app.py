"""The Typer application: registers the commands, and turns errors into one line and an exit code."""

from __future__ import annotations

import functools
import os
import re
import sys
import traceback
from contextlib import suppress
from typing import Any

import typer

from samplerbench.cli import (
    check,
    compare,
    convert,
    export,
    figure,
    latency,
    likelihood,
    listing,
    new,
    plugins,
    recommend,
    report,
    results,
    run,
    schedule,
    stats,
    train,
    tune,
)
from samplerbench.cli.spelling import with_options
from samplerbench.cli.usage import describe
from samplerbench.errors import LaunchError, SamplerbenchError, UserError
from samplerbench.portable import Replaced
from samplerbench.text import note, one_line, say, tolerate_encoding

# Newer versions of Typer bundle their own copy of click; this finds the base class of usage errors in either.
ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="samplerbench",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Benchmark diffusion samplers: samplers are plugins, results are steps-vs-FID tables with error bars.",
)
app.command("run")(run.run)
app.command("sample")(run.sample)
app.command("export")(export.export)
app.command("list")(listing.list_plugins)
app.command("show")(listing.show)
app.command("check")(check.check)
app.command("plugins")(plugins.plugins)
app.command("new")(new.new)
app.command("stats")(stats.stats)
app.command("report")(report.report)
app.command("compare")(compare.compare)
app.command("latency")(latency.latency)
app.command("likelihood")(likelihood.likelihood)
app.command("tune")(tune.tune)
app.command("recommend")(recommend.recommend)
app.command("schedule")(schedule.schedule)
app.add_typer(convert.app, name="convert")
app.add_typer(figure.app, name="figure")
app.add_typer(results.app, name="results")
app.add_typer(train.app, name="train")


@functools.cache
def command() -> Any:
    """The command of the application. Typer builds it from the signatures of all commands, which takes a while."""
    return typer.main.get_command(app)


def show_version(wanted: bool) -> None:
    """Print the version, and those of Python, torch, diffusers and the system. Nothing is imported."""
    if not wanted:
        return
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from samplerbench import __version__

    parts = [f"Python {platform.python_version()}"]
    for name in ("torch", "diffusers"):
        with suppress(PackageNotFoundError):
            parts.append(f"{name} {version(name)}")
    say(f"samplerbench {__version__} ({', '.join([*parts, f'{platform.system()} {platform.machine()}'])})")
    raise typer.Exit


@app.callback()
def root(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of errors.", envvar="SAMPLERBENCH_DEBUG"),
    no_plugins: bool = typer.Option(
        False, "--no-plugins", help="Use only the built-in plugins.", envvar="SAMPLERBENCH_NO_PLUGINS"
    ),
    version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", callback=show_version, is_eager=True
    ),
) -> None:
    """Options that go before the command."""
    if debug:
        os.environ["SAMPLERBENCH_DEBUG"] = "1"
    if no_plugins:
        os.environ["SAMPLERBENCH_NO_PLUGINS"] = "1"


FIRST_COMMANDS = """Usage: samplerbench [OPTIONS] COMMAND [ARGS]...

Three commands to try first:

  samplerbench list samplers                              show the installed samplers
  samplerbench sample grid.png --sampler ddim --steps 20  sample images of digits, and write them as grid.png
  samplerbench run --sampler ddim --steps 5,10,20         measure the FID of these images at three numbers of steps

`samplerbench --help` lists all commands. `samplerbench COMMAND --help` shows the options of a command."""
"""What `samplerbench` prints without arguments."""

MAY_BE_EMPTY = ("--negative-prompt",)
"""Options for which an empty value is valid."""


def refuse_empty(arguments: list[str]) -> None:
    """Raise an error for an option with an empty value, such as an unset shell variable gives.

    Raises:
        UserError: `--data ""` or `--data=`.
    """
    before = ""
    for argument in arguments:
        if argument == "--":
            return
        name = ""
        if argument.startswith("--") and argument.endswith("="):
            name = argument[:-1]
        elif not argument.strip() and re.fullmatch("--?[a-z][a-z-]*", before):
            name = before
        if name and name not in MAY_BE_EMPTY and "=" not in name:
            raise UserError(f"{name} is empty; give a value or omit the option.")
        before = argument


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, then exit: 0 for success, 2 for bad input, 1 for a failed run, 130 after Ctrl-C."""
    tolerate_encoding()
    given = sys.argv[1:] if arguments is None else arguments
    if not given and "_SAMPLERBENCH_COMPLETE" not in os.environ:
        say(FIRST_COMMANDS)
        sys.exit(2)
    try:
        refuse_empty(given)
        code = command()(args=arguments, prog_name="samplerbench", standalone_mode=False)
    except SamplerbenchError as error:
        if os.environ.get("SAMPLERBENCH_DEBUG"):
            raise
        if isinstance(error, LaunchError):
            from samplerbench.bench.launch import end_launch

            end_launch(with_options(error))
        note(with_options(error))
        sys.exit(error.exit_code)
    except ClickException as error:
        if line := describe(error, given, command()):
            note(line)
        sys.exit(error.exit_code)
    except Replaced:
        raise
    except SystemExit as error:
        # Typer exits in this way after shell completion, and if the output is closed (`samplerbench --help | head`).
        if "_SAMPLERBENCH_COMPLETE" in os.environ or isinstance(error.__context__, BrokenPipeError):
            raise
        if os.environ.get("SAMPLERBENCH_DEBUG"):
            traceback.print_exc()
        note(f"a plugin called sys.exit({one_line(error.code)}); finished results are kept.")
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        note("stopped.")
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
