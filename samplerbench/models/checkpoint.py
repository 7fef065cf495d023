"""An opened checkpoint: its index, and the parts it is made of."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from samplerbench.errors import UserError, argument
from samplerbench.limits import MAX_CLASSES, MAX_IMAGES
from samplerbench.models.fields import Fields
from samplerbench.models.files import (
    LoadOptions,
    check_no_code,
    check_weights,
    hash_files,
    known_variants,
    resolve_checkpoint,
    weight_files,
)
from samplerbench.untrusted import read_json, reason

CARD = "samplerbench.json"


@dataclass(frozen=True)
class Part:
    """A loaded part: the module, without gradients and in evaluation mode, its configuration and its weights' hash."""

    module: Any
    config: dict[str, Any]
    sha256: str


@dataclass
class Checkpoint:
    """A pipeline folder as diffusers saves it.

    source: as the user named it. revision: commit of a hub repository, else "". index: model_index.json. card: of a
    model this project trained, else {}.
    """

    source: str
    folder: Path
    revision: str
    options: LoadOptions
    index: dict[str, Any]
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def pipeline(self) -> str:
        """The pipeline's class."""
        return str(self.index.get("_class_name"))

    def kind(self, part: str) -> str:
        """The class of a part by the index; "missing" where it has none."""
        entry = self.index.get(part)
        return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] else "missing"

    def require(self, part: str, *classes: str) -> str:
        """The class of a part. Raises UserError where it is none of `classes`."""
        if (found := self.kind(part)) not in classes:
            raise UserError(
                f"{self.source} is a {self.pipeline} with the {part} {found}; supported is {' or '.join(classes)}."
            )
        return found

    def config(self, part: str, cls: Any = None, file: str = "config.json") -> dict[str, Any]:
        """The configuration of a part; what it leaves out is the default of class `cls`, as older ones leave out much.

        Raises:
            UserError: it is missing or damaged.
        """
        found = read_json(self.folder / part / file, f"{self.source} is incomplete")
        parameters = [] if cls is None else inspect.signature(cls.__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty} | found

    def fields(self, part: str, cls: Any = None, file: str = "config.json") -> Fields:
        """The configuration of a part as `config` gives it, to be read by type.

        Raises:
            UserError: it is missing or damaged.
        """
        return Fields(self.config(part, cls, file), f"{self.source}: {part}/{file}")

    def load(self, part: str, cls: Any, dtype: torch.dtype, device: torch.device) -> Part:
        """A part as a module of class `cls`, from safetensors only, in the asked variant where it has that.

        Raises:
            UserError: weights that are missing, damaged, in a pickle, or of another shape than the configuration says.
        """
        name, variant = self._variant(part)
        config, folder = self.config(name), self.folder / name
        files = weight_files(folder, variant)
        if not files:
            others = known_variants(folder)
            advice = (
                f"there are only the variants {', '.join(others)}; choose one with {argument('variant')}"
                if others
                else "weights in pickle files, .bin, are not loaded; convert them with diffusers"
            )
            stem = "diffusion_pytorch_model" if "_diffusers_version" in config else "model"
            raise UserError(f"{self.source} is incomplete: {name}/{stem}.safetensors is not there ({advice}).")
        complaint = f"{self.source} cannot be loaded as a {cls.__name__}"
        check_no_code(config, complaint)
        check_weights(folder, files, variant, complaint)
        module = self._from_pretrained(cls, folder, dtype, variant)
        # Convolutions of channels-last weights are 1.2 to 1.4 times as fast, on CPUs as well (benchmarks/README.md).
        module.requires_grad_(False).eval().to(device=device, memory_format=torch.channels_last)
        return Part(module, config, hash_files(files))

    def _variant(self, part: str) -> tuple[str, str | None]:
        """The folder of a part, and the variant to take there: a part that has no such variant is taken without."""
        asked = self.options.variant
        if asked == "ema" and (self.folder / f"{part}_ema").is_dir():
            return f"{part}_ema", None
        return part, asked if asked and weight_files(self.folder / part, asked) else None

    def check_variant(self, parts: list[str]) -> None:
        """Raise UserError where an asked variant is of no part at all."""
        asked = self.options.variant
        if asked is None or any(self._variant(part) != (part, None) for part in parts):
            return
        known = sorted({v for part in parts for v in known_variants(self.folder / part)})
        known += ["ema"] if any((self.folder / f"{part}_ema").is_dir() for part in parts) else []
        raise UserError(
            f"{self.source} has no weights of the variant {asked}; it has {', '.join(known) or 'no variants'}."
        )

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
        except Exception as error:  # what the libraries raise for a configuration of their classes has no end
            raise UserError(f"{self.source} cannot be loaded as a {cls.__name__}: {reason(error)}") from None
        if missing := sorted(info["missing_keys"]):
            raise UserError(
                f"{self.source} is incomplete: its weights lack {len(missing)} tensors, {missing[0]} first."
            )
        return module


def open_checkpoint(source: str, options: LoadOptions, found: tuple[Path, str] | None = None) -> Checkpoint:
    """The checkpoint in a folder or on the hub, opened but not loaded. found: where `resolve_checkpoint` found it.

    Raises:
        UserError: it is not there, is no diffusers pipeline, or has a damaged card.
    """
    folder, revision = found or resolve_checkpoint(source, options)
    index = read_json(folder / "model_index.json", f"{source} is no diffusers pipeline")
    return Checkpoint(source, folder, revision, options, index, read_card(folder, source))


def read_card(folder: Path, source: str) -> dict[str, Any]:
    """The card of a folder that this project trained; {} for any other. What a model takes from it has its type.

    Raises:
        UserError: it is damaged.
    """
    if not (folder / CARD).exists():
        return {}
    card = read_json(folder / CARD, f"{source} has a damaged card")
    data = card.get("data", {})
    if not isinstance(data, dict):
        raise UserError(f'{source} has a damaged card: "data" in {CARD} is no object.')
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
            raise inner.refusal("class_counts", counts, "a list of numbers of images, not all 0")
    if data and data.get("name") is None:
        raise inner.refusal("name", None, "the name of the data set")
    return card
