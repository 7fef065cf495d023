"""`samplerbench convert`: published networks in other formats, as folders that `--model` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samplerbench.text import note, say

app = typer.Typer(no_args_is_help=True, help="Convert a published network to a folder for --model.")


@app.callback()
def root() -> None:
    """Convert a published network to a folder for --model."""


@app.command("edm")
def edm(
    file: Annotated[Path, typer.Argument(help="Pickle of EDM: `edm-cifar10-32x32-cond-vp.pkl`.")],
    out: Annotated[Path, typer.Argument(help="Folder to write. It must be empty, or not exist.")],
) -> None:
    """Convert a published network of EDM (Karras et al. 2022) to a folder for --model.

    No code in the file is run: only the settings and the tensors of the network are read.

    Example:

    `samplerbench convert edm edm-cifar10-32x32-cond-vp.pkl edm-cifar10`
    """
    from samplerbench.models.edm_convert import convert_edm
    from samplerbench.untrusted import user_path

    network = convert_edm(user_path(file), user_path(out))
    settings = network.network.settings
    size = sum(p.numel() for p in network.parameters())
    labels = f"{settings.label_dim:,} class labels" if settings.label_dim else "no class labels"
    note(
        f"{settings.model_type}, {settings.img_resolution}x{settings.img_resolution} pixels, {labels}, "
        f"{size:,} parameters"
    )
    say(out)
