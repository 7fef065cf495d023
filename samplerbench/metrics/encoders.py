"""Image encoders of transformers as feature spaces: `clip:SOURCE`, `cmmd:SOURCE` and `dinov2:SOURCE`.

SOURCE is a folder written by `save_pretrained`, or a Hub repository id. Only safetensors are read, and no code of a
repository is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from samplerbench.errors import UserError
from samplerbench.limits import MAX_CHANNELS, MAX_SIDE
from samplerbench.models.fields import Fields
from samplerbench.models.files import check_no_code, check_weights, hash_files, weight_files
from samplerbench.models.image_classifier import PREPROCESSOR, Preprocessing, read_preprocessing
from samplerbench.untrusted import is_dir, read_json, reason, shorten, user_path

DEFAULTS = {
    "clip": "openai/clip-vit-large-patch14",
    "cmmd": "openai/clip-vit-large-patch14-336",
    "cmmd-antialiased": "openai/clip-vit-large-patch14-336",
    "dinov2": "facebook/dinov2-large",
}
"""The kinds of spaces, and the repository that is used if no SOURCE is given."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2_SIDE = 224
"""Side of the images that DINOv2 is given, in pixels."""
DINOV2_OFFSET = 0.1
"""`interpolate_offset` of the authors' DINOv2, in patches. transformers interpolates without it."""
CHUNK = 32
"""Number of images per forward pass."""
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json")
FILES = ("config.json", PREPROCESSOR, "tokenizer_config.json", "special_tokens_map.json", *TOKENIZER)
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
FILTERS = {0: "nearest", 1: "Lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "Hamming"}
"""Pillow's resampling filters by their number."""


@dataclass(frozen=True)
class Space:
    """The name of a feature space, taken apart.

    Attributes:
        kind: "clip", "cmmd", "cmmd-antialiased" or "dinov2".
        source: folder or Hub repository id of the encoder.
        processor: folder or Hub repository id of the preprocessing and the tokenizer, if they are not in `source`;
            else empty.
    """

    kind: str
    source: str
    processor: str = ""

    @property
    def label(self) -> str:
        """The name in results. A folder is named without its parents: `clip:clip-vit-large-patch14`."""
        parts = [_folder_name(part) if is_dir(part) else part for part in (self.source, self.processor) if part]
        return f"{self.kind}:{'+'.join(parts)}"


def _folder_name(folder: str) -> str:
    return user_path(folder).resolve().name


def parse_space(name: str) -> Space | None:
    """Take the name of a feature space apart.

    Args:
        name: `KIND`, `KIND:SOURCE` or `clip:SOURCE+PROCESSOR`.

    Returns:
        The parts. None if the name is of no kind in `DEFAULTS`.

    Raises:
        UserError: SOURCE or PROCESSOR is empty.
    """
    kind, colon, rest = name.partition(":")
    if kind not in DEFAULTS:
        return None
    source, plus, processor = rest.partition("+") if kind == "clip" and not is_dir(rest) else (rest, "", "")
    if (colon and not source.strip()) or (plus and not processor.strip()):
        raise UserError(f'the feature space "{name}" names no model; write {kind}:FOLDER or {kind}:OWNER/NAME.')
    return Space(kind, source or DEFAULTS[kind], processor)


@dataclass(frozen=True)
class PillowPreprocessing:
    """The preprocessing of transformers' `CLIPImageProcessor`: Pillow resizes, antialiases and rounds to uint8.

    The longer side is rounded down, and the centre crop starts at the pixel (h - crop)//2, as there.

    Attributes:
        steps: sizes, rescaling factor, mean and standard deviation.
        resample: number of Pillow's filter.
    """

    steps: Preprocessing
    resample: int

    def __call__(self, images: Tensor) -> Tensor:
        """Preprocess images, (B, C, H, W) uint8. The result is (B, C, h, w) float32 on the same device."""
        from PIL import Image

        steps, (height, width) = self.steps, images.shape[2:]
        size = steps.size
        if steps.shortest is not None:
            short = min(height, width)
            size = (int(steps.shortest * height / short), int(steps.shortest * width / short))
        x = images
        if size is not None and size != (height, width):
            rows = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
            resized = [np.asarray(row.resize(size[::-1], Image.Resampling(self.resample))) for row in rows]
            x = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images.device)
        if steps.crop is not None:
            top, left = ((a - b) // 2 for a, b in zip(x.shape[2:], steps.crop, strict=True))
            x = x[:, :, top : top + steps.crop[0], left : left + steps.crop[1]]
        return _normalised(x.float() * steps.rescale, steps.mean, steps.std)

    @property
    def rule(self) -> str:
        """The rule for the protocol."""
        steps, parts = self.steps, []
        if steps.shortest is not None or steps.size is not None:
            size = f"shorter side {steps.shortest}" if steps.size is None else f"{steps.size[0]}x{steps.size[1]}"
            parts.append(f"{size}, Pillow's {FILTERS[self.resample]}")
        parts += [] if steps.crop is None else [f"centre crop {steps.crop[0]}x{steps.crop[1]}"]
        return "; ".join([*parts, _normalisation(steps.mean, steps.std)])


@dataclass(frozen=True)
class TorchPreprocessing:
    """Resizing to a square by `torch.nn.functional.interpolate(mode="bicubic")`, without rounding.

    Attributes:
        side: side of the square in pixels.
        antialias: whether the filter's support grows with the scale. torch's filter then has a = -0.5, else a = -0.75.
        mean: mean of each channel.
        std: standard deviation of each channel.
    """

    side: int
    antialias: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Preprocess images, (B, C, H, W) uint8. The result is (B, C, side, side) float32."""
        x = images.float() / 255
        size = (self.side, self.side)
        x = nn.functional.interpolate(x, size=size, mode="bicubic", align_corners=False, antialias=self.antialias)
        return _normalised(x, self.mean, self.std)

    @property
    def rule(self) -> str:
        """The rule for the protocol."""
        how = "antialiased" if self.antialias else "without antialiasing"
        return f"{self.side}x{self.side}, torch's bicubic {how}; {_normalisation(self.mean, self.std)}"


def _normalised(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    shift, scale = (x.new_tensor(values).reshape(1, -1, 1, 1) for values in (mean, std))
    return (x - shift) / scale


def _normalisation(mean: Sequence[float], std: Sequence[float]) -> str:
    return f"mean {' '.join(f'{v:g}' for v in mean)}; std {' '.join(f'{v:g}' for v in std)}"


class Encoder(nn.Module):
    """An image encoder with its preprocessing. It maps images (B, 3, H, W) uint8 to a tuple of features (B, d).

    Args:
        network: the network, whose output has a `pooler_output` (B, e).
        projection: a linear layer from (B, e) to the features (B, d).
        preprocessing: the preprocessing.
    """

    def __init__(self, network: nn.Module, projection: nn.Module, preprocessing: Any) -> None:
        super().__init__()
        self.network, self.projection, self.preprocessing = network, projection, preprocessing

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.projection(self.network(pixel_values=self.preprocessing(images)).pooler_output),)


@dataclass(frozen=True)
class Loaded:
    """A loaded encoder.

    Attributes:
        module: the encoder.
        layer: name of its output.
        rule: how images are resized and normalised.
        sha256: hash of its files.
        model: the whole model of transformers, for `clip` spaces; else None.
        tokenizer: folder of the tokenizer.
    """

    module: Encoder
    layer: str
    rule: str
    sha256: str
    model: Any
    tokenizer: Path


def load_encoder(space: Space, device: torch.device) -> Loaded:
    """Load the encoder of a feature space.

    Args:
        space: the feature space.
        device: device of the network.

    Raises:
        UserError: the files do not exist, cannot be downloaded, are incomplete, or are of another model.
    """
    folder = _folder(space.source, [*FILES, *WEIGHTS])
    complaint = f"{space.source} cannot be used as {_what(space)}"
    config = _checked_config(space, folder, complaint)
    files = weight_files(folder)
    if not files:
        raise UserError(
            f"{complaint}: {folder.name}/model.safetensors does not exist (pickle files, .bin, are not supported); "
            "convert it with from_pretrained and save_pretrained of transformers."
        )
    check_weights(folder, files, None, complaint)
    if space.kind == "dinov2":
        model = _from_pretrained("Dinov2Model", folder, device, complaint)
        _set_positions(model, DINOV2_SIDE // model.config.patch_size)
        rule = TorchPreprocessing(DINOV2_SIDE, True, IMAGENET_MEAN, IMAGENET_STD)
        module = Encoder(model, nn.Identity(), rule)
        text = f"{rule.rule}; position embeddings interpolated with offset {DINOV2_OFFSET}"
        return Loaded(module.eval(), "pooler_output", text, hash_files([*files, folder / "config.json"]), None, folder)
    processor = _folder(space.processor, FILES) if space.processor else folder
    alone = config.values.get("model_type") == "clip_vision_model"
    name = "CLIPVisionModelWithProjection" if alone else "CLIPModel"
    model = _from_pretrained(name, folder, device, complaint)
    vision = model.vision_model
    preprocessing = _clip_preprocessing(space, processor, vision.config)
    read = [processor / name for name in (PREPROCESSOR, *(TOKENIZER if space.kind == "clip" else ()))]
    digest = hash_files([*files, folder / "config.json", *(file for file in read if file.exists())])
    module = Encoder(vision, model.visual_projection, preprocessing)
    whole = model if space.kind == "clip" else None
    return Loaded(module.eval(), "image_embeds", preprocessing.rule, digest, whole, processor)


def known_size(space: Space) -> int | None:
    """The number of features of a space, without loading its weights; None for a Hub repository.

    Raises:
        UserError: a folder that does not exist or is of another model.
    """
    if not _is_local(space.source):
        return None
    folder = _folder(space.source, [])
    config = _checked_config(space, folder, f"{space.source} cannot be used as {_what(space)}")
    if space.processor and _is_local(space.processor):
        _folder(space.processor, [])
    if space.kind == "dinov2":
        return config.integer("hidden_size", 1, MAX_CHANNELS, 768)
    return config.integer("projection_dim", 1, MAX_CHANNELS, 512)


def _what(space: Space) -> str:
    return "a DINOv2" if space.kind == "dinov2" else "a CLIP model"


def _checked_config(space: Space, folder: Path, complaint: str) -> Fields:
    """The configuration of an encoder. Raises UserError if it is that of another model or refers to code."""
    config = read_json(folder / "config.json", complaint)
    check_no_code(config, complaint)
    kind, known = config.get("model_type"), ["dinov2" if space.kind == "dinov2" else "clip"]
    known += ["clip_vision_model"] if space.kind.startswith("cmmd") else []
    if kind not in known:
        shown = "missing" if kind is None else f'"{shorten(str(kind), 60)}"'
        raise UserError(f'{complaint}: model_type in its config.json is {shown}; it must be "{known[0]}".')
    fields = Fields(config, f"{complaint}: config.json")
    if space.kind == "dinov2":
        patch = fields.integer("patch_size", 1, DINOV2_SIDE, 14)
        if DINOV2_SIDE % patch:
            raise UserError(f"{complaint}: its patch_size is {patch}; it must divide {DINOV2_SIDE}.")
    return fields


def _is_local(source: str) -> bool:
    return is_dir(source) or source.count("/") != 1 or source.startswith((".", "/", "~"))


def _folder(source: str, patterns: Sequence[str]) -> Path:
    """The folder of a source; a Hub repository is downloaded. Raises UserError."""
    if is_dir(source):
        return user_path(source)
    if _is_local(source):
        raise UserError(
            f'no encoder "{source}": it is neither a folder nor a hub id (owner/name); write one with save_pretrained '
            "of transformers."
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except RepositoryNotFoundError:
        raise UserError(f'the hub has no model "{source}", or it is private or gated and requires a login.') from None
    except HFValidationError:
        raise UserError(f'no encoder "{source}": it is neither a folder nor a valid hub id (owner/name).') from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        why = (
            "offline mode is on" if constants.HF_HUB_OFFLINE else f"the hub cannot be reached ({type(error).__name__})"
        )
        raise UserError(
            f'the model "{source}" is not in the local cache and {why}; download its folder (config.json, '
            "*.safetensors, preprocessor_config.json and the tokenizer) elsewhere, and name the folder in its place, "
            f"or copy it to the cache, {constants.HF_HUB_CACHE}."
        ) from None


def _from_pretrained(name: str, folder: Path, device: torch.device, complaint: str) -> Any:
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model, info = getattr(transformers, name).from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers raises many exception types for an invalid configuration
        raise UserError(f"{complaint}: {shorten(reason(error), 300).rstrip('.')}.") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{complaint}: {len(missing)} tensors are missing from its weights, the first is {missing[0]}.")
    return model.requires_grad_(False).eval().to(device=device, dtype=torch.float32)


def _set_positions(model: Any, side: int) -> None:
    """Replace DINOv2's position embeddings by those of a grid of side × side patches, interpolated as the authors do.

    Their `interpolate_pos_encoding` passes the scale (side + 0.1)/M, M being the side of the grid in the weights.
    """
    old = model.embeddings.position_embeddings
    rows = round((old.shape[1] - 1) ** 0.5)
    if rows != side:
        grid = old[:, 1:].reshape(1, rows, rows, -1).permute(0, 3, 1, 2)
        scale = (side + DINOV2_OFFSET) / rows
        grid = nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)
        patches = grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)
        new = torch.cat([old[:, :1], patches], dim=1)
        model.embeddings.position_embeddings = nn.Parameter(new, requires_grad=False)


def _clip_preprocessing(space: Space, folder: Path, config: Any) -> PillowPreprocessing | TorchPreprocessing:
    """The preprocessing of a CLIP model: its own for `clip`, that of CMMD for `cmmd`."""
    where = f"the CLIP model {space.processor or space.source}"
    steps = read_preprocessing(folder, where, config.num_channels)
    side = config.image_size
    if space.kind != "clip":
        return TorchPreprocessing(side, space.kind == "cmmd-antialiased", steps.mean, steps.std)
    given = Fields(read_json(folder / PREPROCESSOR, where), f"{where}: {PREPROCESSOR}")
    resample = given.integer("resample", 0, len(FILTERS) - 1, 3)
    output = steps.crop or steps.size
    if output != (side, side) or (steps.shortest is not None and steps.shortest < side) or side > MAX_SIDE:
        shown = "images of any size" if output is None else f"images of {output[0]}x{output[1]} pixels"
        raise UserError(f"{where}: {PREPROCESSOR} gives {shown}, but the encoder requires {side}x{side}.")
    if steps.size is not None and steps.crop is not None and min(steps.size) < side:
        raise UserError(f"{where}: {PREPROCESSOR} crops more than it resizes to.")
    return PillowPreprocessing(steps, resample)
