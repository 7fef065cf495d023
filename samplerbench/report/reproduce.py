"""The command line that reproduces a result."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from samplerbench.registry import entries
from samplerbench.results.record import Record
from samplerbench.text import is_printable, printable

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}

NOT_OFFERED = "# not offered to copy, since it has characters that cannot be seen"


def command(record: Record) -> str:
    """`samplerbench run --sampler ddim --steps 10 …`, quoted for a POSIX shell.

    A name with characters that cannot be seen must not be pasted into a terminal: then a comment says which it is. Of
    prompts, a result has only the hash: the command has `--prompts FILE`.
    """
    fields = record["protocol_fields"]
    parts = ["samplerbench", "run", "--sampler", record["sampler"]]
    if record["steps"] is not None:
        parts += ["--steps", str(record["steps"])]
    if record["guidance"]:
        parts += ["--guidance", record["guidance"]]
    if record["spacing"]:
        parts += ["--spacing", record["spacing"]]
    if record.get("task"):
        parts += ["--task", record["task"]]
    parts += ["--model", record["model"], *_loading(fields.get("model"))]
    parts += ["--labels", record["labels"], "--n", str(record["n"])]
    if record["blocks"] > 1:
        parts += ["--blocks", str(record["blocks"])]
    parts += ["--seed", str(record["seed"])]
    dtype = fields.get("dtype", "float32")
    parts += ["--dtype", DTYPES.get(dtype, dtype)]
    if fields.get("compile"):
        parts += ["--compile"]
    for metric in fields.get("metrics", list(record["metrics"])):
        parts += ["--metric", metric]
    features = fields.get("features")
    if isinstance(features, dict) and "name" in features:
        parts += ["--features", features["name"]]
    task = fields.get("task")
    for images in (fields.get("reference"), task.get("images") if isinstance(task, dict) else None):
        if isinstance(images, dict) and (data := _data(images, record["model"])):
            parts += ["--data", data]
            break
    if hidden := [part for part in parts if not is_printable(part)]:
        return f"{NOT_OFFERED}: {printable(hidden[0])}"
    return shlex.join(parts)


def _loading(model: Any) -> list[str]:
    """The options that say how the model was loaded, from its identity in the protocol."""
    if not isinstance(model, dict):
        return []
    parts = []
    for option, name in (("--revision", "revision"), ("--variant", "variant")):
        if model.get(name):
            parts += [option, str(model[name])]
    if model.get("prompts"):
        parts += ["--prompts", "FILE"]
    if model.get("negative prompt"):
        parts += ["--negative-prompt", str(model["negative prompt"])]
    if isinstance(size := model.get("image size"), list):
        parts += ["--image-size", "x".join(map(str, size))]
    if model.get("embedded guidance") is not None:
        parts += ["--embedded-guidance", f"{model['embedded guidance']:g}"]
    return parts


def _data(images: Mapping[str, Any], model: str) -> str | None:
    """The value of `--data` for the real images in a protocol. None for draws of an exact problem.

    Args:
        images: Name and split of the images.
        model: Name of the model. In results of older versions, images without a split are its training data.
    """
    name, split = str(images.get("name", model)), images.get("split")
    if split is None:
        return None if name == model else name
    if split == "draws":
        return None
    named = name.partition(":")[0] in {entry.name for entry in entries("data set")}
    return f"{name}:split={split}" if named and "split=" not in name else name
