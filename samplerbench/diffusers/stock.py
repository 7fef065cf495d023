"""Stock pipelines of diffusers: which class, which arguments, and loading without any code of the checkpoint."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from samplerbench.errors import Argument, UserError, argument
from samplerbench.models.checkpoint import Checkpoint, open_checkpoint
from samplerbench.models.files import LoadOptions, resolve_checkpoint
from samplerbench.options import did_you_mean
from samplerbench.untrusted import reason, shorten

PREFIX = "pipeline:"

_OTHER_TASKS = (
    ("Video|Animat", "makes videos"),
    ("Audio|Music|AceStep", "makes audio"),
    ("Img2Img|Image2Image|I2I|ImageToImage|Variation|Upscal|SuperResolution|Refiner", "requires an input image"),
    ("Inpaint|Edit|Kontext|Fill|Pix2Pix|Redux|Layered", "requires an input image"),
    ("ControlNet|Control|Adapter|Depth2", "requires a control image"),
    ("Prior|Emb2Emb", "makes embeddings, not images"),
    ("ShapE|LDM3D", "does not make plain images"),
)
"""Parts of class names, and why such a pipeline is not supported."""
_FRAMES = ("num_frames", "video_length", "video", "frames")
_SOUND = ("num_waveforms_per_prompt", "audio_length_in_s")
_CONDITIONS = ("prompt", "class_labels")
_ELSEWHERE = {
    "prompt": "prompts",
    "negative_prompt": "negative_prompt",
    "class_labels": "labels",
    "num_inference_steps": "steps",
    "timesteps": "spacing",
    "sigmas": "spacing",
    "mu": "spacing",
    "generator": "seed",
    "latents": "seed",
}
"""Arguments of a call that samplerbench sets, with its own argument for each."""
_FIXED = re.compile("image|embed|mask|callback|latent|output_type|return_dict|^eta$|lora|batch_size|prompt|kwargs")
"""Arguments of a call that cannot be set in a spec."""
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that are not loaded."""
_NETWORKS = ("transformer", "unet")
_SECOND = ("transformer_2", "unet_2", "prior", "prior_prior", "decoder", "refiner", "super_res_first")


@dataclass(frozen=True)
class Stock:
    """A loaded pipeline.

    Attributes:
        pipeline: the pipeline.
        network: name of its denoising network.
        identity: protocol fields of its parts.
    """

    pipeline: Any
    network: str
    identity: dict[str, Any]


def split_source(spec: str) -> tuple[str, dict[str, str]]:
    """Split `pipeline:SOURCE[,argument=value…]`.

    Returns:
        The folder or hub id, and the texts of the arguments.

    Raises:
        UserError: if there is no source, or an argument has no value.
    """
    source, *texts = [part.strip() for part in spec.removeprefix(PREFIX).split(",")]
    given = argument("model", spec)
    if not source:
        raise UserError(f"{given} names no pipeline; write pipeline:FOLDER, or pipeline:OWNER/NAME of the hub.")
    arguments: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name or not value:
            raise UserError(f"{given}: {shorten(text)!r} is no argument; write pipeline:SOURCE,argument=value.")
        if name in arguments:
            raise UserError(f"{given}: the argument {name} is given twice.")
        arguments[name] = value
    return source, arguments


def pipeline_class(source: str, index: Mapping[str, Any]) -> Any:
    """Return the class of a pipeline that makes images of prompts or of class labels.

    Only classes that diffusers exports are used, never code of the checkpoint.

    Args:
        source: path or hub id, for error messages.
        index: content of model_index.json.

    Raises:
        UserError: if the class is unknown, or does not make images of prompts or class labels.
    """
    name = index.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Pipeline") else None
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline)):
        shown = "no class" if name is None else shorten(str(name))
        raise UserError(
            f"{source}: model_index.json names {shown}, which is no pipeline of diffusers "
            f"{diffusers.__version__}; code of a checkpoint is not executed."
        )
    parameters = _parameters(cls)
    why = next((why for pattern, why in _OTHER_TASKS if re.search(pattern, cls.__name__)), None)
    for names, task in ((_FRAMES, "makes videos"), (_SOUND, "makes audio")):
        why = task if any(name in parameters for name in names) else why
    required = [p.name for p in parameters.values() if p.default is p.empty and p.name not in _CONDITIONS]
    if why is None and required:
        why = f"requires {' and '.join(required)}"
    if why is None and not any(name in parameters for name in _CONDITIONS):
        why = "takes neither prompts nor class labels"
    if why is not None:
        raise UserError(
            f"{source}: {cls.__name__} {why}; supported are pipelines that make images of prompts or of class labels."
        )
    return cls


def read_arguments(spec: str, cls: Any, texts: Mapping[str, str]) -> dict[str, Any]:
    """Convert the arguments of a call to the types in its signature.

    Args:
        spec: the spec, for error messages.
        cls: class of the pipeline.
        texts: text of each argument.

    Raises:
        UserError: if an argument is unknown, is set elsewhere, or has the wrong type.
    """
    parameters, given = _parameters(cls), argument("model", spec)
    free = [name for name in parameters if name not in _ELSEWHERE and not _FIXED.search(name)]
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if name in _ELSEWHERE and name in parameters:
            raise UserError(f"{given}: {name} is set with {argument(_ELSEWHERE[name])}, not in the spec.")
        if name not in free:
            raise UserError(
                f"{given}: {cls.__name__} has no argument {shorten(name)!r} to set here.{did_you_mean(name, free)} It "
                f"has {', '.join(free)}."
            )
        values[name] = _value(text, parameters[name], given)
    return values


