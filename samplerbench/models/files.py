"""Checkpoint folders: resolve a path or hub id, find the weight files, and hash them."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samplerbench import registry
from samplerbench.errors import UserError, argument
from samplerbench.options import did_you_mean
from samplerbench.untrusted import is_dir, is_file, read_json, shorten, user_path

PIXEL = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "ScoreSdeVePipeline")
LATENT = ("LDMPipeline", "LatentDiffusionUncondPipeline")
TEXT = (
    "LatentConsistencyModelPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
    "SanaPipeline",
    "Lumina2Pipeline",
    "AuraFlowPipeline",
    "QwenImagePipeline",
    "ZImagePipeline",
)
"""Class names of the supported text-to-image pipelines."""
SUPPORTED = (*PIXEL, *LATENT, "ConsistencyModelPipeline", "DiTPipeline", *TEXT)
"""Class names of the supported pipelines of diffusers."""

MEMORY = ("offload", "sequential-offload", "vae-tiling", "vae-slicing", "attention-slicing")
"""Ways to save memory, in the words of diffusers."""
OFFLOADS = frozenset(MEMORY[:2])
"""Those that keep the weights on the host."""

STEMS = ("diffusion_pytorch_model", "model")
"""File name stems of weights in diffusers and transformers."""


@dataclass(frozen=True)
class LoadOptions:
    """Options for loading a checkpoint.

    Attributes:
        revision: branch, tag or commit of a hub repository. None for the main branch.
        variant: variant of the weights, such as "fp16" or "non_ema", or "ema" for the folder `unet_ema`.
        prompts: path of a text file with one prompt per line, or the prompts.
        negative_prompt: the negative prompt. None for the empty prompt.
        offline: whether to use only the local cache.
        show: whether the model is only shown, not sampled. If so, a text-to-image model requires no prompts.
        compile: whether to compile the network with torch.compile.
        graphs: whether to run whole batches as CUDA graphs.
        keep_text_encoder: whether a text-to-image model keeps its text encoder, to measure its time.
        image_size: (height, width) of the images of a text-to-image model, in pixels. None for its own size.
        embedded_guidance: guidance scale that a guidance-distilled network takes as an input. None for its default.
        memory: ways to save memory, of `MEMORY`.
        lora: LoRA files to merge into the network, each `FILE` or `FILE:scale`.
        scheduler: path of a scheduler_config.json, or of its folder, in place of that of the pipeline.
        config: pipeline with the parts that a single file or the folder of a network lacks, a folder or a hub id.
    """

    revision: str | None = None
    variant: str | None = None
    prompts: str | tuple[str, ...] | None = None
    negative_prompt: str | None = None
    offline: bool = False
    show: bool = False
    compile: bool = False
    graphs: bool = False
    keep_text_encoder: bool = False
    image_size: tuple[int, int] | None = None
    embedded_guidance: float | None = None
    memory: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    scheduler: str | None = None
    config: str | None = None


def hash_files(files: Iterable[Path]) -> str:
    """Compute the SHA-256 hash of the names and contents of the files, sorted by name."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        digest.update(file.name.encode())
        with open(file, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """List the safetensors files of a module, including shards.

    Args:
        folder: folder of the module.
        variant: variant of the weights. None for files without a variant.

    Returns:
        The sorted files. Empty if there are none.
    """
    shard = r"(-\d+-of-\d+)?"
    # Older versions put the shard number before the variant.
    middle = shard if variant is None else rf"(\.{re.escape(variant)}{shard}|-\d+-of-\d+\.{re.escape(variant)})"
    pattern = re.compile(rf"({'|'.join(STEMS)}){middle}\.safetensors")
    return sorted(f for f in folder.glob("*.safetensors") if pattern.fullmatch(f.name))


def check_weights(folder: Path, files: Iterable[Path], variant: str | None, complaint: str) -> None:
    """Check that only the hashed weight files are loaded from the folder of a module.

    The index of a sharded module maps each tensor to a file. It could refer to any file.

    Args:
        folder: folder of the module.
        files: hashed weight files.
        variant: variant of the weights. None for files without a variant.
        complaint: prefix of error messages.

    Raises:
        UserError: if the index cannot be read or refers to another file, or the folder contains an adapter.
    """
    names = {file.name for file in files}
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index{'' if variant is None else f'.{variant}'}.json"
        if not index.exists():
            continue
        shards = read_json(index, complaint).get("weight_map")
        for name in shards.values() if isinstance(shards, dict) else [None]:
            if not isinstance(name, str) or name not in names:
                what = f'"{shorten(str(name))}"' if isinstance(shards, dict) else "no files"
                raise UserError(
                    f"{complaint}: {folder.name}/{index.name} refers to {what}; it must refer to shards in "
                    "the same folder."
                )
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{complaint}: adapters (adapter_config.json) are not supported; merge the adapter into the weights."
        )


