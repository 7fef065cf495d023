"""Setup: creates devices, models, feature spaces and references from their names."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from samplerbench import plugin_file, registry
from samplerbench.assets import REFERENCES, asset
from samplerbench.bench.session import NamedData, RealData
from samplerbench.boundary import plugin_call
from samplerbench.data import DataSource, ImageSet, load_data
from samplerbench.data.load import find_data
from samplerbench.data.pixels import quantise
from samplerbench.errors import RunError, UserError, argument
from samplerbench.metrics.extractors import Extractor, known_dimension, load_extractor
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
from samplerbench.models.files import LoadOptions, check_no_parts, check_no_prompts
from samplerbench.models.lora import check_no_lora
from samplerbench.models.model import Model
from samplerbench.models.offload import check_memory_options, save_memory
from samplerbench.models.runner import Runner, check_compiler, set_precision
from samplerbench.sampling import Guidance
from samplerbench.sampling.spacing import pick_spacing as pick_spacing
from samplerbench.untrusted import is_dir, is_file, shorten, user_path

PIPELINE = "pipeline:"
"""Prefix of a model that is a stock pipeline of diffusers, run by its own call."""


def quiet_libraries() -> None:
    """Disable the progress bars and notices of other libraries."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Notices of torch.compile: how it traces functions of diffusers, and that there is no CUDA on a CPU.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._dynamo\.")
    for name in ("diffusers", "transformers", "huggingface_hub", "accelerate", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()


def pick_device(name: str) -> torch.device:
    """Return a device by name.

    Args:
        name: Name of the device. "auto" selects a GPU if one is available.

    Returns:
        The device.

    Raises:
        UserError: If the device is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = argument("device", name)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{given}: PyTorch has no such device; use auto, cpu, cuda, cuda:1, mps, ….") from None
    cpu = argument("device", "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{given}: PyTorch cannot use a GPU on this machine; use {cpu}.")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(f"{given}: the last GPU of this machine is cuda:{count - 1}.")
    try:
        torch.zeros(1, device=device).cpu()  # fails for "meta", whose tensors have no data
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"{given}: PyTorch cannot use this device on this machine; use {cpu}.") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # timing, copies and captures use the current device
    return device


def load_model(source: str, device: torch.device, dtype: str, options: LoadOptions | None = None) -> Model:
    """Load a model.

    Args:
        source: A registered name with parameters, a checkpoint folder, or a hub id.
        device: The device.
        dtype: Precision of the network: "fp32", "tf32", "bf16", "fp16" or "fp64".
        options: Options for loading the model.

    Returns:
        The model.

    Raises:
        UserError: If the model cannot be loaded, or if an option does not apply to it.
    """
    options = options or LoadOptions()
    weights = set_precision(dtype, device)
    if options.graphs and device.type != "cuda":
        raise UserError(f"{argument('graphs')} requires an NVIDIA GPU.")
    check_memory_options(options, device)
    if options.compile:
        check_compiler()
    model = _load(source, device, weights, options)
    save_memory(model, options)
    learned = any(True for _ in model.network.parameters())  # exact problems have no network
    if learned or options.graphs or dtype == "tf32":
        model.network = Runner(
            model.network,
            device,
            options.compile and learned,
            precision=dtype,
            graphs=options.graphs,
            memory=", ".join(options.memory),
        )
    return model


def _load(source: str, device: torch.device, dtype: torch.dtype, options: LoadOptions) -> Model:
    quiet_libraries()
    if source.startswith(PIPELINE):
        from samplerbench.diffusers.pipeline_model import load_pipeline_model

        return load_pipeline_model(source, device, dtype, options)
    name = registry.split(source)[0]
    registered = plugin_file.split(name) is not None or any(e.name == name for e in registry.entries("model"))
    # A folder of data called mnist does not hide the model mnist.
    is_folder = is_dir(source) and not (registered and not _holds_model(user_path(source)))
    if not is_folder and registered:
        for field in ("revision", "variant"):
            if (given := getattr(options, field)) is not None:
                raise UserError(
                    f"{argument(field, given)} applies only to checkpoints; the model {source} is built in."
                )
        check_no_prompts(source, options)
        check_no_lora(source, options.lora)
        check_no_parts(source, options)
        named = registry.parse("model", source)
        with plugin_call(named, "in load"):
            model = named.load(device, dtype)
        if not isinstance(model, Model):
            raise RunError(f"model {named.label()}: load returned a {type(model).__name__}; it must be a Model.")
        return model
    from samplerbench.models.pipelines import load_pipeline

    return load_pipeline(source, device, dtype, options)


def _holds_model(folder: Path) -> bool:
    return any(is_file(folder / name) for name in ("model_index.json", "config.json", "samplerbench.json"))


def check_named_data(model: Model, source: str, metric: str = "") -> str:
    """Check that a data set that a metric selects itself exists. The data set is not read.

    Args:
        model: The model.
        source: Name of the data set. If empty, the training data of the model.
        metric: Name of the metric, for the message.

    Returns:
        The name of the data set.

    Raises:
        UserError: If the data set does not exist, or if the training data of the model is not known.
    """
    name = source or model.data
    if not name and metric:
        raise UserError(
            f"the metric {metric} needs the training images, and the model does not say what it was trained on; name "
            f"them with {metric}:data=NAME."
        )
    if not name:
        raise UserError(f"the model does not say what it was trained on; name the real images with {argument('data')}.")
    try:
        find_data(name)
    except UserError as error:
        raise UserError(f"the metric {metric}: {error}" if metric else error.args[0]) from None
    return name


def named_data(model: Model, source: str) -> NamedData:
    """Load a data set that a metric selects itself.

    Args:
        model: The model.
        source: Name of the data set. If empty, the training data of the model.

    Returns:
        The data set.

    Raises:
        UserError: If the data set does not exist, or if its images cannot be compared with those of the model.
    """
    images = load_data(check_named_data(model, source))
    check_shape(model, images.shape_as_seen, images.name)
    return NamedData(images.images, images.identity)


def real_data(model: Model, data: str | None, n: int, user: str = "a metric") -> RealData:
    """Load n real images in a fixed random order, for metrics that measure the data.

    Args:
        model: The model.
        data: Name or file of the real images or their statistics. If None, the training data of the model.
        n: Number of images.
        user: What needs the images, for the message.

    Returns:
        The real images.

    Raises:
        UserError: If there are fewer than n images, or if their shape differs from that of the model.
    """
    source = reference_source(model, data)
    require_real_images(model, data, user)
    images = load_data(source) if source else _drawn(model, max(n, DRAWS))
    if images.shape != model.image_shape:
        real, own = ("x".join(map(str, shape)) for shape in (images.shape, model.image_shape))
        raise UserError(
            f"the images of {images.name} are {real}, and the model's are {own}; name others with {argument('data')}."
        )
    if len(images) < n:
        raise UserError(
            f"{user} needs {n:,} real images, and {images.name} has {len(images):,}; use a smaller {argument('n')}."
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:n]
    labels = None if images.labels is None or model.classes is None or model.text else images.labels[order]
    return RealData(images.images[order], labels, images.identity)


def pick_guidance(spec: str | Guidance | None) -> Guidance | None:
    """Create a guidance.

    Args:
        spec: A spec or an instance. None or "none" is the unguided model.

    Returns:
        The guidance, or None.
    """
    return None if spec is None or spec == "none" else registry.parse("guidance", spec)


def label_classes(model: Model, guidances: Sequence[Guidance | None]) -> int | None:
    """Return the number of labels or prompts of the model, or else of a bound guidance.

    Args:
        model: The model.
        guidances: The bound guidances.

    Returns:
        The number, or None if neither has labels.
    """
    if model.classes is not None:
        return model.classes
    return next((g.classes for g in guidances if g is not None and g.classes is not None), None)


def pick_extractor(
    model: Model, features: str | None, weights: str | None, device: torch.device, metrics: Sequence[Metric] = ()
) -> Extractor:
    """Load the feature extractor (see `features_name`).

    Args:
        model: The model.
        features: Name of the feature space, or None.
        weights: File with the weights of the extractor, or None.
        device: The device.
        metrics: The metrics whose layers are extracted.

    Returns:
        The extractor.
    """
    return load_extractor(features_name(model, features), device, weights, [m.layer for m in metrics])


def features_name(model: Model, features: str | None) -> str:
    """Return the name of the feature space: `features`, else the one in the model's card, else Inception-v3.

    Args:
        model: The model.
        features: Name of the feature space, or None.

    Raises:
        UserError: If the name is empty.
    """
    if features is not None and not features.strip():
        raise UserError(f"{argument('features')} is empty; name a feature space, or leave it out.")
    return features or model.features or "inception-v3-compat"


@dataclass(frozen=True)
class RealSizes:
    """Sizes of the real data that are known before any weights are loaded.

    Attributes:
        n: Number of real images, or None if it is not known.
        dimension: Number of features d, or None if it is not known.
    """

    n: int | None
    dimension: int | None


def look_at_reference(model: Model, data: str | None, features: str | None, weights: str | None) -> RealSizes:
    """Check that the real images or their statistics can be read and compared with the images of the model.

    This performs the checks of `pick_reference` that do not need the weights of a feature space.

    Args:
        model: The model.
        data: Name or file of the real images or their statistics. If None, the training data of the model.
        features: Name of the feature space, or None.
        weights: File with the weights of the extractor, or None.

    Returns:
        The sizes of the real data.

    Raises:
        UserError: If the data cannot be read or compared.
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
                f"select the feature space of the statistics with {argument('features')}."
            )
        return RealSizes(None, d)
    if weights is None and (included := _included(source, features_name(model, features))) is not None:
        check_shape(model, included.shape, source)
        return RealSizes(included.data["n"], dimension)
    images = load_data(source)
    check_shape(model, images.shape_as_seen, images.name)
    return RealSizes(len(images), dimension)


