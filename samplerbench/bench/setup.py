"""From the words of a command to the objects of a run."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samplerbench import plugin_file, registry
from samplerbench.bench.session import NamedData, RealData
from samplerbench.boundary import plugin_call
from samplerbench.data import ImageSet, load_data
from samplerbench.data.load import find_data
from samplerbench.data.pixels import quantise
from samplerbench.errors import RunError, UserError, argument
from samplerbench.metrics.extractors import DIGITS, Extractor, known_dimension, load_extractor
from samplerbench.metrics.metric import Layer, Metric
from samplerbench.metrics.reference import (
    Reference,
    holds_only_statistics,
    load_published,
    load_reference,
    measure,
    measure_once,
    published_sizes,
)
from samplerbench.models.files import LoadOptions, check_no_prompts
from samplerbench.models.model import Model
from samplerbench.models.runner import Runner, check_compiler, set_precision
from samplerbench.sampling import Guidance
from samplerbench.sampling.guidance import bind_guidance
from samplerbench.sampling.spacing import pick_spacing as pick_spacing
from samplerbench.untrusted import is_dir, is_file, shorten, user_path


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notices off the terminal: ours say what matters."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("diffusers", "transformers", "huggingface_hub", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one. Raises UserError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # "meta" makes tensors and cannot give them back
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"{argument('device', name)}: it cannot be used here ({str(error).splitlines()[0]}).") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what is timed, copied and captured is of the current device's stream
    return device


def load_model(source: str, device: torch.device, dtype: str, options: LoadOptions | None = None) -> Model:
    """A model by registered name (with parameters), folder, or hub id. Raises UserError."""
    options = options or LoadOptions()
    weights = set_precision(dtype, device)
    if options.graphs and device.type != "cuda":
        raise UserError(f"{argument('graphs')} is of NVIDIA GPUs; on this device leave it out.")
    if options.compile:
        check_compiler()
    model = _load(source, device, weights, options)
    learned = any(True for _ in model.network.parameters())  # an exact problem has nothing to run faster
    if learned or options.graphs or dtype == "tf32":
        model.network = Runner(
            model.network, device, options.compile and learned, precision=dtype, graphs=options.graphs
        )
    return model


def _load(source: str, device: torch.device, dtype: torch.dtype, options: LoadOptions) -> Model:
    quiet_libraries()
    name = registry.split(source)[0]
    is_folder = is_dir(source)
    registered = plugin_file.split(name) is not None or any(e.name == name for e in registry.entries("model"))
    if not is_folder and registered:
        for field in ("revision", "variant"):
            if (given := getattr(options, field)) is not None:
                raise UserError(
                    f"{argument(field, given)} is of checkpoints; the model {source} is built in: leave it out."
                )
        check_no_prompts(source, options)
        named = registry.parse("model", source)
        with plugin_call(named, "in load"):
            model = named.load(device, dtype)
        if not isinstance(model, Model):
            raise RunError(f"model {named.label()}: load returned a {type(model).__name__}; it must be a Model.")
        return model
    from samplerbench.models.pipelines import load_pipeline

    return load_pipeline(source, device, dtype, options)


def check_named_data(model: Model, source: str) -> str:
    """The data set that a metric names itself; the training data of the model if the name is empty. Nothing is read.

    Raises:
        UserError: there is no such data set, or the model does not say what it was trained on.
    """
    name = source or model.data
    if not name:
        raise UserError(
            "the model does not say what it was trained on; name the training images in the metric's spec: data=NAME."
        )
    find_data(name)
    return name


def named_data(model: Model, source: str) -> NamedData:
    """`check_named_data`, loaded. Raises UserError also for images that cannot be compared with the model's."""
    images = load_data(check_named_data(model, source))
    check_shape(model, images.shape_as_seen, images.name)
    identity = {"name": images.name, "split": images.split, "n": len(images), "sha256": images.sha256}
    return NamedData(images.images, identity)


def try_to_bind(guidance: Guidance | None, model: Model) -> Guidance | None:
    """A guidance bound to the model; as it is where its plugin failed, which is then the error of its cells.

    Raises:
        UserError: the model lacks what the guidance needs.
    """
    try:
        return bind_guidance(guidance, model)
    except RunError:
        return guidance


