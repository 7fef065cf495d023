"""`load_data`: a data set by name or by path."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from samplerbench import registry
from samplerbench.boundary import plugin_call
from samplerbench.data.files import load_folder, load_npz, load_zip
from samplerbench.data.image_set import DataSource, ImageSet
from samplerbench.errors import RunError, UserError
from samplerbench.options import did_you_mean
from samplerbench.untrusted import is_dir, is_file, shorten, user_path


def load_data(source: str) -> ImageSet:
    """The data set `source`.

    A name that `samplerbench list data` shows, with parameters (`mnist:split=test`, `hf:owner/name`); a folder of
    equally sized images, whose sub-folders are classes; a zip of such a folder; or an npz of arrays.

    Raises:
        UserError: no such name or file, or one that cannot be used, with what to do.
    """
    return find_data(source)()


def find_data(source: str) -> Callable[[], ImageSet]:
    """What loads the data set `source`. Nothing is read yet, so a mistyped name is seen before anything long begins.

    Raises:
        UserError: no such name or file.
    """
    if not source.strip():
        raise UserError("the data set has no name: give a folder of images, a zip of one, an npz, or a name.")
    name = source.partition(":")[0].partition("/")[0]
    known = {entry.name for entry in registry.entries("data set")}
    if name in known and (name == source or ":" in source or not (is_dir(source) or is_file(source))):
        return partial(_load_named, registry.parse("data set", source))
    path = user_path(source)
    if is_dir(path):
        return partial(load_folder, path)
    if is_file(path) and path.suffix.lower() == ".zip":
        return partial(load_zip, path)
    if is_file(path) and path.suffix.lower() == ".npz":
        return partial(load_npz, path)
    if is_file(path):
        raise UserError(f"{source} is no data set: give a folder of images, a zip of one, an npz, or a name.")
    raise UserError(
        f'no data set "{shorten(source)}": it is neither a folder, a zip or an npz, nor one of '
        f"{', '.join(sorted(known))}.{did_you_mean(source, known)}"
    )


def _load_named(named: DataSource) -> ImageSet:
    with plugin_call(named, "in load"):
        found = named.load()
    if not isinstance(found, ImageSet):
        raise RunError(f"data set {named.label()}: load returned a {type(found).__name__}; it must be an ImageSet.")
    return found
