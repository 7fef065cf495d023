"""Classifiers of clean images from transformers, for guidance through D(x, σ)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samplerbench.errors import UserError
from samplerbench.limits import MAX_CHANNELS, MAX_SIDE
from samplerbench.models.classifier import Classified, LoadedClassifier
from samplerbench.models.fields import Fields
from samplerbench.models.files import check_no_code, check_weights, hash_files, weight_files
from samplerbench.untrusted import read_json, user_path

PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Preprocessing:
    """Differentiable preprocessing from images in [-1, 1] to the input of a classifier.

    The steps are: resize to `size` or `shortest`, centre crop to `crop`, and (255·u·rescale - mean)/std with u in
    [0, 1]. Resizing is bilinear with antialiasing, regardless of the filter in the configuration. Grey images are
    repeated to `channels` channels.

    Attributes:
        channels: number of input channels of the classifier.
        size: (H, W) after resizing. None to use `shortest`.
        shortest: length of the shorter side after resizing, in pixels. None for no such resizing.
        crop: (H, W) of the centre crop. None for no crop.
        rescale: factor for pixel values in [0, 255].
        mean: mean of each channel, or one value for all.
        std: standard deviation of each channel, or one value for all.
    """

    channels: int
    size: tuple[int, int] | None
    shortest: int | None
    crop: tuple[int, int] | None
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Preprocess images, (B, C, H, W) in [-1, 1]. The result is (B, channels, h, w)."""
        x = images * 127.5 + 127.5
        height, width = x.shape[2:]
        size = self.size
        if self.shortest is not None:
            ratio = self.shortest / min(height, width)
            size = (max(self.shortest, round(height * ratio)), max(self.shortest, round(width * ratio)))
        if size is not None and size != (height, width):
            x = nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        if self.crop is not None:
            top, left = ((a - b) // 2 for a, b in zip(x.shape[2:], self.crop, strict=True))
            x = x[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (x.new_tensor(v).reshape(1, -1, 1, 1) for v in (self.mean, self.std))
        return ((x * self.rescale - mean) / std).expand(-1, self.channels, -1, -1)


class ImageClassifier(nn.Module):
    """A transformers classifier with its preprocessing.

    It maps images in [-1, 1], (B, C, H, W), to logits, (B, K).

    Args:
        network: the classifier.
        preprocessing: its preprocessing.
    """

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network, self.preprocessing = network, preprocessing

    def forward(self, images: Tensor) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        return self.network(pixel_values=self.preprocessing(images.to(dtype))).logits


def load_image_classifier(folder: str, model: Classified) -> LoadedClassifier:
    """Load the `AutoModelForImageClassification` in a folder.

    Args:
        folder: folder of the classifier.
        model: model to guide. The classifier uses its device and the precision of its states.

    Raises:
        UserError: if the folder does not exist, it contains no image classifier in safetensors or no preprocessor, or
            the channels or labels of the classifier differ from those of the model.
    """
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    path = user_path(folder)
    if not path.is_dir():
        raise UserError(f"no image classifier in {folder}: the folder does not exist.")
    weights = weight_files(path)
    for file, there in (("config.json", (path / "config.json").exists()), ("model.safetensors", bool(weights))):
        if not there:
            raise UserError(
                f"no image classifier in {folder}: {file} does not exist; write it with save_pretrained of a "
                "transformers image classifier (pickle files, .bin, are not supported)."
            )
    complaint = f"{folder} cannot be loaded as an image classifier of transformers"
    given = read_json(path / "config.json", complaint)
    check_no_code(given, complaint)
    check_weights(path, weights, None, complaint)
    try:
        network, info = AutoModelForImageClassification.from_pretrained(
            path,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many exception types for an invalid configuration
        # The remaining lines list all classes of transformers.
        why = (str(error).splitlines() or [type(error).__name__])[0]
        if "auto_map" in given:
            why = "its config.json refers to custom code (auto_map); code in checkpoints is not executed"
        raise UserError(f"{complaint}: {why.rstrip('.')}.") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{folder} is incomplete: {len(missing)} tensors are missing from its weights, the first is {missing[0]}."
        )
    if model.classes is not None and network.config.num_labels != model.classes:
        raise UserError(
            f"the image classifier in {folder} has {network.config.num_labels} labels, but the model has "
            f"{model.classes}."
        )
    complaint = f"the image classifier in {folder}"
    found = {"num_channels": getattr(network.config, "num_channels", 3)}
    channels = Fields(found, f"{complaint}: config.json").integer("num_channels", 1, MAX_CHANNELS)
    if model.image_shape[0] not in (1, channels):
        raise UserError(
            f"{complaint} requires images with {channels} channels, but the model has {model.image_shape[0]}."
        )
    preprocessing = read_preprocessing(path, complaint, channels)
    module = ImageClassifier(network, preprocessing).requires_grad_(False).eval()
    module.to(model.device, torch.float64 if model.dtype == torch.float64 else torch.float32)
    digest = hash_files([*weights, path / "config.json", path / PREPROCESSOR])
    return LoadedClassifier(module, digest, lambda images, _: module(images), network.config.num_labels)


def read_preprocessing(folder: Path, complaint: str, channels: int) -> Preprocessing:
    """Read the preprocessing of an image encoder of transformers from its preprocessor_config.json.

    Args:
        folder: folder of the encoder.
        complaint: prefix of error messages: "the image classifier in FOLDER".
        channels: number of input channels of the encoder.

    Raises:
        UserError: if the file is missing or damaged, or has invalid values.
    """
    given = read_json(folder / PREPROCESSOR, f"{complaint} is incomplete")
    fields = Fields(given, f"{complaint}: {PREPROCESSOR}")
    size = shortest = crop = None
    if fields.flag("do_resize", True) and given.get("size") is not None:
        wanted = given["size"]
        if isinstance(wanted, dict) and "height" not in wanted:
            shortest = Fields(wanted, f"{fields.where}: size").integer("shortest_edge", 1, MAX_SIDE)
        elif isinstance(wanted, dict):
            size = _height_and_width(wanted, f"{fields.where}: size")
        else:
            shortest = fields.integer("size", 1, MAX_SIDE)
    if fields.flag("do_center_crop", False) and given.get("crop_size") is not None:
        wanted = given["crop_size"]
        crop = _height_and_width(wanted, f"{fields.where}: crop_size") if isinstance(wanted, dict) else None
        crop = crop or (fields.integer("crop_size", 1, MAX_SIDE),) * 2
    rescale = fields.number("rescale_factor", 1e-12, 1e12, 1 / 255) if fields.flag("do_rescale", True) else 1.0
    normalise = fields.flag("do_normalize", True)
    mean, std = (
        tuple(fields.numbers(key, low, 1e12, channels) or ()) if normalise else (default,)
        for key, low, default in (("image_mean", -1e12, 0.0), ("image_std", 1e-12, 1.0))
    )
    for key, value in (("image_mean", mean), ("image_std", std)):
        if len(value) not in (1, channels):
            raise fields.refusal(key, given.get(key), f"a list of 1 or {channels} numbers")
    return Preprocessing(channels, size, shortest, crop, rescale, mean, std)


def _height_and_width(values: dict[str, Any], where: str) -> tuple[int, int]:
    fields = Fields(values, where)
    return fields.integer("height", 1, MAX_SIDE), fields.integer("width", 1, MAX_SIDE)
