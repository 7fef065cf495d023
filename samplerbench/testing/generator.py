"""The checks of a generator, beside a small latent model."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from samplerbench.models.exact import ExactModel, exact
from samplerbench.models.latent import Autoencoder
from samplerbench.sampling import Generator, Inputs
from samplerbench.sampling.generator import bind_generator
from samplerbench.sampling.meter import Meter
from samplerbench.testing.common import (
    Checks,
    check_documented,
    check_picklable,
    require,
    same,
    untouched_random_state,
)

BATCH = 6


class _Decoder(nn.Module):
    """An autoencoder that decodes a latent to its hyperbolic tangent."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Tanh()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64), requires_grad=False)

    def decode(self, z: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.decoder(z))


@cache
def _model() -> ExactModel:
    model = exact("mixture", shape="1x8x8")
    model.data = "digits"
    model.autoencoder = Autoencoder(_Decoder(), model.shape, model.shape, 0.5)
    return model


def _inputs(model: ExactModel, index: Tensor) -> Inputs:
    return Inputs(len(index), index % (model.classes or 1))


@torch.no_grad()
def _images(generator: Generator, index: Tensor, seed: int = 0) -> Tensor:
    model = _model()
    return bind_generator(generator, model).images(index, _inputs(model, index), seed)


def check_images(generator: Generator) -> str:
    """Gives finite images of the model's shape, near [-1, 1]."""
    model, images = _model(), _images(generator, torch.arange(BATCH))
    wanted = (BATCH, *model.image_shape)
    require(tuple(images.shape) == wanted, f"{BATCH} images have the shape {tuple(images.shape)}, not {wanted}")
    require(images.is_floating_point(), f"the images are {images.dtype}, not floating-point numbers in [-1, 1]")
    require(bool(images.isfinite().all()), "an image is not finite")
    most = float(images.abs().max())
    require(most <= 10, f"the largest value is {most:.3g}; images are in [-1, 1]")
    return f"{tuple(images.shape)}, values up to {most:.2f}"


def check_batch_split(generator: Generator) -> str:
    """Image i is the same in any batch and in any order."""
    together = _images(generator, torch.arange(BATCH))
    alone = torch.cat([_images(generator, torch.tensor([i])) for i in range(BATCH)])
    backwards = _images(generator, torch.arange(BATCH).flip(0)).flip(0)
    worst = max(same(together, alone), same(together, backwards))
    require(worst <= 1e-5, f"an image changes by {worst:.1e} with the batch it is in")
    return f"differ by {worst:.1e}"


def check_seed(generator: Generator) -> str:
    """The same seed gives the same images, another one others, and the images of one batch differ."""
    index = torch.arange(BATCH)
    one, two, other = _images(generator, index), _images(generator, index), _images(generator, index, seed=1)
    require(torch.equal(one, two), f"two runs with one seed differ by {same(one, two):.1e}")
    require(same(one, other) > 0, "another seed gives the same images")
    require(all(same(one[0], image) > 0 for image in one[1:]), "all images are the same")
    return "bit for bit"


def check_labels(generator: Generator) -> str:
    """Labels that it states itself are class labels, and that of image i is the same in any batch."""
    bound, index = bind_generator(generator, _model()), torch.arange(BATCH)
    if not bound.own_labels:
        return "the requested labels apply"
    labels = bound.labels(index, 0)
    if labels is None:
        return "unknown"
    require(isinstance(labels, torch.Tensor), f"labels returned {type(labels).__name__}; it must be a tensor or None")
    kind = f"{tuple(labels.shape)}, {labels.dtype}"
    require(kind == f"({BATCH},), torch.int64", f"labels are {kind}; they must be ({BATCH},), torch.int64")
    classes = _model().classes or 1
    require(bool(((labels >= 0) & (labels < classes)).all()), f"labels are not all from 0 to {classes - 1}")
    alone = torch.cat([bound.labels(index[i : i + 1], 0) for i in range(BATCH)])  # type: ignore[misc]
    require(torch.equal(labels, alone), "a label changes with the batch it is in")
    return f"labels {', '.join(map(str, labels.tolist()))}"


def check_nfe(generator: Generator) -> str:
    """The evaluations that are counted at `network` are the same for every image."""
    model = _model()
    bound = bind_generator(generator, model)
    if bound.network is None:
        return "no network is counted"
    counts = []
    for n in (1, BATCH):
        index = torch.arange(n)
        with Meter(bound.network) as meter, torch.no_grad():
            bound.images(index, _inputs(model, index), 0)
        counts.append(meter.network / n)
    alone, together = counts
    require(alone == together > 0, f"{alone:g} evaluations are counted for one image, {together:g} each in a batch")
    return f"{alone:g} per image"


def check_random_state(generator: Generator) -> str:
    """Touches no global random state."""
    with untouched_random_state():
        _images(generator, torch.arange(BATCH))
    return "untouched"


CHECKS: Checks = [
    ("documented", check_documented),
    ("picklable", check_picklable),
    ("images", check_images),
    ("batch-split", check_batch_split),
    ("seed", check_seed),
    ("labels", check_labels),
    ("nfe", check_nfe),
    ("random-state", check_random_state),
]