def real_data(model: Model, data: str | None, n: int) -> RealData:
    """The first n real images in a fixed random order, for metrics of the data.

    Raises:
        UserError: there are no images, fewer than n, or images of another shape than the model's.
    """
    source = reference_source(model, data)
    if not has_real_images(model, data):
        raise UserError(
            f"a metric needs the real images, not their statistics alone: name the data with {argument('data')}."
        )
    images = load_data(source) if source else _drawn(model, max(n, DRAWS))
    if images.shape != model.image_shape:
        real, own = ("x".join(map(str, shape)) for shape in (images.shape, model.image_shape))
        raise UserError(
            f"the images of {images.name} are {real}, and the model's are {own}; name others with {argument('data')}."
        )
    if len(images) < n:
        raise UserError(
            f"a metric needs {n:,} real images, and {images.name} has {len(images):,}; use a smaller {argument('n')}."
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:n]
    labels = None if images.labels is None or model.classes is None or model.text else images.labels[order]
    identity = {"name": images.name, "split": images.split, "n": len(images), "sha256": images.sha256}
    return RealData(images.images[order], labels, identity)


def pick_guidance(spec: str | Guidance | None) -> Guidance | None:
    """The guidance of a spec or an instance; "none" is none."""
    return None if spec is None or spec == "none" else registry.parse("guidance", spec)


def label_classes(model: Model, guidances: Sequence[Guidance | None]) -> int | None:
    """How many labels (or prompts) there are to choose from: the model's, or those that a bound guidance knows."""
    if model.classes is not None:
        return model.classes
    return next((g.classes for g in guidances if g is not None and g.classes is not None), None)


def pick_extractor(
    model: Model, features: str | None, weights: str | None, device: torch.device, metrics: Sequence[Metric] = ()
) -> Extractor:
    """The feature space asked for, else the one the model's card names, else Inception-v3; with the metrics' layers."""
    return load_extractor(features_name(model, features), device, weights, [m.layer for m in metrics])


def features_name(model: Model, features: str | None) -> str:
    """The name of the feature space: `features`, else the one the model's card names, else Inception-v3.

    Raises:
        UserError: an empty name.
    """
    if features is not None and not features.strip():
        raise UserError(f"{argument('features')} is empty; name a feature space, or leave it out.")
    return features or model.features or "inception-v3-compat"


@dataclass(frozen=True)
class RealSizes:
    """What is known of the real side of a run before any weights are loaded.

    Attributes:
        n: how many real images there are; None where it is not known.
        dimension: d, the number of features; None where it is not known.
    """

    n: int | None
    dimension: int | None


def look_at_reference(model: Model, data: str | None, features: str | None, weights: str | None) -> RealSizes:
    """See that the real images, or their statistics, can be read and compared with the model's images.

    It refuses what `pick_reference` refuses, as far as that takes neither the weights of a feature space nor features.

    Raises:
        UserError: data that cannot be read or compared.
    """
    dimension = known_dimension(features_name(model, features), weights)
    source = reference_source(model, data)
    if not source:
        return RealSizes(DRAWS, dimension)
    if source.endswith(".safetensors"):
        reference = load_reference(user_path(source))
        check_shape(model, reference.shape, source)
        return RealSizes(reference.data["n"], len(reference.moments.mean))
    if source.endswith(".npz") and (sizes := published_sizes(user_path(source))):
        d, shape = sizes
        check_shape(model, shape, source)
        if dimension not in (None, d):
            raise UserError(
                f"{source} holds statistics of {d} features, but {features_name(model, features)} has {dimension}; "
                f"name the features they were taken in with {argument('features')}."
            )
        return RealSizes(None, d)
    images = load_data(source)
    check_shape(model, images.shape_as_seen, images.name)
    return RealSizes(len(images), dimension)


class RealImages:
    """The real images of a run: their features in a layer, and their labels, loaded when first asked for.

    Args:
        model: what they are compared with. data: the name of their source, or None. extractor: the feature space.
    """

    def __init__(self, model: Model, data: str | None, extractor: Extractor) -> None:
        self.model, self.data, self.extractor = model, data, extractor
        self._features: dict[str, Tensor] = {}
        self._labels: Tensor | None = None

    def __call__(self, layer: Layer) -> Tensor:
        """Features (N, d) in a layer. Raises UserError where only statistics are at hand."""
        self._load()
        return self._features[layer]

    def labels(self) -> Tensor | None:
        """Labels (N,) int64, or None where they have none."""
        self._load()
        return self._labels

    def _load(self) -> None:
        if self._features:
            return
        source = reference_source(self.model, self.data)
        if not has_real_images(self.model, self.data):
            raise UserError(
                f"a metric needs the real images, not their statistics alone: name the data with {argument('data')}."
            )
        found = load_data(source) if source else _drawn(self.model)
        check_shape(self.model, found.shape_as_seen, found.name)
        parts = [self.extractor.all(part) for part in found.images.split(self.extractor.chunk)]
        self._labels = found.labels
        self._features = {name: torch.cat([p[name] for p in parts]).cpu() for name in self.extractor.layers}