class RealImages:
    """Features and labels of the real images of a run. They are loaded on first use.

    Args:
        model: The model.
        data: Name or file of the real images or their statistics. If None, the training data of the model.
        extractor: The feature extractor.
    """

    def __init__(self, model: Model, data: str | None, extractor: Extractor) -> None:
        self.model, self.data, self.extractor = model, data, extractor
        self._features: dict[str, Tensor] = {}
        self._labels: Tensor | None = None

    def __call__(self, layer: Layer) -> Tensor:
        """Return the features of the real images in a layer (N, d).

        Args:
            layer: Layer of the extractor.

        Raises:
            UserError: If only statistics are available.
        """
        self._load()
        return self._features[layer]

    def labels(self) -> Tensor | None:
        """Return the labels (N,), int64, or None if the images have no labels."""
        self._load()
        return self._labels

    def _load(self) -> None:
        if self._features:
            return
        source = reference_source(self.model, self.data)
        require_real_images(self.model, self.data)
        found = load_data(source) if source else _drawn(self.model)
        check_shape(self.model, found.shape_as_seen, found.name)
        included = embedded_reference(source, self.extractor) if source else None
        if included is not None and included.data["sha256"] != found.sha256:
            raise UserError(
                f"the files of {found.name} ({found.split}) are not the data set whose statistics are included "
                f"(sha256 {found.sha256[:12]}, not {included.data['sha256'][:12]}); restore the original files."
            )
        parts = [self.extractor.all(part) for part in found.images.split(self.extractor.chunk)]
        self._labels = found.labels
        self._features = {name: torch.cat([p[name] for p in parts]).cpu() for name in self.extractor.layers}


