"""The command line that reproduces a result."""

from __future__ import annotations

import shlex

from samplerbench.results.record import Record
from samplerbench.text import is_printable, printable

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}

NOT_OFFERED = "# not offered to copy, since it has characters that cannot be seen"


def command(record: Record) -> str:
    """`samplerbench run --sampler ddim --steps 10 …`, quoted for a POSIX shell.

    A name with characters that cannot be seen must not be pasted into a terminal: then a comment says which it is.
    """
    fields = record["protocol_fields"]
    parts = ["samplerbench", "run", "--sampler", record["sampler"]]
    if record["steps"] is not None:
        parts += ["--steps", str(record["steps"])]
    if record["guidance"]:
        parts += ["--guidance", record["guidance"]]
    if record["spacing"]:
        parts += ["--spacing", record["spacing"]]
    parts += ["--model", record["model"], "--labels", record["labels"], "--n", str(record["n"])]
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
    reference = fields.get("reference")
    if isinstance(reference, dict) and reference.get("name", record["model"]) != record["model"]:
        parts += ["--data", reference["name"]]
    if hidden := [part for part in parts if not is_printable(part)]:
        return f"{NOT_OFFERED}: {printable(hidden[0])}"
    return shlex.join(parts)
