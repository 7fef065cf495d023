"""The card of a trained folder: what it is, from what, by which command, and how it went."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samplerbench.data import ImageSet
    from samplerbench.training.settings import TrainResult, TrainSettings

CARD = "samplerbench.json"


def write_card(
    out: Path,
    what: str,
    data: ImageSet,
    settings: TrainSettings,
    result: TrainResult,
    figures: dict[str, Any],
    command: Sequence[str],
) -> None:
    """Write `samplerbench.json` (read back when the folder is loaded) and `README.md` (for people)."""
    import diffusers
    import torch

    import samplerbench

    card = {
        "what": what,
        **figures,
        "data": {
            "name": data.name,
            "split": data.split,
            "source": data.source,
            "images": len(data),
            "shape": list(data.shape),
            "classes": data.classes,
            "class_counts": data.class_counts() if data.labels is not None else None,
            **({"class_names": list(data.class_names)} if data.class_names else {}),
            "sha256": data.sha256,
            "licence": data.licence,
            **({"resized": data.resized} if data.resized else {}),
        },
        "training": {**asdict(settings), **result.record},
        "command": shlex.join(command),
        "versions": {
            "samplerbench": samplerbench.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
    }
    (out / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    rows = dict(figures)
    if "held_out" in rows:
        found = rows.pop("held_out")
        images = f"{found['data']['name']} ({found['data']['split']}), {found['data']['images']} images"
        name, unit = ("bound", " bits/dim") if "bound" in found else ("velocity error", "")
        value = found[name.replace(" ", "_")]
        rows[f"held-out {name}"] = f"{value:.4f}{unit} at step {found['step']} ({images})"
    shown = "\n".join(f"| {k} | {v} |" for k, v in rows.items())
    (out / "README.md").write_text(
        f"# {what} on {data.name}\n\n"
        f"Trained by samplerbench {samplerbench.__version__}:\n\n"
        f"```\n{card['command']}\n```\n\n"
        f"| | |\n| --- | --- |\n"
        f"| data | {data.name} ({data.split}), {len(data)} images of {'x'.join(map(str, data.shape))} |\n"
        f"| licence of the data | {data.licence or 'not stated'} |\n"
        f"| seed | {settings.seed} |\n"
        f"| steps | {result.steps} |\n"
        f"| images seen | {result.images_seen} |\n"
        f"| time | {result.seconds / 60:.1f} min |\n"
        f"| last loss (running mean) | {result.loss:.5f} |\n"
        f"{shown}\n",
        encoding="utf-8",
        newline="\n",
    )