def has_real_images(model: Model, data: str | None) -> bool:
    """Return whether the real images are available, and not only their statistics.

    Args:
        model: The model.
        data: Name or file of the real images or their statistics. If None, the training data of the model.

    Raises:
        UserError: If `data` is None and the training data of the model is not known.
    """
    source = reference_source(model, data)
    if source.endswith(".npz"):
        return not holds_only_statistics(user_path(source))
    if (named := _included_data(source)) is not None:
        return named.available()
    return not source.endswith(".safetensors")


def require_real_images(model: Model, data: str | None, user: str = "a metric") -> None:
    """Check that the real images are available, and not only their statistics.

    Args:
        model: The model.
        data: Name or file of the real images or their statistics. If None, the training data of the model.
        user: What needs the images, for the message.

    Raises:
        UserError: If only the statistics are available. For a data set by name, the error says where its files belong.
    """
    if has_real_images(model, data):
        return
    if (named := _included_data(reference_source(model, data))) is not None:
        try:
            named.load()
        except UserError as error:
            raise UserError(f"{user} needs the real images, and only their statistics are included: {error}") from None
    raise UserError(
        f"{user} needs the real images, and there are only their statistics: name the images with {argument('data')}."
    )


def check_shape(model: Model, shape: tuple[int, int, int] | None, name: str) -> None:
    """Check that real images can be compared with the images of the model: same size and compatible channels.

    Extractors convert grey images to RGB images with three equal channels. An RGB model can therefore be compared with
    grey images, and a grey model with RGB files whose channels are equal.

    Args:
        model: The model.
        shape: Shape (C, H, W) of the real images (`ImageSet.shape_as_seen`), or None if it is not known.
        name: Name of the real images, for the message.

    Raises:
        UserError: If the sizes differ, or if the model is grey and the images are coloured.
    """
    own = model.image_shape
    if shape is None or (shape[1:] == own[1:] and shape[0] <= max(own[0], 1)):
        return
    real, made = (f"{w}x{h} {'grey' if c == 1 else 'RGB'}" for c, h, w in (shape, own))
    raise UserError(
        f"the images of {name} are {real}, and the model makes {made} images: they cannot be compared; use images of "
        f"that kind with {argument('data')}."
    )


def reference_source(model: Model, data: str | None) -> str:
    """Return the source of the real images: `data`, or else the training data of the model.

    Args:
        model: The model.
        data: Name or file of the real images or their statistics. If None, the training data of the model.

    Returns:
        The source. Empty if the model is an exact problem, which draws its own real images.

    Raises:
        UserError: If `data` is None and the training data of the model is not known.
    """
    if data is not None and not data.strip():
        raise UserError(f"{argument('data')} is empty; name the real images, or leave it out.")
    source = data or model.data or ("" if model.draws else None)
    if source is None:
        raise UserError(f"the model does not say what it was trained on; name the real images with {argument('data')}.")
    return source


