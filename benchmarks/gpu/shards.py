"""Save a pipeline's network in half precision, in files under 15 MiB: python benchmarks/gpu/shards.py FOLDER OUT."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import UNet2DModel


def main(folder: Path, out: Path) -> None:
    """Write OUT: the network in shards, everything else of FOLDER but its checkpoint and samples as it is."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("checkpoint", "samples"), dirs_exist_ok=True)
    for whole in (out / "unet").glob("*.safetensors"):
        whole.unlink()
    network = UNet2DModel.from_pretrained(folder / "unet", torch_dtype=torch.float16)
    network.save_pretrained(out / "unet", max_shard_size="14MB")
    config = json.loads((out / "unet" / "config.json").read_text("utf-8"))
    config.pop("_name_or_path", None)  # where it lay on this machine is nobody's business
    (out / "unet" / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    for file in sorted((out / "unet").glob("*.safetensors")):
        print(f"{file.name}: {file.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
