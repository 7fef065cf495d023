"""The command line that makes a result again."""

from __future__ import annotations

import shlex

from samplerbench.results.record import Record

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def command(record: Record) -> str:
    """`samplerbench run --sampler ddim --steps 10 …`, quoted for a POSIX shell."""
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
    return shlex.join(parts)
