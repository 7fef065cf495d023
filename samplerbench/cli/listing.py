"""`samplerbench list` and `samplerbench show`: the installed plugins, and the details of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer

from samplerbench.cli import common
from samplerbench.errors import UserError
from samplerbench.text import console, literal, note, printable, unwrapped
from samplerbench.untrusted import is_dir, is_file, shorten

Plural = Literal[
    "samplers", "guidances", "spacings", "generators", "tasks", "models", "metrics", "data", "features", "schedulers"
]


def list_plugins(
    kind: Annotated[Plural | None, typer.Argument(help="List only this kind.")] = None,
) -> None:
    """List the installed plugins: name, description, distribution, and the error of a broken plugin.

    `features` lists the feature spaces, and `schedulers` the schedulers of diffusers that are supported as samplers.
    """
    from rich.table import Table

    from samplerbench import registry

    out = console(160)
    if kind == "schedulers":
        cls: Any = registry.get("sampler", "diffusers")
        flows = cls.schedulers(flows=True)
        for name in sorted({*cls.schedulers(), *flows}):
            out.print(literal(f"diffusers/{name}").append("  rectified flows" if name in flows else "", "dim"))
        return
    kinds = [kind] if kind in registry.KINDS else [] if kind else list(registry.KINDS)
    found = {plural: registry.entries(registry.KINDS[plural]) for plural in kinds}
    broken = registry.failures(e for entries in found.values() for e in entries)
    for plural, entries in found.items():
        table = Table(title=plural, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(no_wrap=True, style="cyan", min_width=12)
        table.add_column(ratio=1)
        table.add_column(style="dim", no_wrap=True)
        for entry in entries:
            wrong = f"broken: {broken[entry]}" if entry in broken else ""
            text = literal(wrong, "red") if wrong else literal(registry.summary(entry))
            table.add_row(literal(entry.name), text, literal(entry.origin))
        if not entries:
            table.add_row("(none)", "", "")
        out.print(table)
        out.print()
    for folder in [] if registry.no_plugins() else registry.unreadable():
        note(f"unreadable distribution: {folder}; reinstall or remove it.")
    if kind in ("features", None):
        out.print("features", style="bold")
        out.print(literal(" " + ", ".join(common.FEATURES)))
        out.print("A feature space can also be a folder written by `samplerbench train features`.", style="dim")
        out.print(
            "clip, cmmd and dinov2 are encoders of transformers: clip:PATH, or clip:owner/name of the Hub.", style="dim"
        )
        out.print()
    if kind in ("samplers", None):
        out.print("Schedulers of diffusers are samplers, too: `samplerbench list schedulers` lists them.", style="dim")
    if kind in ("models", None):
        out.print(
            "A model can also be a checkpoint folder or a Hub repository id (owner/name): --model PATH.", style="dim"
        )


def show(
    name: Annotated[
        str,
        typer.Argument(
            help="Sampler, guidance, spacing, task, metric or model; PATH.py:CLASS; or a checkpoint folder.",
            autocompletion=common.complete(
                "sampler", "guidance", "spacing", "generator", "task", "model", "metric", "data set"
            ),
        ),
    ],
    revision: common.Revision = None,
    variant: common.Variant = None,
    lora: common.Lora = [],  # noqa: B006
    scheduler: common.Scheduler = None,
    config: common.Config = None,
    offline: common.Offline = False,
) -> None:
    """Show the description, formula, source and parameters of a plugin, or the settings of a checkpoint."""
    from samplerbench import plugin_file, registry

    out = console(120)
    options = {"revision": revision, "variant": variant, "lora": tuple(lora), "offline": offline}
    options |= {"scheduler": scheduler, "config": config}
    if plugin_file.split(name):
        kinds = ("sampler", "guidance", "spacing", "generator", "task", "metric", "model")
        _show_plugin(out, registry.find(registry.kind_of(name, kinds), registry.split(name)[0]))
        return
    head = name.partition(":")[0]
    if head.startswith("diffusers/") and head.endswith("Scheduler"):
        registry.parse("sampler", name)  # raises if it is not supported
        _show_plugin(out, registry.find("sampler", "diffusers"))
        return
    current = {kind: registry.current_name(kind, head) for kind in registry.BASES}
    named = [e for kind in registry.BASES for e in registry.entries(kind) if e.name == current[kind]]
    if not named:
        if is_dir(name) or name.count("/") == 1 or is_file(name) or name.startswith("pipeline:"):
            out.print(_settings(name, options))
            return
        from samplerbench.options import did_you_mean

        if foreign := registry.name_elsewhere(head, registry.BASES):
            raise UserError(f'no plugin is called "{name}": {foreign}')
        known = sorted({e.name for kind in registry.BASES for e in registry.entries(kind)})
        raise UserError(
            f'no plugin is called "{name}".{did_you_mean(head, known)} `samplerbench list` lists the plugins.'
        )
    for entry in dict.fromkeys((e.kind, e.name) for e in named):
        table = _settings(name, options) if entry[0] == "model" else None
        _show_plugin(out, registry.find(*entry))
        if table is not None:
            out.print(table)


def _show_plugin(out: Any, entry: Any) -> None:
    import inspect

    from rich.table import Table

    from samplerbench import registry
    from samplerbench.options import parameters_of, show_value

    cls: Any = registry.load(entry)
    out.print(literal(entry.name, "bold cyan").append(f"  {entry.kind}, from {printable(entry.origin)}", "not bold"))
    out.print()
    out.print(printable(unwrapped(inspect.getdoc(cls) or "(no description)", out.width), lines=True))
    out.print()
    known = parameters_of(cls)
    if not known:
        out.print("No parameters.")
    else:
        table = Table(header_style="bold")
        for column in ("parameter", "type", "bounds", "default", "meaning"):
            table.add_column(column, overflow="fold")
        for p in known.values():
            cells = (p.name, p.type_name, p.range or "-", show_value(p.default) or '""', p.help)
            table.add_row(*map(literal, cells))
        out.print(table)
    if entry.kind == "sampler":
        from samplerbench.sampling.spacing import pick_spacing

        spacing = "none, the sampler chooses its own noise levels" if cls.own_grid else pick_spacing(cls).spec
        out.print(f"Default spacing: {printable(spacing)}")


def _first_names(names: Sequence[str], most: int = 5) -> str:
    """The first class names with their labels: `0 airplane; 1 automobile; …`."""
    named = [f"{label} {shorten(name, 60)}" for label, name in enumerate(names) if name]
    return "; ".join(named[:most]) + ("; …" if len(named) > most else "")


def _settings(source: str, options: dict[str, Any]) -> Any:
    """The table of a model's settings."""
    import torch
    from rich.table import Table

    from samplerbench.bench.setup import load_model
    from samplerbench.models.files import LoadOptions

    model = load_model(source, torch.device("cpu"), "fp32", LoadOptions(**options, show=True))
    levels = model.levels
    kind = "prompts" if model.text else "none"
    classes = kind if model.classes is None else f"{model.classes}" + (", and none" if model.null else "")
    rows: dict[str, Any] = {
        "images": "x".join(map(str, model.image_shape)),
        **({"latents": "x".join(map(str, model.shape))} if model.autoencoder is not None else {}),
        "classes": classes,
        **({"class names": _first_names(model.class_names)} if any(model.class_names) else {}),
        "noise levels": f"{len(levels)}, σ from {float(levels[0]):.4g} to {float(levels[-1]):.4g}",
        "learned variance": "yes" if model.learned_variance else "no",
        "classifier": "yes" if model.classifier_folder else "no",
        "features": model.features or "inception-v3-compat (default)",
        **{k: v for k, v in model.identity.items() if v != ""},
        **model.notes,
    }
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(literal(key), literal(value))
    return table
