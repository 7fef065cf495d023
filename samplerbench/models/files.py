"""Checkpoint folders: resolve a path or a hub id, find the weights in it, and hash what is loaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samplerbench.errors import UserError, argument
from samplerbench.untrusted import is_dir, is_file, read_json, shorten, user_path

STEMS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call a module's weights."""


@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint is to be loaded.

    revision: a branch, tag or commit of a hub repository; None is its main branch. variant: which of several weights
    ("fp16", "non_ema"), or "ema" for the folder `unet_ema`. prompts: a text file, one prompt a line.
    negative_prompt: what guidance steers away from; None is the empty prompt. offline: use the local cache only.
    show: it is only looked at, not sampled, so a model that draws from text needs no prompts. compile: the network with
    torch.compile. graphs: whole batches as CUDA graphs.
    """

    revision: str | None = None
    variant: str | None = None
    prompts: str | None = None
    negative_prompt: str | None = None
    offline: bool = False
    show: bool = False
    compile: bool = False
    graphs: bool = False


def hash_files(files: Iterable[Path]) -> str:
    """sha256 over the contents of the files, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        digest.update(file.name.encode())
        with open(file, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors of a module's folder, one or several shards, of a variant or of none; [] where there are none."""
    shard = r"(-\d+-of-\d+)?"
    # Shards of a variant were once named the other way round.
    middle = shard if variant is None else rf"(\.{re.escape(variant)}{shard}|-\d+-of-\d+\.{re.escape(variant)})"
    pattern = re.compile(rf"({'|'.join(STEMS)}){middle}\.safetensors")
    return sorted(f for f in folder.glob("*.safetensors") if pattern.fullmatch(f.name))


def check_weights(folder: Path, files: Iterable[Path], variant: str | None, complaint: str) -> None:
    """See that what is loaded from a module's folder is what is hashed: the weights in `files`.

    A sharded module has an index that says which file holds which tensor, and it could name any file.

    Args:
        complaint: how an error begins.

    Raises:
        UserError: the index cannot be read or names another file, or an adapter would change the weights.
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
                raise UserError(f"{complaint}: {folder.name}/{index.name} names {what}; it must name shards beside it.")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{complaint}: it has an adapter (adapter_config.json); merge it into the weights first.")


def check_no_code(config: Mapping[str, Any], complaint: str) -> None:
    """See that a module's configuration does not name code on the hub, as an attention kernel `owner/name` is.

    Classes of a folder's own (`auto_map`) need no check here: every loader is called with `trust_remote_code=False`.

    Raises:
        UserError: it does; it begins with `complaint`.
    """
    for key, value in config.items():
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise UserError(
                f"{complaint}: its config.json names code on the hub ({key}: {shorten(str(value))}), and no code of a "
                "checkpoint is run."
            )
        if isinstance(value, dict):
            check_no_code(value, complaint)


def known_variants(folder: Path) -> list[str]:
    """The variants of which a module's folder has weights."""
    named = re.compile(rf"(?:{'|'.join(STEMS)})(?:-\d+-of-\d+)?\.([^.]+?)(?:-\d+-of-\d+)?\.safetensors")
    return sorted({found[1] for f in folder.glob("*.safetensors") if (found := named.fullmatch(f.name))})


def resolve_checkpoint(source: str, options: LoadOptions | None = None) -> tuple[Path, str]:
    """The local folder of a checkpoint and its revision ("" for a folder): a path, or a hub id `owner/name`.

    Of a hub repository only the configurations, the tokenizer and the safetensors of the asked variant are fetched.

    Raises:
        UserError: no such folder, a revision of a folder, or a hub id that is neither cached nor reachable.
    """
    options = options or LoadOptions()
    path = user_path(source)
    if source and is_dir(path):
        if options.revision is not None:
            raise UserError(
                f"{argument('revision', options.revision)} is of a hub repository, but {source} is a folder."
            )
        return path, ""
    a_file = path.suffix.lower() in (".safetensors", ".json", ".bin", ".ckpt", ".pt", ".pth")
    looks_like_id = source.count("/") == 1 and not source.startswith((".", "/", "~")) and not a_file
    if is_file(path) or not looks_like_id:
        raise UserError(
            f'no model "{source}": it is neither a folder nor a hub id (owner/name) nor a name that '
            "`samplerbench list models` shows."
        )
    folder = _fetch(source, options, ["*.json", "*.txt"])
    index = folder / "model_index.json"
    if index.exists():
        parts = [name for name, value in read_json(index, source).items() if isinstance(value, list)]
        # The adapters read no weights of the parts named here, and they are large.
        parts = [p for p in parts if p not in ("safety_checker", "feature_extractor", "image_encoder")]
        folder = _fetch(source, options, ["*.json", "*.txt", *_weight_patterns(parts, options.variant)])
    else:
        folder = _fetch(source, options, ["*.json", *_weight_patterns([""], options.variant)])
    return folder, folder.name


def check_no_prompts(source: str, options: LoadOptions) -> None:
    """Raise UserError where prompts are given for a model without text."""
    for name in ("prompts", "negative_prompt"):
        if getattr(options, name) is not None:
            raise UserError(f"{argument(name)} is for models that draw from text; {source} is none: leave it out.")


def _weight_patterns(parts: Iterable[str], variant: str | None) -> list[str]:
    plain = [f"{stem}{rest}.safetensors" for stem in STEMS for rest in ("", "-*-of-*")]
    chosen = [] if variant is None else [f"{stem}*.{variant}*.safetensors" for stem in STEMS]
    folders = [*parts, "unet_ema"] if variant == "ema" else list(parts)
    return [f"{part}/{name}" if part else name for part in folders for name in (*plain, *chosen)]


def _fetch(source: str, options: LoadOptions, patterns: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    offline = options.offline or constants.HF_HUB_OFFLINE
    by_hand = (
        "get its folder (model_index.json, and the config.json and *.safetensors of each part) by other means "
        f"and give its path as {argument('model')}, or put it into the cache, {constants.HF_HUB_CACHE}"
    )
    at = "" if options.revision is None else f" at revision {options.revision}"
    try:
        return Path(
            snapshot_download(source, revision=options.revision, allow_patterns=patterns, local_files_only=offline)
        )
    except RevisionNotFoundError:
        raise UserError(f'the hub has no revision "{options.revision}" of {source}.') from None
    except RepositoryNotFoundError:
        raise UserError(f'the hub has no model "{source}", or it is private or gated and needs a login.') from None
    except HFValidationError:
        raise UserError(f'no model "{source}": it is neither a folder nor a valid hub id (owner/name).') from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        why = "offline mode is on" if offline else f"the hub cannot be reached ({type(error).__name__})"
        raise UserError(f'the model "{source}"{at} is not in the local cache and {why}; {by_hand}.') from None
