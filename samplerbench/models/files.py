"""Checkpoint folders: resolve a path or a hub id, and hash what is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from samplerbench.errors import UserError


def hash_files(files: Iterable[Path]) -> str:
    """sha256 over the contents of the files, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        digest.update(file.name.encode())
        with open(file, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def resolve_checkpoint(source: str) -> tuple[Path, str]:
    """The local folder of a checkpoint and its revision ("" for a folder): a path, or a hub id `owner/name`.

    Raises:
        UserError: no such folder, or a hub id that is neither cached nor reachable.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        return path, ""
    looks_like_id = source.count("/") == 1 and not source.startswith((".", "/", "~")) and not path.suffix
    if path.exists() or not looks_like_id:
        raise UserError(
            f'no model "{source}": it is neither a folder nor a hub id (owner/name) nor a name that '
            "`samplerbench list models` shows."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.safetensors", "unet/*", "scheduler/*"]
    try:
        folder = Path(snapshot_download(source, allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise UserError(f'the hub has no model "{source}", or it is private and needs a login.') from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f'the model "{source}" is not in the local cache and the hub cannot be reached '
            f"({type(error).__name__}); download its folder elsewhere and give the path as --model."
        ) from None
    return folder, folder.name
