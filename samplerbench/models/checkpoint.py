"""An opened checkpoint: its index and its parts."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from samplerbench.errors import UserError, argument
from samplerbench.limits import MAX_CLASSES, MAX_IMAGES
from samplerbench.models.fields import Fields
from samplerbench.models.files import (
    OFFLOADS,
    LoadOptions,
    check_no_code,
    check_weights,
    hash_files,
    known_variants,
    resolve_checkpoint,
    weight_files,
)
from samplerbench.models.single_file import contains, file_hash, load_from_file
from samplerbench.untrusted import read_json, reason

CARD = "samplerbench.json"


@dataclass(frozen=True)
class Part:
    """A loaded part of a pipeline.

    Attributes:
        module: the module, in evaluation mode and with gradients disabled.
        config: its configuration.
        sha256: hash of its weights.
    """

    module: Any
    config: dict[str, Any]
    sha256: str


@dataclass
class Checkpoint:
    """A pipeline folder in the format of diffusers.

    Attributes:
        source: path or hub id given by the user.
        folder: local folder.
        revision: commit of the hub repository. Empty for a local folder.
        options: options for loading.
        index: content of model_index.json.
        card: model card of a model trained with samplerbench. Empty for other models.
        paths: folders of parts that are not in `folder`. That of the scheduler is the path of its configuration.
        network: name of the network, if it is not that of the pipeline in `folder`. Otherwise empty.
        single_file: safetensors file with the weights of the network, and possibly of other parts. None for a folder.
    """

    source: str
    folder: Path
    revision: str
    options: LoadOptions
    index: dict[str, Any]
    card: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    network: str = ""
    single_file: Path | None = None

    def path(self, part: str) -> Path:
        """The folder of a part."""
        return self.paths.get(part, self.folder / part)

    @property
    def pipeline(self) -> str:
        """The class name of the pipeline."""
        return str(self.index.get("_class_name"))

    def kind(self, part: str) -> str:
        """The class name of a part in model_index.json. "missing" if the part is not listed."""
        entry = self.index.get(part)
        return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] else "missing"

    def require(self, part: str, *classes: str) -> str:
        """Return the class name of a part.

        Args:
            part: name of the part.
            classes: supported class names.

        Raises:
            UserError: if the class is not supported.
        """
        if (found := self.kind(part)) not in classes:
            raise UserError(
                f"{self.source} is a {self.pipeline} with the {part} {found}; only {' or '.join(classes)} is supported."
            )
        return found

    def config(self, part: str, cls: Any = None, file: str = "config.json") -> dict[str, Any]:
        """Read the configuration of a part. Older configurations omit keys; they are set to the defaults of `cls`.

        Args:
            part: name of the part.
            cls: class of the part. None for no defaults.
            file: name of the configuration file.

        Raises:
            UserError: if the file is missing, damaged or empty.
        """
        path = self.path(part)
        found = read_json(path if path.suffix == ".json" else path / file, f"{self.source} is incomplete")
        if all(key.startswith("_") for key in found):
            raise UserError(
                f"{self.source} is incomplete: {part}/{file} is empty; write it with save_pretrained of diffusers."
            )
        parameters = [] if cls is None else inspect.signature(cls.__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty} | found

    def fields(self, part: str, cls: Any = None, file: str = "config.json") -> Fields:
        """Read the configuration of a part as `Fields`. The arguments are those of `config`.

        Raises:
            UserError: if the file is missing or damaged.
        """
        return Fields(self.config(part, cls, file), f"{self.source}: {part}/{file}")

    def load(self, part: str, cls: Any, dtype: torch.dtype, device: torch.device) -> Part:
        """Load a part from safetensors files, in the requested variant if the part has it.

        Args:
            part: name of the part.
            cls: class of the module.
            dtype: dtype of the weights.
            device: device of the module.

        Raises:
            UserError: if the weights are missing, damaged, in a pickle file, or do not match the configuration.
        """
        if self.single_file is not None and contains(self.single_file, part, self.network, self.kind(part)):
            return self._from_file(part, cls, dtype, device, self.single_file)
        name, variant = self._variant(part)
        config, folder = self.config(name), self.path(name)
        files = self._weights(part)
        complaint = f"{self.source} cannot be loaded as a {cls.__name__}"
        check_no_code(config, complaint)
        check_weights(folder, files, variant, complaint)
        module = self._from_pretrained(cls, folder, dtype, variant)
        # diffusers loads some classes, such as SD3Transformer2DModel, in float32 whatever dtype is requested.
        kept = getattr(cls, "_keep_in_fp32_modules", None)
        if not kept and any(p.is_floating_point() and p.dtype != dtype for p in module.parameters()):
            module.to(dtype)
        return Part(self._placed(module, device), config, hash_files(files))

    def _placed(self, module: Any, device: torch.device) -> Any:
        """The module in evaluation mode, without gradients, on the device, in the memory format of convolutions."""
        # An offloaded module stays on the host. `save_memory` moves it.
        host = torch.device("cpu") if OFFLOADS.intersection(self.options.memory) else device
        module.requires_grad_(False).eval().to(device=host)
        # Channels-last convolutions are 1.2 to 1.4 times as fast, also on CPUs (benchmarks/README.md). The format is
        # defined for two-dimensional convolutions only.
        if not any(p.ndim == 5 for p in module.parameters()):
            module.to(memory_format=torch.channels_last)
        return module

    def weights_hash(self, part: str) -> str:
        """Return the hash of the weights of a part, without loading them. They are checked as by `load`.

        Args:
            part: name of the part.

        Raises:
            UserError: if the weights are missing, or the part refers to code or to other files.
        """
        if self.single_file is None or not contains(self.single_file, part, self.network, self.kind(part)):
            name, variant = self._variant(part)
            files, complaint = self._weights(part), f"{self.source} cannot be loaded"
            check_no_code(self.config(name), complaint)
            check_weights(self.path(name), files, variant, complaint)
            return hash_files(files)
        # The configuration is not that of the file, so it belongs to what determines the output.
        settings = json.dumps({k: v for k, v in self.config(part).items() if not k.startswith("_")}, sort_keys=True)
        return hashlib.sha256((file_hash(self.single_file) + settings).encode()).hexdigest()

    def _weights(self, part: str) -> list[Path]:
        """The weight files of a part, in the requested variant if the part has it."""
        name, variant = self._variant(part)
        config, folder = self.config(name), self.path(name)
        files = weight_files(folder, variant)
        if not files:
            others = known_variants(folder)
            advice = (
                f"only the variants {', '.join(others)} are available; select one with {argument('variant')}"
                if others
                else "pickle files (.bin) are not supported; convert them to safetensors with diffusers"
            )
            stem = "diffusion_pytorch_model" if "_diffusers_version" in config else "model"
            raise UserError(f"{self.source} is incomplete: {name}/{stem}.safetensors does not exist ({advice}).")
        return files

    def _variant(self, part: str) -> tuple[str, str | None]:
        """The folder and the variant to load for a part. A part without the requested variant uses no variant."""
        variant = self.options.variant
        if variant == "ema" and part not in self.paths and (self.folder / f"{part}_ema").is_dir():
            return f"{part}_ema", None
        return part, variant if variant and weight_files(self.path(part), variant) else None

    def check_variant(self, parts: list[str]) -> None:
        """Check that at least one part has the requested variant.

        Args:
            parts: names of the parts.

        Raises:
            UserError: if no part has it.
        """
        variant = self.options.variant
        if variant is None or any(self._variant(part) != (part, None) for part in parts):
            return
        known = sorted({v for part in parts for v in known_variants(self.path(part))})
        known += ["ema"] if any((self.folder / f"{part}_ema").is_dir() for part in parts) else []
        raise UserError(f"{self.source} has no variant {variant}; available variants: {', '.join(known) or 'none'}.")

    def _from_file(self, part: str, cls: Any, dtype: torch.dtype, device: torch.device, file: Path) -> Part:
        """Load a part from a single file. Its configuration is that of the folder."""
        config = self.config(part)
        check_no_code(config, f"{self.source} cannot be loaded as a {cls.__name__}")
        module = load_from_file(self.source, file, part, cls, self.path(part), dtype)
        return Part(self._placed(module.to(dtype), device), config, self.weights_hash(part))

    def _from_pretrained(self, cls: Any, folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
        # diffusers and transformers name the same option differently.
        how = {"torch_dtype": dtype, "low_cpu_mem_usage": False} if hasattr(cls, "load_config") else {"dtype": dtype}
        try:
            module, info = cls.from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                variant=variant,
                output_loading_info=True,
                **how,
            )
        except Exception as error:  # the libraries raise many exception types for an invalid configuration
            raise UserError(f"{self.source} cannot be loaded as a {cls.__name__}: {reason(error)}") from None
        if missing := sorted(info["missing_keys"]):
            raise UserError(
                f"{self.source} is incomplete: {len(missing)} tensors are missing from its weights, the first is "
                f"{missing[0]}."
            )
        return module


def open_checkpoint(source: str, options: LoadOptions, found: tuple[Path, str] | None = None) -> Checkpoint:
    """Open a checkpoint in a folder or on the hub, without loading its weights.

    Args:
        source: path or hub id.
        options: options for loading.
        found: result of `resolve_checkpoint`. If None, it is called.

    Raises:
        UserError: if the checkpoint does not exist, is not a diffusers pipeline, or has a damaged card.
    """
    folder, revision = found or resolve_checkpoint(source, options)
    index = read_json(folder / "model_index.json", f"{source} is not a diffusers pipeline")
    return Checkpoint(source, folder, revision, options, index, read_card(folder, source))


def read_card(folder: Path, source: str) -> dict[str, Any]:
    """Read and validate the card of a model trained with samplerbench. Return {} if there is no card.

    Args:
        folder: folder of the model.
        source: path or hub id, for error messages.

    Raises:
        UserError: if the card is damaged.
    """
    if not (folder / CARD).exists():
        return {}
    card = read_json(folder / CARD, f"{source} has a damaged card")
    data = card.get("data", {})
    if not isinstance(data, dict):
        raise UserError(f'{source} has a damaged card: "data" in {CARD} must be an object.')
    outer, inner = (Fields(part, f"{source} has a damaged card: {CARD}") for part in (card, data))
    outer.integer_or_none("classes", 1, MAX_CLASSES)
    outer.integer_or_none("null_label", 0, MAX_CLASSES)
    for key in ("feature_space", "command"):
        outer.text(key)
    for key in ("name", "split", "source"):
        inner.text(key)
    inner.integer_or_none("images", 0, MAX_IMAGES)
    counts = inner.values.get("class_counts")
    if counts is not None:
        sound = isinstance(counts, list) and 1 <= len(counts) <= MAX_CLASSES
        if not sound or not all(type(c) is int and 0 <= c <= MAX_IMAGES for c in counts) or not sum(counts):
            raise inner.refusal("class_counts", counts, "a list of image counts, not all 0")
    names = inner.values.get("class_names")
    if names is not None:
        classes = inner.integer("classes", 1, MAX_CLASSES)
        if not isinstance(names, list) or len(names) != classes or not all(isinstance(name, str) for name in names):
            raise inner.refusal("class_names", names, f"a list of {classes:,} strings, one for each class")
    if data and data.get("name") is None:
        raise inner.refusal("name", None, "the name of the data set")
    return card