def check_no_code(config: Mapping[str, Any], complaint: str) -> None:
    """Check that a configuration does not refer to code on the hub, such as an attention kernel `owner/name`.

    Custom classes (`auto_map`) need no check, because every loader is called with `trust_remote_code=False`.

    Args:
        config: configuration of the module.
        complaint: prefix of error messages.

    Raises:
        UserError: if the configuration refers to code.
    """
    for key, value in config.items():
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise UserError(
                f"{complaint}: its config.json refers to code on the hub ({key}: {shorten(str(value))}); code in "
                "checkpoints is not executed."
            )
        if isinstance(value, dict):
            check_no_code(value, complaint)


def known_variants(folder: Path) -> list[str]:
    """List the variants of the weights in the folder of a module."""
    named = re.compile(rf"(?:{'|'.join(STEMS)})(?:-\d+-of-\d+)?\.([^.]+?)(?:-\d+-of-\d+)?\.safetensors")
    return sorted({found[1] for f in folder.glob("*.safetensors") if (found := named.fullmatch(f.name))})


def resolve_checkpoint(
    source: str, options: LoadOptions | None = None, check: Callable[[str, Mapping[str, Any]], Any] | None = None
) -> tuple[Path, str]:
    """Return the local folder and the revision of a checkpoint.

    For a hub repository, only the configurations, the tokenizer and the safetensors of the requested variant are
    downloaded.

    Args:
        source: path, or hub id `owner/name`.
        options: options for loading.
        check: check of a pipeline's model_index.json before its weights are downloaded. None for `check_pipeline`.

    Returns:
        The folder, and the revision. The revision is empty for a local folder.

    Raises:
        UserError: if the folder does not exist, a revision is given for a local folder, or the hub repository is
            neither cached nor reachable.
    """
    options = options or LoadOptions()
    path = user_path(source)
    if source and is_dir(path):
        if options.revision is not None:
            raise UserError(
                f"{argument('revision', options.revision)} requires a hub repository, but {source} is a local folder."
            )
        return path, ""
    a_file = path.suffix.lower() in (".safetensors", ".json", ".bin", ".ckpt", ".pt", ".pth", ".pkl")
    looks_like_id = source.count("/") == 1 and not source.startswith((".", "/", "~")) and not a_file
    if is_file(path) or not looks_like_id:
        word = source.partition(":")[0]
        hint = "" if "/" in word or a_file else did_you_mean(word, {e.name for e in registry.entries("model")})
        raise UserError(
            f'no model "{source}": it is neither a folder, nor a hub id (owner/name), nor a name in '
            f"`samplerbench list models`.{hint}"
        )
    # *.model: the vocabulary of a SentencePiece tokenizer.
    folder = _fetch(source, options, ["*.json", "*.txt", "*.model"])
    index = folder / "model_index.json"
    if index.exists():
        content = read_json(index, source)
        (check or check_pipeline)(source, content)
        parts = [name for name, value in content.items() if isinstance(value, list)]
        # These parts are large and not used.
        parts = [p for p in parts if p not in ("safety_checker", "feature_extractor", "image_encoder")]
        # *.model and *.jinja belong to tokenizers.
        kept = ["*.json", "*.txt", "*.model", "*.jinja"]
        folder = _fetch(source, options, [*kept, *_weight_patterns(parts, options.variant)])
    else:
        folder = _fetch(source, options, ["*.json", *_weight_patterns([""], options.variant)])
    return folder, folder.name


