"""`samplerbench stats`: reference statistics of a data set."""

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
            help="A name (`mnist`), a folder or zip of images, an npz of images; or an npz of `mu` and `sigma`."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write.")],
    features: Annotated[str, typer.Option("--features", help="Feature space.")] = "inception-v3-compat",
    features_weights: Annotated[str | None, typer.Option("--features-weights", help="The extractor's weights.")] = None,
    device: common.Device = "auto",
) -> None:
    """Write the mean and covariance of a data set's features, to be used as `--data` of a run.

    They are kept in the cache under the hash of the images, too. Published statistics (an npz with `mu` and `sigma`,
    as EDM, pytorch-fid and guided-diffusion use) are imported: they become statistics of the features named here.

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
        raise UserError(f"{out}: statistics are a .safetensors file; name one, like {out.stem or 'real'}.safetensors.")
    Store(out.parent).prepare()
    images = find_data(data)
    setup.quiet_libraries()
    extractor = load_extractor(features, setup.pick_device(device), features_weights)
    published = load_published(user_path(data), extractor) if data.endswith(".npz") else None
    reference = published or measure_once(images(), extractor)
    reference.save(out)
    say(out)
