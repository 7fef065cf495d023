"""Small random image encoders of transformers, written with save_pretrained."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from support.pipelines import save_tokenizer

SIDE = 28
"""Side of the images that the small CLIP is given, in pixels."""
LENGTH = 16
"""Tokens that its text encoder takes."""
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def processor_config() -> dict[str, object]:
    return {
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": SIDE},
    }


def save_clip(folder: Path, seed: int = 0, processor: bool = True) -> Path:
    """A CLIP model of 28x28 images and single letters, whose cosines are spread over both signs."""
    from transformers import CLIPConfig, CLIPModel

    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = shared | {"vocab_size": 54, "max_position_embeddings": LENGTH, "eos_token_id": 53, "bos_token_id": 52}
    config = CLIPConfig(
        text_config=text | {"pad_token_id": 53, "projection_dim": 4},
        vision_config=shared | {"image_size": SIDE, "patch_size": 7, "projection_dim": 4},
        projection_dim=4,
        logit_scale_init_value=1.5,
    )
    torch.manual_seed(seed)
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    if processor:
        save_processor(folder)
    return folder


def save_processor(folder: Path) -> Path:
    """The preprocessing and the tokenizer of `save_clip`."""
    made = folder / "made"
    save_tokenizer(made)
    for file in made.iterdir():
        file.rename(folder / file.name)
    made.rmdir()
    (folder / "preprocessor_config.json").write_text(json.dumps(processor_config()))
    return folder


def save_dinov2(folder: Path, grid: int = 5) -> Path:
    """A DINOv2 with 56x56 patches: 4x4 of a 224x224 image. Its position embeddings are those of grid x grid patches."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=56,
        image_size=56 * grid,
        mlp_ratio=2,
        layerscale_value=0.7,
    )
    torch.manual_seed(1)
    model = Dinov2Model(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder
