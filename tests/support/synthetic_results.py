"""Result folders made without a model: sealed records whose metrics are known in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from samplerbench.results.seal import digest
from samplerbench.results.store import Store

SPREAD = (-0.1, 0.0, 0.1)


def record(sampler: str = "ddim", steps: int | None = 10, **change: Any) -> dict[str, Any]:
    """An unsealed record. change: fields of the record, `metrics` as {name: blocks or one value}, `protocol` fields."""
    metrics = change.pop("metrics", {"fid": [4.0 + d for d in SPREAD]})
    protocol = change.pop("protocol", {})
    better = change.pop("better", {})
    guidance = change.pop("guidance", None)
    name, _, options = sampler.partition(":")
    described = None
    if guidance is not None:
        kind, _, scale = guidance.partition(":scale=")
        described = {"name": kind, "parameters": {"scale": float(scale)}, "source": "g"}
    values = {m: v if isinstance(v, list) else [v] for m, v in metrics.items()}
    blocks = max(map(len, values.values()))
    base: dict[str, Any] = {
        "sampler": sampler,
        "parameters": dict(part.split("=", 1) for part in options.split(",") if "=" in part),
        "guidance": guidance,
        "spacing": "trailing",
        "steps": steps,
        "budget": None,
        "n": 9,
        "blocks": blocks,
        "seed": 0,
        "model": "digits",
        "labels": "balanced",
        "nfe": steps or 123.5,
        "classifier_forward": 0,
        "classifier_backward": 0,
        "metrics": {
            m: {
                "value": sum(v) / len(v),
                **({"sd": _sd(v), "blocks": v} if len(v) > 1 else {}),
                "features": "digits-cnn",
                "reference": "digits (all, 1797)",
                "better": better.get(m, "higher" if "acc" in m else "lower"),
            }
            for m, v in values.items()
        },
        "seconds": 2.0,
        "metric_seconds": 1.0,
        "images_per_second": 1000.0 / (steps or 100),
        "batch_size": 256,
        "device": "cpu",
        "versions": {"torch": "2.15.0"},
        **change,
    }
    base["protocol_fields"] = {
        "sampler": {"name": name, "parameters": base["parameters"], "source": "s"},
        "guidance": described,
        "spacing": {"name": base["spacing"]},
        "sigmas": [float(base["steps"] or 1), 0.0],
        "versions": base["versions"],
        "model": {"source": base["model"], "weights": "w"},
        "labels": {"mode": base["labels"], "counts": [base["n"]]},
        **{k: base[k] for k in ("n", "blocks", "seed")},
        "dtype": "float32",
        "metrics": list(metrics),
        "features": {"name": "digits-cnn", "weights": "f"},
        "reference": {"name": "digits", "sha256": "r"},
        **protocol,
    }
    return base | {"protocol": digest(base["protocol_fields"])}


def _sd(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return float((sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5)


def put(folder: Path, *records: dict[str, Any], shade: int | None = None) -> list[Path]:
    """Seal and write records; with a shade, a sheet of 3 × 3 images beside each, image i of grey level shade + i."""
    files = [Store(folder).put(r) for r in records]
    if shade is not None:
        for file in files:
            sheet(shade).save(file.with_suffix(".png"))
    return files


def sheet(shade: int) -> Any:
    """Nine 8×8 images, four times enlarged with 2 pixels between: what a run of nine digits leaves."""
    from PIL import Image

    picture = Image.new("L", (3 * 34 + 2, 3 * 34 + 2), 255)
    for i in range(9):
        picture.paste(shade + i, (2 + i % 3 * 34, 2 + i // 3 * 34, 34 + i % 3 * 34, 34 + i // 3 * 34))
    return picture
