"""`samplerbench list` and `samplerbench show`: what there is, and what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from samplerbench.cli import common
from samplerbench.errors import UserError

Plural = Literal["samplers", "guidances", "spacings", "models", "metrics", "data"]


def list_plugins(
    kind: Annotated[Plural | None, typer.Argument(help="Only these.")] = None,
) -> None:
    """List what is installed: names, what they are, where they come from, and what is broken.

    Neither torch nor a plugin is imported for it.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from samplerbench import registry

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    kinds = [kind] if kind else list(registry.KINDS)
    found = {plural: registry.entries(registry.KINDS[plural]) for plural in kinds}
    broken = registry.failures(e for entries in found.values() for e in entries)
    for plural, entries in found.items():
        table = Table(title=plural, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(no_wrap=True, style="cyan", min_width=12)
        table.add_column(ratio=1)
        table.add_column(style="dim", no_wrap=True)
        for entry in entries:
            text = f"[red]broken: {escape(broken[entry])}[/red]" if entry in broken else escape(registry.summary(entry))
            table.add_row(escape(entry.name), text, escape(entry.origin))
        if not entries:
            table.add_row("(none)", "", "")
        console.print(table)
        console.print()
    if kind == "models" or kind is None:
        console.print("A model is also a checkpoint folder or a hub id (owner/name): --model PATH.", style="dim")


def show(
    name: Annotated[
        str, typer.Argument(help="A sampler, guidance, spacing, metric or model, or PATH.py:CLASS; or a folder.")
    ],
    revision: common.Revision = None,
    variant: common.Variant = None,
    offline: common.Offline = False,
) -> None:
    """Show a plugin's description, formula, source and parameters, or a checkpoint's settings."""
    from rich.console import Console

    from samplerbench import plugin_file, registry

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    if plugin_file.split(name):
        kinds = ("sampler", "guidance", "spacing", "metric", "model")
        _show_plugin(console, registry.find(registry.kind_of(name, kinds), registry.split(name)[0]))
        return
    named = [e for kind in registry.BASES for e in registry.entries(kind) if e.name == name.partition(":")[0]]
    if not named:
        if Path(name).expanduser().is_dir() or name.count("/") == 1:
            _show_checkpoint(console, name, revision, variant, offline)
            return
        from samplerbench.options import did_you_mean

        known = sorted({e.name for kind in registry.BASES for e in registry.entries(kind)})
        raise UserError(
            f'nothing is called "{name}".{did_you_mean(name, known)} `samplerbench list` shows what there is.'
        )
    for entry in dict.fromkeys((e.kind, e.name) for e in named):
        _show_plugin(console, registry.find(*entry))
        if entry[0] == "model":
            _show_checkpoint(console, name, revision, variant, offline)


def _show_plugin(console: Any, entry: Any) -> None:
    import inspect

    from rich.markup import escape
    from rich.table import Table

    from samplerbench import registry
    from samplerbench.options import parameters_of, show_value

    cls = registry.load(entry)
    console.print(f"[bold cyan]{escape(entry.name)}[/bold cyan]  {entry.kind}, from {escape(entry.origin)}")
    console.print()
    console.print(inspect.getdoc(cls) or "(no description)", markup=False, highlight=False)
    console.print()
    known = parameters_of(cls)
    if not known:
        console.print("No parameters.")
    else:
        table = Table(header_style="bold")
        for column in ("parameter", "type", "bounds", "default", "meaning"):
            table.add_column(column, overflow="fold")
        for p in known.values():
            cells = (p.name, p.type_name, p.range or "-", show_value(p.default) or '""', p.help)
            table.add_row(*map(escape, cells))
        console.print(table)
    if entry.kind == "sampler":
        spacing = getattr(cls, "spacing", None) or registry.default("spacing")
        console.print(f"Default spacing: {spacing}")


def _show_checkpoint(console: Any, source: str, revision: str | None, variant: str | None, offline: bool) -> None:
    import torch
    from rich.markup import escape
    from rich.table import Table

    from samplerbench.bench.setup import load_model
    from samplerbench.models.files import LoadOptions

    options = LoadOptions(revision, variant, offline=offline, show=True)
    model = load_model(source, torch.device("cpu"), "fp32", options)
    levels = model.levels
    kind = "prompts" if model.text else "none"
    classes = kind if model.classes is None else f"{model.classes}" + (", and none" if model.null else "")
    rows: dict[str, Any] = {
        "images": "x".join(map(str, model.image_shape)),
        **({"latents": "x".join(map(str, model.shape))} if model.autoencoder is not None else {}),
        "classes": classes,
        "noise levels": f"{len(levels)}, σ from {float(levels[0]):.4g} to {float(levels[-1]):.4g}",
        "learned variance": "yes" if model.learned_variance else "no",
        "classifier": "yes" if model.default_classifier else "no",
        "features": model.features or "inception-v3-compat (default)",
        **{k: v for k, v in model.identity.items() if v != ""},
        **model.notes,
    }
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, escape(str(value)))
    console.print(table)
