"""`load_data`: a data set by name or by path."""

from __future__ import annotations

from pathlib import Path

from samplerbench import registry
from samplerbench.boundary import plugin_call
from samplerbench.data.files import load_folder, load_npz, load_zip
from samplerbench.data.image_set import ImageSet
from samplerbench.errors import RunError, UserError
from samplerbench.options import did_you_mean


def load_data(source: str) -> ImageSet:
    """The data set `source`.

    A name that `samplerbench list data` shows, with parameters (`mnist:split=test`, `hf:owner/name`); a folder of
    equally sized images, whose sub-folders are classes; a zip of such a folder; or an npz of arrays.

    Raises:
        UserError: no such name or file, or one that cannot be used, with what to do.
    """
    name = source.partition(":")[0].partition("/")[0]
    known = {entry.name for entry in registry.entries("data set")}
    if name in known and (name == source or ":" in source or not Path(source).exists()):
        named = registry.parse("data set", source)
        with plugin_call(named, "in load"):
            found = named.load()
        if not isinstance(found, ImageSet):
            raise RunError(f"data set {named.label()}: load returned a {type(found).__name__}; it must be an ImageSet.")
        return found
    path = Path(source).expanduser()
    if path.is_dir():
        return load_folder(path)
    if path.is_file() and path.suffix.lower() == ".zip":
        return load_zip(path)
    if path.is_file() and path.suffix.lower() == ".npz":
        return load_npz(path)
    if path.is_file():
        raise UserError(f"{source} is no data set: give a folder of images, a zip of one, an npz, or a name.")
    raise UserError(
        f'no data set "{source}": it is neither a folder, a zip or an npz, nor one of {", ".join(sorted(known))}.'
        f"{did_you_mean(source, known)}"
    )
