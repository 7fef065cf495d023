"""`samplerbench stats`: compute the reference statistics of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samplerbench.cli import common
from samplerbench.errors import UserError
from samplerbench.text import say
from samplerbench.untrusted import user_path


def stats(
    data: Annotated[
        str,
        typer.Argument(
            help="Data set name (`mnist`), folder or zip of images, npz file of images, or npz file of `mu` and "
            "`sigma`.",
            autocompletion=common.complete("data set"),
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, with the suffix .safetensors.")],
    features: Annotated[
        str, typer.Option("--features", help="Feature extractor.", autocompletion=common.choices(common.FEATURES))
    ] = "inception-v3-compat",
    features_weights: Annotated[
        str | None, typer.Option("--features-weights", help="File with the extractor's weights.")
    ] = None,
    device: common.Device = "auto",
) -> None:
    """Write the mean and covariance of a data set's features, for use as `--data` of a run.

    The statistics are also stored in the cache, under the hash of the images. Published statistics (an npz file with
    `mu` and `sigma`, the format of EDM, pytorch-fid and guided-diffusion) are converted. Such a file does not name its
    features, so set --features to the extractor that it was computed with.

    Examples:

    `samplerbench stats digits --features digits-cnn --out digits-reference.safetensors`

    `samplerbench stats cifar10-32x32.npz --out cifar10.safetensors`
    """
    from samplerbench.bench import setup
    from samplerbench.data.load import find_data
    from samplerbench.metrics.extractors import load_extractor
    from samplerbench.metrics.reference import load_published, measure_once
    from samplerbench.results.store import Store

    if out.suffix != ".safetensors":
        raise UserError(f"{out}: the file must have the suffix .safetensors, as in {out.stem or 'real'}.safetensors.")
    Store(out.parent).prepare()
    images = find_data(data)
    setup.quiet_libraries()
    extractor = load_extractor(features, setup.pick_device(device), features_weights)
    published = load_published(user_path(data), extractor) if data.endswith(".npz") else None
    reference = published or measure_once(images(), extractor)
    reference.save(out)
    say(out)