def has_real_images(model: Model, data: str | None) -> bool:
    """Whether the real images are available, and not only their statistics. Raises UserError where neither is named."""
    source = reference_source(model, data)
    if source.endswith(".npz"):
        return not holds_only_statistics(user_path(source))
    return not source.endswith(".safetensors")


def check_shape(model: Model, shape: tuple[int, int, int] | None, name: str) -> None:
    """Check that real images can be compared with the model's: of one size, and grey or RGB as they are.

    Grey images count as RGB ones with three equal channels, which is how extractors see them; so a model of RGB images
    is compared with grey ones as they are, and a model of grey images with RGB files whose channels are equal.

    Args:
        shape: (C, H, W) of the real images (`ImageSet.shape_as_seen`); None where it is not known.
        name: of the real images, for the message.

    Raises:
        UserError: another size, or colours where the model is grey.
    """
    own = model.image_shape
    if shape is None or (shape[1:] == own[1:] and shape[0] <= max(own[0], 1)):
        return
    real, made = (f"{w}x{h} {'grey' if c == 1 else 'RGB'}" for c, h, w in (shape, own))
    raise UserError(
        f"the images of {name} are {real}, and the model makes {made} images: they cannot be compared; name images of "
        f"that kind with {argument('data')}."
    )


def reference_source(model: Model, data: str | None) -> str:
    """Where the real images are: `data`, else what the model was trained on; "" for the model itself, if it draws.

    Raises:
        UserError: neither says.
    """
    if data is not None and not data.strip():
        raise UserError(f"{argument('data')} is empty; name the real images, or leave it out.")
    source = data or model.data or ("" if model.draws else None)
    if source is None:
        raise UserError(f"the model does not say what it was trained on; name the real images with {argument('data')}.")
    return source


def count_images(model: Model, data: str | None) -> int | None:
    """How many real images there are; None where nothing says it. No features are needed for it. Raises UserError."""
    if data is None and model.data is None:
        return DRAWS if model.draws else None
    source = reference_source(model, data)
    if source.endswith(".safetensors"):
        known = load_reference(user_path(source)).data["n"]
        return None if known is None else int(known)
    return len(load_data(source)) if has_real_images(model, data) else None


def check_reference(model: Model, data: str | None) -> None:
    """See that the real images can be found, before the weights of a feature space are fetched to look at them.

    Raises:
        UserError: nothing says which they are, or there is no such name or file.
    """
    source = reference_source(model, data)
    if source and not source.endswith(".safetensors"):
        find_data(source)
    elif source and not is_file(source):
        raise UserError(f"{shorten(source)} is no reference written by `samplerbench stats`: there is no such file.")


def pick_reference(model: Model, data: str | None, extractor: Extractor) -> Reference:
    """The statistics to measure against: of `data`, a name, images, or statistics (`samplerbench stats`, or mu, sigma).

    The embedded statistics are used where they are of the same data and the same weights.
    """
    source = reference_source(model, data)
    if not source:
        return measure(_drawn(model), extractor)
    if source.endswith(".safetensors"):
        reference = load_reference(user_path(source))
        if reference.features != extractor.identity:
            raise UserError(
                f"{source} holds features of {reference.features['name']} (weights "
                f"{reference.features['weights'][:12]}), not of {extractor.name} ({extractor.sha256[:12]}); make it "
                "anew with `samplerbench stats`."
            )
        check_shape(model, reference.shape, source)
        return reference
    if source == "digits" and extractor.name == DIGITS:
        from samplerbench.assets import asset

        embedded = load_reference(asset("digits-reference.safetensors"))
        if embedded.features == extractor.identity:
            check_shape(model, (1, 8, 8), source)
            return embedded
    if source.endswith(".npz") and (published := load_published(user_path(source), extractor)):
        check_shape(model, published.shape, source)
        return published
    images = load_data(source)
    check_shape(model, images.shape_as_seen, images.name)
    return measure_once(images, extractor)


DRAWS = 10_000
"""Images that an exact problem draws as its own real ones."""


def _drawn(model: Model, n: int = DRAWS) -> ImageSet:
    """Draws from an exact problem, quantised as generated images are."""
    return ImageSet(str(model.identity["source"]), "draws", quantise(model.real(n)[0]), None, None)


def default_n(real_images: int | None) -> int:
    """As many images as there are real ones, at most the customary 50,000."""
    return min(50_000, real_images or 50_000)
