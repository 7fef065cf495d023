"""`samplerbench stats`: reference statistics of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samplerbench.cli import common
from samplerbench.errors import UserError


def stats(
    data: Annotated[str, typer.Argument(help="`digits`, or a folder of images.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write.")],
    features: Annotated[str, typer.Option("--features", help="Feature space.")] = "inception-v3-compat",
    features_weights: Annotated[str | None, typer.Option("--features-weights", help="The extractor's weights.")] = None,
    device: common.Device = "auto",
) -> None:
    """Write the mean and covariance of a data set's features, to be used as `--data` of a run.

    Example: `samplerbench stats digits --features digits-cnn --out digits-reference.safetensors`
    """
    from samplerbench.bench import setup
    from samplerbench.bench.store import Store
    from samplerbench.data import load_data
    from samplerbench.metrics.extractors import load_extractor
    from samplerbench.metrics.reference import measure

    if out.suffix != ".safetensors":
        raise UserError(f"{out}: statistics are a .safetensors file; name one, like {out.stem or 'real'}.safetensors.")
    Store(out.parent).prepare()
    setup.quiet_libraries()
    extractor = load_extractor(features, setup.pick_device(device), features_weights)
    reference = measure(load_data(data), extractor)
    reference.save(out)
    print(out)