def count_images(model: Model, data: str | None) -> int | None:
    """Return the number of real images, or None if it is not known. No features are computed.

    Args:
        model: The model.
        data: Name or file of the real images or their statistics. If None, the training data of the model.

    Raises:
        UserError: If the data cannot be read.
    """
    if data is None and model.data is None:
        return DRAWS if model.draws else None
    source = reference_source(model, data)
    if source.endswith(".safetensors"):
        known = load_reference(user_path(source)).data["n"]
        return None if known is None else int(known)
    if (named := _included_data(source)) is not None:
        file = next(file for (_, spec), file in REFERENCES.items() if spec == named.spec)
        return int(load_reference(asset(file)).data["n"])
    return len(load_data(source)) if has_real_images(model, data) else None


def check_reference(model: Model, data: str | None, features: str | None = None) -> None:
    """Check that the real images exist, before the weights of a feature space are downloaded.

    Args:
        model: The model.
        data: Name or file of the real images or their statistics. If None, the training data of the model.
        features: Name of the feature space, or None.

    Raises:
        UserError: If the training data of the model is not known, or if the name or file does not exist.
    """
    source = reference_source(model, data)
    if source and not source.endswith(".safetensors"):
        find_data(source)
        named = _included_data(source)
        if named is not None and _included(source, features_name(model, features)) is None and not named.available():
            named.load()  # it says where the files belong
    elif source and not is_file(source):
        raise UserError(f"{shorten(source)} does not exist; create it with `samplerbench stats`.")


def pick_reference(model: Model, data: str | None, extractor: Extractor) -> Reference:
    """Load or compute the statistics of the real images.

    The embedded statistics are used if they belong to the same data and weights.

    Args:
        model: The model.
        data: Name or folder of the real images, a file written by `samplerbench stats`, or an npz file of mu and sigma.
            If None, the training data of the model.
        extractor: The feature extractor.

    Returns:
        The statistics.

    Raises:
        UserError: If the data cannot be read, or if it does not match the extractor or the model.
    """
    source = reference_source(model, data)
    if not source:
        return measure(_drawn(model), extractor)
    if source.endswith(".safetensors"):
        reference = load_reference(user_path(source))
        if reference.features != extractor.identity:
            raise UserError(
                f"{source} holds features of {reference.features['name']} (weights "
                f"{reference.features['weights'][:12]}), not of {extractor.name} ({extractor.sha256[:12]}); create "
                "the statistics again with `samplerbench stats`."
            )
        check_shape(model, reference.shape, source)
        return reference
    if (embedded := embedded_reference(source, extractor)) is not None:
        check_shape(model, embedded.shape, source)
        return embedded
    if source.endswith(".npz") and (published := load_published(user_path(source), extractor)):
        check_shape(model, published.shape, source)
        return published
    images = load_data(source)
    check_shape(model, images.shape_as_seen, images.name)
    return measure_once(images, extractor)


def embedded_reference(source: str, extractor: Extractor) -> Reference | None:
    """Load the statistics of a data set that are included with samplerbench.

    Args:
        source: Name of the data set.
        extractor: The feature extractor.

    Returns:
        The statistics, or None if there are none for this data set and these features.
    """
    found = _included(source, extractor.name)
    return found if found is not None and found.features == extractor.identity else None


def _included(source: str, features: str) -> Reference | None:
    """The included statistics of a data set in a feature space, or None."""
    named = _included_data(source)
    file = None if named is None else REFERENCES.get((features, named.spec))
    return None if file is None else load_reference(asset(file))


def _included_data(source: str) -> DataSource | None:
    """The data set `source`, if there are included statistics of it. None for all other data."""
    if source.partition(":")[0] not in {name.partition(":")[0] for _, name in REFERENCES}:
        return None
    named = registry.parse("data set", source)
    return named if any(spec == named.spec for _, spec in REFERENCES) else None


DRAWS = 10_000
"""Number of real images that are drawn from an exact problem."""


def _drawn(model: Model, n: int = DRAWS) -> ImageSet:
    """Draw images from an exact problem and quantise them like generated images."""
    return ImageSet(str(model.identity["source"]), "draws", quantise(model.real(n)[0]), None, None)


def default_n(model: Model, real_images: int | None) -> int:
    """Return the default number of images per block: the model's, else the number of real images, at most 50,000.

    Args:
        model: The model.
        real_images: Number of real images, or None if it is not known.
    """
    return model.default_n or min(50_000, real_images or 50_000)
