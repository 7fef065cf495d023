"""`load_data`: load a data set by name or path."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from samplerbench import registry
from samplerbench.boundary import plugin_call
from samplerbench.data.files import ImageFiles, load_folder, load_npz, load_zip
from samplerbench.data.image_set import DataSource, ImageSet
from samplerbench.errors import RunError, UserError
from samplerbench.options import build, did_you_mean
from samplerbench.untrusted import is_dir, is_file, shorten, user_path


def load_data(source: str) -> ImageSet:
    """Load a data set.

    Args:
        source: a name in `samplerbench list data`, with optional parameters (`mnist:split=test`, `hf:owner/name`); a
            folder of images of one size, whose sub-folders are classes; a zip archive of such a folder; or an npz
            file. A folder or zip with a rule, `PATH:resize=64,crop=center`, can have images of several sizes.

    Raises:
        UserError: no such name or file, or one that cannot be used.
    """
    return find_data(source)()


def find_data(source: str) -> Callable[[], ImageSet]:
    """A function that loads the data set `source`. A wrong name raises an error at once; nothing else is read yet.

    Raises:
        UserError: no such name or file.
    """
    if not source.strip():
        raise UserError("the name of the data set is empty: use a folder or zip of images, an npz file, or a name.")
    name = source.partition(":")[0].partition("/")[0]
    known = {entry.name for entry in registry.entries("data set")}
    if name in known and (name == source or ":" in source or not (is_dir(source) or is_file(source))):
        return partial(_load_named, registry.parse("data set", source))
    if (files := _resized(source)) is not None:
        return files.load
    path = user_path(source)
    if is_dir(path):
        return partial(load_folder, path)
    if is_file(path) and path.suffix.lower() == ".zip":
        return partial(load_zip, path)
    if is_file(path) and path.suffix.lower() == ".npz":
        return partial(load_npz, path)
    if is_file(path):
        raise UserError(f"{source} is not a data set: use a folder or zip of images, an npz file, or a name.")
    raise UserError(
        f'no data set "{shorten(source)}": it is neither a folder, a zip or an npz, nor one of '
        f"{', '.join(sorted(known))}.{did_you_mean(source.partition(':')[0], known)}"
    )


def _resized(source: str) -> ImageFiles | None:
    """The folder or archive of a source with a rule, `PATH:resize=64,crop=center`. None for a source without a rule.

    Raises:
        UserError: an unknown parameter or an invalid value, or a file that is neither a folder nor a zip archive.
    """
    path, colon, rule = source.rpartition(":")
    if not colon or is_dir(source) or is_file(source):
        return None
    if not is_dir(path) and not is_file(path):
        return None
    if is_file(path) and Path(path).suffix.lower() != ".zip":
        raise UserError(f"{shorten(source)}: only a folder or a zip archive of images can be resized.")
    arguments: dict[str, str] = {}
    for part in rule.split(","):
        name, equals, value = (text.strip() for text in part.partition("="))
        if not equals or name in arguments:
            raise UserError(f"{shorten(source)}: write {shorten(path)}:resize=SIDE,crop=center,filter=bicubic.")
        arguments[name] = value
    files: ImageFiles = build(ImageFiles, arguments)
    return files.with_state(path=path)


def _load_named(named: DataSource) -> ImageSet:
    with plugin_call(named, "in load"):
        found = named.load()
    if not isinstance(found, ImageSet):
        raise RunError(f"data set {named.label()}: load returned a {type(found).__name__}; it must be an ImageSet.")
    return found