def _value(text: str, parameter: inspect.Parameter, given: Argument) -> Any:
    plain = {"true": "True", "false": "False", "none": "None"}.get(text.lower(), text)
    try:
        value = ast.literal_eval(plain)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    words = set(re.findall(r"\w+", str(parameter.annotation)))
    kinds = [kind for kind in (bool, int, float, str) if kind.__name__ in words]
    if not kinds and isinstance(parameter.default, bool | int | float | str):
        kinds = [type(parameter.default)]
    if float in kinds and type(value) is int:
        value = float(value)
    if str in kinds and type(value) not in kinds:
        value = text
    optional = value is None and (parameter.default is None or "None" in words)
    if type(value) not in (bool, int, float, str, type(None)) or (kinds and type(value) not in kinds and not optional):
        wanted = " or ".join(_NAMES[kind] for kind in kinds or _NAMES)
        raise UserError(f"{given}: {parameter.name}={shorten(text)} must be {wanted}.")
    return value


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _parameters(cls: Any) -> Mapping[str, inspect.Parameter]:
    signature = inspect.signature(cls.__call__).parameters
    keep = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in signature.items() if name != "self" and p.kind in keep}


def open_stock(source: str, options: LoadOptions) -> Checkpoint:
    """Open a pipeline, without loading its weights.

    Args:
        source: path or hub id.
        options: options for loading.

    Raises:
        UserError: if it does not exist, or its class is not supported (`pipeline_class`).
    """
    checkpoint = open_checkpoint(source, options, resolve_checkpoint(source, options, pipeline_class))
    pipeline_class(source, checkpoint.index)
    return checkpoint


def load_stock(checkpoint: Checkpoint, scheduler: Any, device: torch.device, dtype: torch.dtype) -> Stock:
    """Load all parts of a pipeline.

    Every network is loaded from safetensors as in our own adapters, with the same checks. The other parts are
    tokenizers.

    Args:
        checkpoint: the opened pipeline.
        scheduler: scheduler of the pipeline, in place of its own.
        device: device of the networks.
        dtype: dtype of their weights.

    Raises:
        UserError: if a part is not of diffusers or transformers, is missing or damaged, or there are several denoising
            networks.
    """
    from transformers.utils import logging

    source, cls = checkpoint.source, pipeline_class(checkpoint.source, checkpoint.index)
    listed = {name: entry for name, entry in checkpoint.index.items() if isinstance(entry, list)}
    networks = [name for name in _NETWORKS if _given(listed.get(name))]
    second = [name for name in _SECOND if _given(listed.get(name))]
    if len(networks) != 1 or second:
        several = ", ".join([*networks, *second]) or "none"
        raise UserError(
            f"{source}: {cls.__name__} must have one denoising network, a transformer or a unet; it has {several}."
        )
    parts: dict[str, Any] = {name: None for name in listed if name in _UNUSED} | {"scheduler": scheduler}
    # diffusers imports the library of every entry, so all of them are checked, also of parts that are not loaded.
    kinds = {name: _part_class(checkpoint, name, entry) for name, entry in listed.items() if _given(entry)}
    kinds = {name: kind for name, kind in kinds.items() if name not in (*_UNUSED, "scheduler")}
    modules = [name for name, kind in kinds.items() if issubclass(kind, nn.Module)]
    checkpoint.check_variant(modules)
    identity: dict[str, Any] = {}
    for name in modules:
        part = checkpoint.load(name, kinds[name], dtype, device)
        parts[name] = part.module
        identity["weights" if name == networks[0] else f"{name} weights"] = part.sha256
    for name in kinds.keys() - set(modules):
        identity[f"{name} files"] = _hash_folder(checkpoint.folder / name)
    # A pipeline that was saved without a part, such as the third text encoder of SD3, lists null for it.
    parts |= {name: None for name, entry in listed.items() if not _given(entry)}
    more = {"add_watermarker": False} if "add_watermarker" in inspect.signature(cls.__init__).parameters else {}
    if "requires_safety_checker" in inspect.signature(cls.__init__).parameters:
        more["requires_safety_checker"] = False
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        pipeline = cls.from_pretrained(
            checkpoint.folder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **parts,
            **more,
        )
    except Exception as error:  # the libraries raise many exception types for an invalid configuration
        raise UserError(f"{source} cannot be loaded as a {cls.__name__}: {reason(error)}") from None
    pipeline.set_progress_bar_config(disable=True)
    return Stock(pipeline, networks[0], dict(sorted(identity.items())))


def _given(entry: Any) -> bool:
    """Whether an entry of model_index.json names a class. [null, null] is a part that the pipeline is without."""
    return isinstance(entry, list) and bool(entry) and entry[-1] is not None


def _part_class(checkpoint: Checkpoint, name: str, entry: list[Any]) -> Any:
    """The class of a part: of diffusers, of a pipeline of diffusers, or of transformers."""
    import transformers

    import samplerbench.diffusers

    library, kind = entry if len(entry) == 2 and all(isinstance(word, str) for word in entry) else ("", "")
    homes = {"diffusers": diffusers, "transformers": transformers, "samplerbench.diffusers": samplerbench.diffusers}
    home = homes.get(library)
    if home is None and re.fullmatch("[a-z0-9_]+", library):
        home = getattr(diffusers.pipelines, library, None)
    cls = getattr(home, kind, None) if inspect.ismodule(home) and re.fullmatch(r"\w+", kind) else None
    if not inspect.isclass(cls):
        raise UserError(
            f"{checkpoint.source}: the part {shorten(name)} is {shorten(str(entry))}, which is no class of diffusers "
            "or transformers; code of a checkpoint is not executed."
        )
    return cls


def _hash_folder(folder: Path) -> str:
    """The SHA-256 hash of the names and contents of the files of a tokenizer."""
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.glob("*") if f.is_file()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