def check_pipeline(source: str, index: Mapping[str, Any]) -> str:
    """Return the class name of a pipeline.

    Args:
        source: path or hub id, for error messages.
        index: content of model_index.json.

    Raises:
        UserError: if the class is missing or not supported.
    """
    name = index.get("_class_name")
    supported = f"supported pipelines: {', '.join(SUPPORTED[:-1])} and {SUPPORTED[-1]}"
    if name is None:
        raise UserError(f"{source}: model_index.json does not name its pipeline in _class_name; {supported}.")
    if name not in SUPPORTED:
        if made := _other_output(str(name)):
            raise UserError(f"{source} is a {name}, which makes {made}, not images; only images are supported.")
        own_call = f"{argument('model', f'pipeline:{source}')} runs other pipelines of diffusers by their own call"
        raise UserError(f"{source}: {shorten(str(name))} is not supported; {supported}. {own_call}.")
    return str(name)


def _other_output(name: str) -> str:
    """What a pipeline class of diffusers makes, if it is "videos" or "audio". Empty for images and unknown classes."""
    import diffusers
    from diffusers.utils import BaseOutput

    if not name.endswith("Pipeline") or name not in dir(diffusers):
        return ""
    try:
        module = sys.modules[getattr(diffusers, name).__module__]
        outputs = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, BaseOutput)]
    except Exception:  # a pipeline that needs a package that is not installed
        return ""
    fields = {field for output in outputs for field in getattr(output, "__dataclass_fields__", {})}
    return "" if "images" in fields else "videos" if "frames" in fields else "audio" if "audios" in fields else ""


def check_no_prompts(source: str, options: LoadOptions) -> None:
    """Raise UserError if options of text-to-image models are given for a model that is not one."""
    prompts = "prompts" if isinstance(options.prompts, str) else "prompt"
    given = {
        prompts: options.prompts,
        "negative_prompt": options.negative_prompt,
        "image_size": options.image_size,
        "embedded_guidance": options.embedded_guidance,
        "memory": options.memory or None,
    }
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{argument(name)} requires a text-to-image model, but {source} is not one.")


def check_no_parts(source: str, options: LoadOptions) -> None:
    """Raise UserError if parts of a pipeline are given for a model that is not one."""
    for name in ("scheduler", "config"):
        if (given := getattr(options, name)) is not None:
            raise UserError(f"{argument(name, given)} requires a pipeline of diffusers, but {source} is not one.")


def _weight_patterns(parts: Iterable[str], variant: str | None) -> list[str]:
    plain = [f"{stem}{rest}.safetensors" for stem in STEMS for rest in ("", "-*-of-*")]
    chosen = [] if variant is None else [f"{stem}*.{variant}*.safetensors" for stem in STEMS]
    folders = [*parts, "unet_ema"] if variant == "ema" else list(parts)
    return [f"{part}/{name}" if part else name for part in folders for name in (*plain, *chosen)]


def _fetch(source: str, options: LoadOptions, patterns: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    offline = options.offline or constants.HF_HUB_OFFLINE
    by_hand = (
        "download its folder (model_index.json, and the config.json and *.safetensors of each part) elsewhere "
        f"and give its path as {argument('model')}, or copy it to the cache, {constants.HF_HUB_CACHE}"
    )
    at = "" if options.revision is None else f" at revision {options.revision}"
    try:
        return Path(
            snapshot_download(source, revision=options.revision, allow_patterns=patterns, local_files_only=offline)
        )
    except RevisionNotFoundError:
        raise UserError(f'the hub has no revision "{options.revision}" of {source}.') from None
    except GatedRepoError:
        raise UserError(
            f"the model {source} is gated; accept its licence on the hub, log in with `hf auth login`, and try again."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f'the hub has no model "{source}", or it is private or gated and requires a login.') from None
    except HFValidationError:
        raise UserError(f'no model "{source}": it is neither a folder nor a valid hub id (owner/name).') from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        why = "offline mode is on" if offline else f"the hub cannot be reached ({type(error).__name__})"
        raise UserError(f'the model "{source}"{at} is not in the local cache and {why}; {by_hand}.') from None
